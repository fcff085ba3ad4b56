"""The teacher's weights as its forward uses them, refreshed from this rank's float32 averages.

ZeRO 1, 2   the weights are views of flat buffers laid out as the student's; refresh = one all-gather per buffer
ZeRO 3      the weights are partitioned as the student's; refresh = a local cast, nothing is sent
  resident  the weights are whole on every rank, so the teacher's forward gathers nothing; refresh = one all-gather of
            the teacher's size per step, in buckets
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megad2v.engine.fragments import (
    Fragment,
    PartitionedWeights,
    ReplicatedWeights,
    ZeroState,
    drop_gathered,
    gather_flat,
    write_slice,
)


class ForwardCopy(Protocol):
    """Where the averages go. `averages` are views into memory that `refresh` reads, one per teacher fragment."""

    fragments: list[Fragment]
    averages: list[Tensor]

    def refresh(self) -> None:
        """Bring the forward weights up to date with the averages. Collective."""


class ReplicatedCopy:
    """ZeRO 1, 2. The optimizer's groups hold either only teacher parameters or none (see `engine.setup`), so the
    averages of a group fill exactly one partition of its flat buffer."""

    def __init__(self, teacher: nn.Module, state: ReplicatedWeights) -> None:
        names = dict(teacher.named_parameters())
        self.state = state
        self.fragments = [f for f in state.fragments if f.name in names]
        self.partitions = _teacher_partitions(state, names)
        self.flat = {index: torch.empty_like(state.weights_flat[index]) for index in self.partitions}
        # Padding at the end of a partition is gathered too: keep it finite.
        self.memory = {index: torch.zeros_like(state.partitions[index].detach()) for index in self.partitions}
        self.averages = [self.memory[f.partition].narrow(0, f.offset, f.length) for f in self.fragments]
        for name, parameter in names.items():
            parameter.data = self._view(state.parameters[name])

    def _view(self, student: nn.Parameter) -> Tensor:
        """The place in the teacher's flat buffer that corresponds to the student's in its own."""
        for index, flat in self.flat.items():
            source = self.state.weights_flat[index]
            offset = (student.data_ptr() - source.data_ptr()) // source.element_size()
            if 0 <= offset < source.numel():
                return flat.narrow(0, offset, student.numel()).view(student.shape)
        raise RuntimeError("a teacher parameter lies in no flat buffer of the student's optimizer")

    def refresh(self) -> None:
        """One all-gather of the teacher's size (in its dtype) per optimizer group."""
        for index in self.partitions:
            gather_flat(self.flat[index], self.memory[index], self.state.groups[index])


class PartitionedCopy:
    """ZeRO 3."""

    def __init__(self, teacher: nn.Module, state: PartitionedWeights) -> None:
        self.parameters = dict(teacher.named_parameters())
        self.fragments = [f for f in state.fragments if f.name in self.parameters]
        self.averages = [torch.zeros_like(f.master) for f in self.fragments]

    def refresh(self) -> None:
        """Cast each average into the teacher's slice. Weights that DeepSpeed keeps gathered (persistent: by default
        every norm and bias) would stay a step behind, so they are dropped and gathered anew by the next forward."""
        for fragment, average in zip(self.fragments, self.averages, strict=True):
            write_slice(self.parameters[fragment.name], average)
        drop_gathered(self.parameters.values())


class ResidentCopy:
    """ZeRO 3 with `teacher.resident`: worth its memory where a step has many micro-batches, each of which would gather
    the teacher's weights."""

    def __init__(self, teacher: nn.Module, state: PartitionedWeights) -> None:
        self.parameters = dict(teacher.named_parameters())
        self.fragments = [f for f in state.fragments if f.name in self.parameters]
        self.averages = [torch.zeros_like(f.master) for f in self.fragments]
        self._own = {f.name: average for f, average in zip(self.fragments, self.averages, strict=True)}
        # Every rank's slice of a parameter has the same length, padding included.
        self._slots = {name: state.parameters[name].ds_tensor.ds_numel for name in self.parameters}
        self._group = next(iter(state.parameters.values())).ds_process_group
        self._buckets = _buckets(self._slots)

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather the averages in the weights' dtype. Per bucket one all-gather; the memory of one bucket on top."""
        ranks = dist.get_world_size(self._group)
        like = next(iter(self.parameters.values()))
        for names in self._buckets:
            slots = [self._slots[name] for name in names]
            own = like.new_zeros(sum(slots))  # padding is sent too: keep it finite
            for name, slot in zip(names, own.split(slots), strict=True):
                if name in self._own:  # a tail rank may own nothing of a small parameter
                    slot[: self._own[name].numel()].copy_(self._own[name])
            flat = own.new_empty(ranks * own.numel())
            gather_flat(flat, own, self._group)
            for name, parts in zip(names, flat.view(ranks, -1).split(slots, dim=1), strict=True):
                parameter = self.parameters[name]
                parameter.copy_(parts.flatten()[: parameter.numel()].view(parameter.shape))


BUCKET = 1 << 24
"""Elements of this rank's slices that `ResidentCopy` gathers at a time."""


def _buckets(slots: dict[str, int]) -> list[list[str]]:
    """Names in order, cut where a bucket would exceed BUCKET; a larger parameter is a bucket of its own."""
    buckets: list[list[str]] = []
    filled = BUCKET
    for name, size in slots.items():
        if filled + size > BUCKET:
            buckets.append([])
            filled = 0
        buckets[-1].append(name)
        filled += size
    return buckets


def forward_copy(teacher: nn.Module, state: ZeroState) -> ForwardCopy:
    """The copy that fits the stage, and whether `teacher` was built partitioned. At stages 1 and 2 it takes over the
    memory of `teacher`'s parameters."""
    if isinstance(state, PartitionedWeights):
        partitioned = any(hasattr(parameter, "ds_tensor") for parameter in teacher.parameters())
        return PartitionedCopy(teacher, state) if partitioned else ResidentCopy(teacher, state)
    if isinstance(state, ReplicatedWeights):
        return ReplicatedCopy(teacher, state)
    raise TypeError(f"no forward copy for {type(state).__name__}")


def _teacher_partitions(state: ReplicatedWeights, names: dict[str, Any]) -> list[int]:
    """Flat buffers that hold teacher parameters, equal on all ranks (a rank may own no fragment of one)."""
    found = set()
    for name in names:
        pointer = state.parameters[name].data_ptr()
        for index, flat in enumerate(state.weights_flat):
            if flat.data_ptr() <= pointer < flat.data_ptr() + flat.numel() * flat.element_size():
                found.add(index)
    return sorted(found)

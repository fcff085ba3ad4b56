"""One view of ZeRO's memory: which piece of which parameter this rank owns, in float32.

Whatever the stage, a rank owns flat ranges (name, start, length) of the flattened parameters, as views of the
optimizer's own memory: writing to `master` changes what the next optimizer step starts from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megad2v.engine.distributed import on_gpu
from megad2v.parallel.sharding import shard_of

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps per element."""


@dataclass(frozen=True)
class Fragment:
    """`master` is a float32 view of elements [start, start + length) of flattened parameter `name`."""

    name: str
    start: int
    length: int
    master: Tensor
    partition: int
    """Index of the flat buffer that it lies in (see `ZeroState.partitions`)."""
    offset: int
    """Where it starts in that buffer."""
    split: bool = False
    """Whether tensor-parallel ranks hold other slices of `name`; False: they hold equal copies."""


class ZeroState(Protocol):
    """What training, teacher and checkpoint may know of a ZeRO optimizer."""

    stage: int
    fragments: list[Fragment]
    partitions: list[Tensor]
    """This rank's flat float32 master buffers; the optimizer's state is kept per buffer."""

    def publish(self) -> None:
        """Make the forward weights equal to the masters (after a checkpoint was loaded into them). Collective."""

    def clear_unused_gradients(self) -> None:
        """After a step: make sure that parameters the next step does not use contribute exactly zero."""


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Full shape of every parameter, whatever it is split or partitioned over."""
    return {name: shard_of(p).full_shape for name, p in module.named_parameters()}


def own_numel(module: nn.Module) -> int:
    """Parameters of this tensor-parallel rank's slices, partitioned or not."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


class ReplicatedWeights:
    """ZeRO 1 and 2: weights replicated in flat buffers, masters partitioned. bf16 stage 1 has another class inside."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer
        self.stage = engine.zero_optimization_stage()
        bf16 = hasattr(self.optimizer, "bf16_groups_flat")
        self.weights_flat: list[Tensor] = self.optimizer.bf16_groups_flat if bf16 else self.optimizer.bit16_groups_flat
        self.partitions = (
            self.optimizer.fp32_groups_flat_partition if bf16 else self.optimizer.single_partition_of_fp32_groups
        )
        self.groups = self.optimizer.real_dp_process_group
        self.parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self.fragments = [f for name, p in self.parameters.items() if (f := self._fragment(name, p)) is not None]

    def _fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        mapping = parameter._hp_mapping
        if mapping is None:  # no element of it lies in this rank's partition
            return None
        address, shard = mapping.lp_fragment_address, shard_of(parameter)
        length = min(address.numel, shard.numel - address.start)
        if length <= 0:  # nothing but padding
            return None
        return Fragment(
            name=name,
            start=shard.start + address.start,
            length=length,
            master=mapping.hp_fragment.detach().narrow(0, 0, length),
            partition=mapping.param_group_index,
            offset=mapping.hp_fragment_address.start,
            split=shard.split,
        )

    def publish(self) -> None:
        """Cast the masters and gather the flat weights, one all-gather per optimizer group."""
        for flat, partition, group in zip(self.weights_flat, self.partitions, self.groups, strict=True):
            gather_flat(flat, partition.detach(), group)

    def clear_unused_gradients(self) -> None:
        """Nothing to do: stages 1 and 2 start every step from empty gradients."""


class PartitionedWeights:
    """ZeRO 3: weights and masters partitioned alike, each rank a ceil(numel / dp) slice of every parameter."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer
        self.stage = 3
        self.partitions = self.optimizer.fp32_partitioned_groups_flat
        self.parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self.fragments = [f for name, p in self.parameters.items() if (f := self._fragment(name, p)) is not None]

    def _fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        partition, offset, slot = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start, length = local_range(parameter, slot)
        if length == 0:
            return None
        master = self.partitions[partition].detach().narrow(0, offset, length)
        shard = shard_of(parameter)
        return Fragment(name, shard.start + start, length, master, partition, offset, shard.split)

    def publish(self) -> None:
        """Cast each master into its weight slice: nothing is sent. Weights that stay gathered are dropped, so that
        the next forward gathers the new ones."""
        for fragment in self.fragments:
            write_slice(self.parameters[fragment.name], fragment.master)
        drop_gathered(self.parameters.values())

    def clear_unused_gradients(self) -> None:
        """ZeRO-3 keeps the last gradient of a parameter that a step does not use, and applies it again."""
        self.optimizer.grad_partitions_flat_buffer.zero_()
        if self.optimizer.offload_optimizer:
            for partition in self.partitions:
                if partition.grad is not None:
                    partition.grad.zero_()
            self.optimizer.norm_for_param_grads.clear()


def zero_state(engine: Any) -> ZeroState:
    """The view that fits the engine's stage."""
    return PartitionedWeights(engine) if engine.zero_optimization_stage() == 3 else ReplicatedWeights(engine)


def local_range(parameter: nn.Parameter, slot: int | None = None) -> tuple[int, int]:
    """(start, length) of this rank's slice of a ZeRO-3 parameter, within a tensor-parallel slice if it is one. Tail
    ranks hold padding beyond it."""
    slot = slot if slot is not None else parameter.ds_tensor.ds_numel
    start = dist.get_rank(parameter.ds_process_group) * slot
    return start, max(0, min(slot, shard_of(parameter).numel - start))


@torch.no_grad()
def write_slice(parameter: nn.Parameter, values: Tensor) -> None:
    """Write this rank's slice of a ZeRO-3 parameter (cast to its dtype); no communication."""
    parameter.ds_tensor.data.narrow(0, 0, values.numel()).copy_(values)


def drop_gathered(parameters: Iterable[nn.Parameter]) -> None:
    """Partition parameters that are still gathered (persistent ones are, between steps) without writing them back."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    gathered = [p for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
    if gathered:
        gathered[0].partition(gathered, has_been_updated=False)
    if on_gpu():
        # DeepSpeed gathers on a stream of its own that does not wait for the one which has just written the slices.
        torch.cuda.current_stream().synchronize()


@torch.no_grad()
def gather_flat(flat: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `flat` on every rank of `group` from each rank's equal `own` piece (cast): one all-gather of its bytes."""
    dist.all_gather_into_tensor(flat, own.to(flat.dtype), group=group)


def adam_entries(engine: Any, state: ZeroState) -> list[dict[str, Tensor]]:
    """AdamW's state per flat partition (`step` and the two moments), at zero where no step has been taken yet."""
    optimizer = engine.optimizer.optimizer
    settings = optimizer.param_groups[0]
    entries = []
    for partition in state.partitions:
        entry = optimizer.state[partition]
        if "step" not in entry:
            on_device = settings.get("fused") or settings.get("capturable")
            entry["step"] = torch.zeros((), device=partition.device if on_device else "cpu")
            entry.update({kind: torch.zeros_like(partition.detach()) for kind in MOMENTS})
        entries.append(entry)
    return entries

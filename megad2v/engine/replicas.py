"""Copies that tensor-parallel ranks hold of the same parameters: norms, biases, the front end, the head.

They see the same gradients to the bit, as far as kernels and reductions give equal bits for equal inputs. On GPUs that
is not promised: each tensor index has a communicator of its own, which may sum in another order. A difference would
stay unseen, and a checkpoint, which holds the first rank's copies alone, would not be the state that the run goes on
from.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megad2v.engine.distributed import World


@torch.no_grad()
def unify(copies: Sequence[tuple[str, Tensor]], world: World) -> list[str]:
    """Give every tensor-parallel rank the first one's `copies` (name, float32 memory), where their bits differ.

    Returns the names that differed. Collective over each tensor-parallel group: two all-reduces of 8 bytes, two of 8
    bytes per copy, and a broadcast of each copy that differed. Nothing where there is one rank, nor where ranks own
    other ranges.
    """
    axis = world.tensor
    if axis.size == 1:
        return []
    names = repr([(name, memory.numel()) for name, memory in copies]).encode()
    if len(_unequal(torch.tensor([zlib.crc32(names)], device=world.device), axis.group)):
        return []
    if not copies:  # on none of the group's ranks: their names are equal
        return []
    sums = torch.stack([memory.view(torch.int32).sum(dtype=torch.int64) for _, memory in copies]).to(world.device)
    differing = [copies[place] for place in _unequal(sums, axis.group)]
    for _, memory in differing:
        value = memory.to(world.device, copy=True)
        dist.broadcast(value, group_src=0, group=axis.group)
        memory.copy_(value)
    return [name for name, _ in differing]


def _unequal(values: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """Places at which the ranks of `group` do not all have the same; the same list on each."""
    low, high = values.clone(), values.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
    return (low != high).nonzero().flatten().tolist()

"""Collectives over the tensor-parallel ranks, with their gradients (Megatron-LM's f, g and their sequence forms).

Activations are either replicated (equal to the bit on all ranks of the group) or split over ranks along the sequence,
dimension 1 of (B, T, D), whose length the group's size divides. Per call and rank, with n bytes of a replicated tensor:

                      forward                      backward
    copy              nothing                      all-reduce n: the sum of what each rank's slice contributes
    reduce            all-reduce n                 nothing
    reduce_scatter    reduce-scatter n             all-gather n
    split             nothing                      all-gather n
    join              all-gather n                 nothing

torch's functional collectives carry them: they do not wait until their result is used, and torch.compile keeps them in
its graph.
"""

from __future__ import annotations

from typing import Any

import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.autograd import Function

from megad2v.parallel.topology import Axis

# torch 2.13 has renamed these two.
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor

SEQUENCE = 1
"""The dimension that sequence parallelism splits."""


def wait(x: Tensor) -> Tensor:
    """The result of one of the three below, arrived. Between the call and this, other work hides the message. In a
    compiled graph the compiler places the wait."""
    return x.wait() if isinstance(x, functional.AsyncCollectiveTensor) else x


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis, on its way."""
    return functional.all_reduce(x.contiguous(), "sum", axis.group)


def all_gather(x_btd: Tensor, axis: Axis) -> Tensor:
    """(B, T / size, D) of every rank, on its way: `in_sequence` waits for it and puts it in order. Gathered along the
    batch, because torch waits at once for any other dimension."""
    return _all_gather(x_btd.contiguous(), 0, axis.group)


def in_sequence(gathered: Tensor, axis: Axis) -> Tensor:
    """What `all_gather` gave -> (B, T, D), chunks in rank order."""
    return wait(gathered).unflatten(0, (axis.size, -1)).movedim(0, SEQUENCE).flatten(SEQUENCE, SEQUENCE + 1)


def reduce_scatter(x_btd: Tensor, axis: Axis) -> Tensor:
    """(B, T, D), summed over the axis -> this rank's (B, T / size, D), on its way."""
    return _reduce_scatter(x_btd.contiguous(), "sum", SEQUENCE, axis.group)


def own_chunk(x_btd: Tensor, axis: Axis) -> Tensor:
    """(B, T, D) -> this rank's (B, T / size, D); nothing is sent."""
    return x_btd.chunk(axis.size, SEQUENCE)[axis.rank].contiguous()


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, x: Tensor) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, wait(all_reduce(gradient, ctx.axis))


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, x: Tensor) -> Tensor:
        return wait(all_reduce(x, axis))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, gradient


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, x_btd: Tensor) -> Tensor:
        ctx.axis = axis
        return wait(reduce_scatter(x_btd, axis))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, in_sequence(all_gather(gradient, ctx.axis), ctx.axis)


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, x_btd: Tensor) -> Tensor:
        ctx.axis = axis
        return own_chunk(x_btd, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, in_sequence(all_gather(gradient, ctx.axis), ctx.axis)


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, x_btd: Tensor) -> Tensor:
        ctx.axis = axis
        return in_sequence(all_gather(x_btd, axis), axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, own_chunk(gradient, ctx.axis)


def copy(axis: Axis, x: Tensor) -> Tensor:
    """A replicated tensor (activation or parameter) that each rank uses in a computation of its own."""
    return _Copy.apply(axis, x)


def reduce(axis: Axis, x: Tensor) -> Tensor:
    """Partial sums -> their replicated sum."""
    return _Reduce.apply(axis, x)


def reduce_scatter_sequence(axis: Axis, x_btd: Tensor) -> Tensor:
    """Partial sums of the whole sequence -> this rank's chunk of their sum."""
    return _ReduceScatter.apply(axis, x_btd)


def split(axis: Axis, x_btd: Tensor) -> Tensor:
    """Replicated -> this rank's chunk of the sequence."""
    return _Split.apply(axis, x_btd)


def join(axis: Axis, x_btd: Tensor) -> Tensor:
    """Split along the sequence -> replicated, for computations that every rank repeats."""
    return _Join.apply(axis, x_btd)

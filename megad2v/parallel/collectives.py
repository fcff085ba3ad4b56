"""Collectives over the tensor-parallel ranks, with their gradients (Megatron-LM's f, g and their sequence forms).

Activations are either replicated (equal to the bit on all ranks of the group) or split over ranks along the sequence,
dimension 1 of (B, T, D), whose length the group's size divides. Per call and rank, with n bytes of a replicated tensor:

                      forward                      backward
    copy              nothing                      all-reduce n: the sum of what each rank's slice contributes
    reduce            all-reduce n                 nothing
    gather            all-gather n                 reduce-scatter n
    reduce_scatter    reduce-scatter n             all-gather n
    split             nothing                      all-gather n
    join              all-gather n                 nothing
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megad2v.parallel.topology import Axis

SEQUENCE = 1
"""The dimension that sequence parallelism splits."""


def all_reduce(x: Tensor, axis: Axis, *, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
    """The sum over the axis in a contiguous tensor (`x` itself if it is one), and the work to wait for."""
    x = x.contiguous()
    return x, dist.all_reduce(x, group=axis.group, async_op=async_op)


def all_gather(x_btd: Tensor, axis: Axis) -> Tensor:
    """(B, T / size, D) -> (B, T, D), chunks in rank order."""
    gathered = x_btd.new_empty(axis.size * x_btd.shape[0], *x_btd.shape[1:])  # the form that gloo and NCCL both take
    dist.all_gather_into_tensor(gathered, x_btd.contiguous(), group=axis.group)
    return gathered.unflatten(0, (axis.size, -1)).movedim(0, SEQUENCE).flatten(SEQUENCE, SEQUENCE + 1)


def reduce_scatter(x_btd: Tensor, axis: Axis, *, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
    """(B, T, D), summed over the axis -> this rank's (B, T / size, D), and the work to wait for."""
    chunks = x_btd.unflatten(SEQUENCE, (axis.size, -1)).movedim(SEQUENCE, 0).flatten(0, 1).contiguous()
    own = x_btd.new_empty(x_btd.shape[0], *chunks.shape[1:])
    return own, dist.reduce_scatter_tensor(own, chunks, group=axis.group, async_op=async_op)


def own_chunk(x_btd: Tensor, axis: Axis) -> Tensor:
    """(B, T, D) -> this rank's (B, T / size, D); nothing is sent."""
    return x_btd.chunk(axis.size, SEQUENCE)[axis.rank].contiguous()


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.shapes = axis, [tensor.shape for tensor in tensors]
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        if len(gradients) == 1:
            return None, all_reduce(gradients[0].clone(), ctx.axis)[0]
        # One message for all.
        total, _ = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), ctx.axis)
        parts = total.split([shape.numel() for shape in ctx.shapes])
        return None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, x: Tensor) -> Tensor:
        return all_reduce(x.clone(), axis)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, gradient


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, x_btd: Tensor) -> Tensor:
        ctx.axis = axis
        return all_gather(x_btd, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, reduce_scatter(gradient, ctx.axis)[0]


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, x_btd: Tensor) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x_btd, axis)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, all_gather(gradient, ctx.axis)


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, x_btd: Tensor) -> Tensor:
        ctx.axis = axis
        return own_chunk(x_btd, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, all_gather(gradient, ctx.axis)


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, x_btd: Tensor) -> Tensor:
        ctx.axis = axis
        return all_gather(x_btd, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, own_chunk(gradient, ctx.axis)


def copy(axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Replicated tensors (activations, or parameters) that each rank uses in a computation of its own."""
    return _Copy.apply(axis, *tensors)


def reduce(axis: Axis, x: Tensor) -> Tensor:
    """Partial sums -> their replicated sum."""
    return _Reduce.apply(axis, x)


def gather(axis: Axis, x_btd: Tensor) -> Tensor:
    """Split along the sequence -> whole, for a computation with this rank's slice of a layer."""
    return _Gather.apply(axis, x_btd)


def reduce_scatter_sequence(axis: Axis, x_btd: Tensor) -> Tensor:
    """Partial sums of the whole sequence -> this rank's chunk of their sum."""
    return _ReduceScatter.apply(axis, x_btd)


def split(axis: Axis, x_btd: Tensor) -> Tensor:
    """Replicated -> this rank's chunk of the sequence."""
    return _Split.apply(axis, x_btd)


def join(axis: Axis, x_btd: Tensor) -> Tensor:
    """Split along the sequence -> replicated, for computations that every rank repeats."""
    return _Join.apply(axis, x_btd)

"""Megatron-LM's tensor parallelism for the layers of `models.layers` (Shoeybi et al. 2019, arXiv:1909.08053), with
sequence parallelism of what lies between them (Korthikanti et al. 2022, arXiv:2205.05198) as an option.

    residual stream  ->  norm  ->  column-parallel (heads, hidden units)  ->  row-parallel  ->  + residual
    replicated, or split along the sequence                                                  replicated, or split

A rank's parameters are rows of the full ones, so they start as slices of what one process starts with. Per block and
micro-batch, forward and backward each make two all-reduces of an activation (B, T, D). Under sequence parallelism each
becomes an all-gather and a reduce-scatter, together as many bytes; backward gathers the two inputs once more, and sums
the gradients of replicated parameters, one small all-reduce for the pair of a norm. In backward the message travels
while the weight's gradient is computed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from megad2v.models.initialise import Initialiser
from megad2v.models.layers import (
    ColumnLinear,
    Embedding,
    LayerNorm,
    LayerScale,
    QKVLinear,
    RowLinear,
    Share,
    VanillaLayers,
)
from megad2v.parallel import collectives
from megad2v.parallel.rng import split_draws
from megad2v.parallel.sharding import mark_split
from megad2v.parallel.topology import Axis


def _share(total: int, axis: Axis, what: str) -> int:
    """An equal share. Raises ValueError where there is none."""
    if total % axis.size:
        raise ValueError(f"{total} {what} cannot be split equally over {axis.size} tensor-parallel ranks")
    return total // axis.size


class _ColumnProduct(Function):
    """y = x W^T + b with this rank's rows of W. x is replicated, or split along the sequence and gathered for the
    product (then gathered again in backward rather than kept). Weight first: under ZeRO-3 autograd keeps the parameter
    itself, which is gathered anew for backward."""

    @staticmethod
    def forward(ctx: Any, axis: Axis, sequence: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.axis, ctx.sequence, ctx.with_bias = axis, sequence, bias is not None
        ctx.save_for_backward(x, weight)
        whole = collectives.in_sequence(collectives.all_gather(x, axis), axis) if sequence else x
        return F.linear(whole, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        arriving = collectives.all_gather(x, ctx.axis) if ctx.sequence else None
        send = collectives.reduce_scatter if ctx.sequence else collectives.all_reduce
        x_gradient = send(gradient @ weight, ctx.axis)
        whole = x if arriving is None else collectives.in_sequence(arriving, ctx.axis)
        flat = gradient.flatten(0, -2)
        weight_gradient = flat.t() @ whole.flatten(0, -2)
        bias_gradient = flat.sum(0) if ctx.with_bias else None
        return None, None, collectives.wait(x_gradient), weight_gradient, bias_gradient


class ColumnParallelLinear(ColumnLinear):
    """Each rank computes its share of the outputs."""

    def __init__(
        self,
        axis: Axis,
        sequence: bool,
        inputs: int,
        outputs: int,
        *,
        weight: Initialiser,
        bias: Initialiser | None,
    ) -> None:
        rows = _share(outputs, axis, "outputs")
        super().__init__(inputs, rows, weight=weight, bias=bias)
        self.product = partial(_ColumnProduct.apply, axis, sequence)
        for parameter in self.parameters(recurse=False):
            mark_split(parameter, outputs, axis.rank * rows)

    def forward(self, x_btd: Tensor) -> Tensor:
        """(B, T, in), or (B, T / size, in) under sequence parallelism -> (B, T, out / size)."""
        return self.product(x_btd, self.weight, self.bias)


class QKVParallelLinear(QKVLinear):
    """Each rank computes its share of the heads."""

    def __init__(self, axis: Axis, sequence: bool, width: int, heads: int, *, bias: str, weight: Initialiser) -> None:
        head_dim, own = width // heads, _share(heads, axis, "heads")
        super().__init__(width, own, head_dim, bias=bias, weight=weight)
        self.product = partial(_ColumnProduct.apply, axis, sequence)
        for parameter in self.parameters(recurse=False):
            mark_split(parameter, parameter.shape[0] * axis.size, axis.rank * parameter.shape[0])

    def linear(self, x_btd: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, T, D), or (B, T / size, D) under sequence parallelism -> (B, T, 3 D / size)."""
        return self.product(x_btd, weight, bias)


class RowParallelLinear(RowLinear):
    """Each rank multiplies its share of the inputs; the partial products are summed, then the bias is added once."""

    def __init__(
        self,
        axis: Axis,
        sequence: bool,
        inputs: int,
        outputs: int,
        *,
        weight: Initialiser,
        bias: Initialiser | None,
    ) -> None:
        rows = _share(inputs, axis, "inputs")
        super().__init__(rows, outputs, weight=weight, bias=bias)
        self.axis, self.sequence = axis, sequence
        mark_split(self.weight, inputs, axis.rank * rows)

    def forward(self, x_btd: Tensor) -> Tensor:
        """(B, T, in / size) -> (B, T, out), or (B, T / size, out) under sequence parallelism."""
        partial_btd = torch.mm(x_btd.flatten(0, -2), self.weight).view(*x_btd.shape[:-1], -1)
        bias = self.bias
        if self.sequence:
            y_btd = collectives.reduce_scatter_sequence(self.axis, partial_btd)
            if bias is not None:
                bias = collectives.copy(self.axis, bias)
        else:
            y_btd = collectives.reduce(self.axis, partial_btd)
        return y_btd if bias is None else y_btd + bias


class VocabParallelEmbedding(Embedding):
    """Each rank holds a range of the vocabulary: ceil(vocabulary / size) rows, the last ranks what is left.

    All tables have as many rows, the last ones zeros that no id points to: were they shorter, whatever lies behind them
    in ZeRO's flat buffers would be cut elsewhere on every rank, and kernels that treat the end of a buffer otherwise
    than its middle let copies of the other parameters drift apart (seen on CPUs: 7e-9 within 20 steps).
    """

    def __init__(self, axis: Axis, vocabulary: int, width: int, *, weight: Initialiser) -> None:
        rows = -(-vocabulary // axis.size)
        self.first = min(axis.rank * rows, vocabulary)
        self.last = min(self.first + rows, vocabulary)
        if self.first == self.last:
            raise ValueError(f"a vocabulary of {vocabulary} leaves nothing to rank {axis.rank} of {axis.size}")
        super().__init__(rows, width, weight=weight)
        self.axis = axis
        mark_split(self.weight, vocabulary, self.first)

    def forward(self, ids_bt: Tensor) -> Tensor:
        """int64 (B, T) -> (B, T, D), replicated: zeros for words of other ranks, then a sum."""
        elsewhere_bt = (ids_bt < self.first) | (ids_bt >= self.last)
        own_btd = F.embedding((ids_bt - self.first).masked_fill(elsewhere_bt, 0), self.weight)
        return collectives.reduce(self.axis, own_btd.masked_fill(elsewhere_bt.unsqueeze(-1), 0))


class TensorParallelLayers:
    """The `Layers` of a group of ranks."""

    def __init__(self, axis: Axis, *, sequence: bool) -> None:
        self.axis, self.sequence = axis, sequence
        self.sequence_multiple = axis.size if sequence else 1

    def column(self, inputs: int, outputs: int, *, weight: Initialiser, bias: Initialiser | None) -> nn.Module:
        """A `ColumnParallelLinear`."""
        return ColumnParallelLinear(self.axis, self.sequence, inputs, outputs, weight=weight, bias=bias)

    def row(self, inputs: int, outputs: int, *, weight: Initialiser, bias: Initialiser | None) -> nn.Module:
        """A `RowParallelLinear`."""
        return RowParallelLinear(self.axis, self.sequence, inputs, outputs, weight=weight, bias=bias)

    def qkv(self, width: int, heads: int, *, bias: str, weight: Initialiser) -> nn.Module:
        """A `QKVParallelLinear`."""
        return QKVParallelLinear(self.axis, self.sequence, width, heads, bias=bias, weight=weight)

    def head_table(self, heads: int, entries: int) -> nn.Parameter:
        """This rank's heads' rows."""
        own = _share(heads, self.axis, "heads")
        table = nn.Parameter(torch.empty(own, entries))
        mark_split(table, heads, self.axis.rank * own)
        return table

    def norm(self, width: int, eps: float) -> nn.Module:
        """A replicated norm; over a part of the sequence its gradient is summed over ranks."""
        return LayerNorm(width, eps, *self._shared())

    def scale(self, width: int, initial: float) -> nn.Module:
        """A replicated scale, as `norm`."""
        return LayerScale(width, initial, *self._shared())

    def embedding(self, vocabulary: int, width: int, *, weight: Initialiser) -> nn.Module:
        """A `VocabParallelEmbedding`."""
        return VocabParallelEmbedding(self.axis, vocabulary, width, weight=weight)

    def split_sequence(self, x_btd: Tensor) -> Tensor:
        """(B, T, D) -> (B, T / size, D) under sequence parallelism."""
        return collectives.split(self.axis, x_btd) if self.sequence else x_btd

    def join_sequence(self, x_btd: Tensor) -> Tensor:
        """(B, T / size, D) under sequence parallelism -> (B, T, D)."""
        return collectives.join(self.axis, x_btd) if self.sequence else x_btd

    def head_draws(self) -> AbstractContextManager[None]:
        """Heads are split: numbers of this rank's own."""
        return split_draws(self.axis)

    def residual_draws(self) -> AbstractContextManager[None]:
        """The residual stream is split only under sequence parallelism."""
        return split_draws(self.axis) if self.sequence else nullcontext()

    def _shared(self) -> tuple[Share, ...]:
        return (self._share,) if self.sequence else ()

    def _share(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Replicated vectors of one length; one message for all their gradients."""
        if len(vectors) == 1:  # compiled, a stack of one lets backward write its result into the parameter (torch 2.13)
            return (collectives.copy(self.axis, vectors[0]),)
        return collectives.copy(self.axis, torch.stack(vectors)).unbind()


def layers_for(axis: Axis, *, sequence: bool) -> VanillaLayers | TensorParallelLayers:
    """Plain layers where nothing is split."""
    return VanillaLayers() if axis.size == 1 else TensorParallelLayers(axis, sequence=sequence)

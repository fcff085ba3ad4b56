"""The layers a model is built from, at tensor-parallel size 1.

Models take a `Layers` and never ask how wide a rank's slice is: `parallel/` offers the same constructors with the
weights split over ranks. Weights are laid out with the dimension that would be split FIRST (column: outputs, row:
inputs), so that any slice, tensor-parallel or ZeRO, is one contiguous range of the flattened full tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megad2v.models.initialise import Initialiser, constant, zeros


class ColumnLinear(nn.Module):
    """y = x W^T + b with W (out, in); under tensor parallelism each rank holds some outputs."""

    def __init__(self, inputs: int, outputs: int, *, weight: Initialiser, bias: Initialiser | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias is not None else None
        self.initialisers = {"weight": weight, "bias": bias}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    """y = x W + b with W (in, out); under tensor parallelism each rank holds some inputs."""

    def __init__(self, inputs: int, outputs: int, *, weight: Initialiser, bias: Initialiser | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias is not None else None
        self.initialisers = {"weight": weight, "bias": bias}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        # addmm on the parameter itself: a transposed view saved for backward would keep a gathered ZeRO-3 weight alive.
        flat = x.flatten(0, -2)
        y = torch.mm(flat, self.weight) if self.bias is None else torch.addmm(self.bias, flat, self.weight)
        return y.view(*x.shape[:-1], -1)


class QKVLinear(nn.Module):
    """Query, key and value in one product, laid out (heads, 3, head_dim) so that a rank's heads are contiguous.

    `bias`: "full" (3 per head), "no_key" (query and value only: a bias on the key changes no softmax) or "none".
    """

    def __init__(self, width: int, heads: int, head_dim: int, *, bias: str, weight: Initialiser) -> None:
        super().__init__()
        self.heads, self.head_dim, self.bias_kind = heads, head_dim, bias
        self.weight = nn.Parameter(torch.empty(heads * 3 * head_dim, width))
        biases = {"full": 3, "no_key": 2, "none": 0}[bias]
        self.bias = nn.Parameter(torch.empty(heads * biases * head_dim)) if biases else None
        self.initialisers = {"weight": weight, "bias": zeros}

    def linear(self, x_btd: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product; tensor parallelism sends around it."""
        return F.linear(x_btd, weight, bias)

    def forward(self, x_btd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> query, key, value, each (B, heads, T, head_dim)."""
        bias = self.bias
        if self.bias_kind == "no_key":
            qv = self.bias.view(self.heads, 2, self.head_dim)
            bias = torch.stack((qv[:, 0], torch.zeros_like(qv[:, 0]), qv[:, 1]), dim=1).flatten()
        qkv = self.linear(x_btd, self.weight, bias).unflatten(-1, (self.heads, 3, self.head_dim))
        return tuple(qkv.permute(3, 0, 2, 1, 4))


class Conv1d(nn.Module):
    """Convolution over time; never split over tensor-parallel ranks."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        weight: Initialiser,
        bias: Initialiser | None,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.groups = stride, padding, groups
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias is not None else None
        self.initialisers = {"weight": weight, "bias": bias}

    def forward(self, x_bct: Tensor) -> Tensor:
        """(B, in, T) -> (B, out, floor((T + 2 padding - kernel) / stride) + 1), in the weight's dtype."""
        x_bct = x_bct.to(self.weight.dtype)
        return F.conv1d(x_bct, self.weight, self.bias, self.stride, self.padding, groups=self.groups)


Share = Callable[..., tuple[Tensor, ...]]
"""How a layer that is not split uses its parameters: as they are (`unshared`), or, where each rank sees another part of
the sequence, through a function that sums their gradients over those ranks."""


def unshared(*parameters: Tensor) -> tuple[Tensor, ...]:
    """The parameters themselves."""
    return parameters


class LayerNorm(nn.Module):
    """Affine layer norm over channels; apex's fused kernel on GPUs where apex is installed, else torch's."""

    def __init__(self, width: int, eps: float, share: Share = unshared) -> None:
        super().__init__()
        self.width, self.eps, self.share = width, eps, share
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.initialisers = {"weight": constant(1.0), "bias": zeros}

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return layer_norm(x, *self.share(self.weight, self.bias), self.eps)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, width: int, initial: float, share: Share = unshared) -> None:
        super().__init__()
        self.share = share
        self.gamma = nn.Parameter(torch.empty(width))
        self.initialisers = {"gamma": constant(initial)}

    def forward(self, x_btd: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return x_btd * self.share(self.gamma)[0]


class Embedding(nn.Module):
    """Rows of a (vocabulary, D) table."""

    def __init__(self, vocabulary: int, width: int, *, weight: Initialiser) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.initialisers = {"weight": weight}

    def forward(self, ids_bt: Tensor) -> Tensor:
        """int64 (B, T) -> (B, T, D)."""
        return F.embedding(ids_bt, self.weight)


def _apex_layer_norm() -> object | None:
    try:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine
    except ImportError:
        return None
    return fused_layer_norm_affine


APEX_LAYER_NORM = _apex_layer_norm()
"""apex's fused affine layer norm, or None; the start-up report names which one runs."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The one place that chooses a layer-norm kernel."""
    if APEX_LAYER_NORM is not None and x.is_cuda:
        return APEX_LAYER_NORM(x, weight, bias, weight.shape, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class Layers(Protocol):
    """What a model asks of whoever splits its layers, and its activations between them."""

    sequence_multiple: int
    """What the encoder's sequence length is padded to a multiple of."""

    def column(self, inputs: int, outputs: int, *, weight: Initialiser, bias: Initialiser | None) -> nn.Module: ...

    def row(self, inputs: int, outputs: int, *, weight: Initialiser, bias: Initialiser | None) -> nn.Module: ...

    def qkv(self, width: int, heads: int, *, bias: str, weight: Initialiser) -> nn.Module: ...

    def head_table(self, heads: int, entries: int) -> nn.Parameter:
        """A parameter (heads, entries), of which a rank holds its own heads' rows."""

    def norm(self, width: int, eps: float) -> nn.Module: ...

    def scale(self, width: int, initial: float) -> nn.Module: ...

    def embedding(self, vocabulary: int, width: int, *, weight: Initialiser) -> nn.Module: ...

    def split_sequence(self, x_btd: Tensor) -> Tensor:
        """Before the first block: this rank's part of the residual stream."""

    def join_sequence(self, x_btd: Tensor) -> Tensor:
        """After the last: the whole of it, on every rank."""

    def head_draws(self) -> AbstractContextManager[None]:
        """Around random draws on tensors that are split by heads."""

    def residual_draws(self) -> AbstractContextManager[None]:
        """Around random draws per element of the residual stream."""


class VanillaLayers:
    """Everything on one rank (tensor-parallel size 1)."""

    sequence_multiple = 1
    column = staticmethod(ColumnLinear)
    row = staticmethod(RowLinear)
    norm = staticmethod(LayerNorm)
    scale = staticmethod(LayerScale)
    embedding = staticmethod(Embedding)
    head_draws = staticmethod(nullcontext)
    residual_draws = staticmethod(nullcontext)

    @staticmethod
    def qkv(width: int, heads: int, *, bias: str, weight: Initialiser) -> QKVLinear:
        """All heads."""
        return QKVLinear(width, heads, width // heads, bias=bias, weight=weight)

    @staticmethod
    def head_table(heads: int, entries: int) -> nn.Parameter:
        """All rows."""
        return nn.Parameter(torch.empty(heads, entries))

    @staticmethod
    def split_sequence(x_btd: Tensor) -> Tensor:
        """All of it."""
        return x_btd

    join_sequence = split_sequence

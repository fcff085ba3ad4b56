"""One Transformer block, pre- or post-norm."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megad2v.models.attention import Attention
from megad2v.models.initialise import Initialiser, zeros
from megad2v.models.layers import Layers


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(
        self, layers: Layers, width: int, hidden: int, *, weight: Initialiser, output_weight: Initialiser
    ) -> None:
        super().__init__()
        self.input = layers.column(width, hidden, weight=weight, bias=zeros)
        self.output = layers.row(hidden, width, weight=output_weight, bias=zeros)

    def forward(self, x_btd: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.output(F.gelu(self.input(x_btd)))


def drop_path(x_btd: Tensor, rate: float, training: bool) -> Tensor:
    """Zero a residual branch for whole samples with probability `rate`, scaling the others up (stochastic depth)."""
    if rate == 0.0 or not training:
        return x_btd
    keep = torch.empty(x_btd.shape[0], 1, 1, device=x_btd.device).bernoulli_(1.0 - rate)
    return x_btd * (keep / (1.0 - rate)).to(x_btd.dtype)


@dataclass(frozen=True)
class NormSpec:
    """Where the norms of a block stand, and what they are."""

    place: Literal["pre", "post"]
    eps: float
    layer_scale: float | None = None
    """Initial value of the scale on each branch; None: none."""


class BlockNorms(nn.Module):
    """Norms and layer scales of a block's two branches."""

    def __init__(self, layers: Layers, width: int, spec: NormSpec) -> None:
        super().__init__()
        self.pre_norm = spec.place == "pre"
        self.attention_norm, self.mlp_norm = layers.norm(width, spec.eps), layers.norm(width, spec.eps)
        self.attention_scale, self.mlp_scale = nn.Identity(), nn.Identity()
        if spec.layer_scale is not None:
            self.attention_scale = layers.scale(width, spec.layer_scale)
            self.mlp_scale = layers.scale(width, spec.layer_scale)


class Block(BlockNorms):
    """Attention and MLP, each a residual branch.

    pre:  a = branch(attn(LN1 x));  x += a;  f = branch(mlp(LN2 x));  x += f
    post: a = attn x;  x = LN1(r x + branch a);  f = mlp x;  x = LN2(r x + branch f)
    with branch = layer scale, dropout, drop path (spec 1.4, 3.2), and r = `residual_scale`: 1, or DeepNorm's.

    `norms` by modality: norms, their place and layer scales are each one's own, attention and MLP are all's (ours).
    """

    def __init__(
        self,
        layers: Layers,
        *,
        width: int,
        heads: int,
        hidden: int,
        norms: NormSpec | Mapping[str, NormSpec],
        qkv_bias: str,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
        weight: Initialiser,
        output_weight: Initialiser,
        qkv_weight: Initialiser | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        if isinstance(norms, NormSpec):
            super().__init__(layers, width, norms)
        else:
            nn.Module.__init__(self)
            self.parts = nn.ModuleDict({name: BlockNorms(layers, width, spec) for name, spec in norms.items()})
        self.has_parts = not isinstance(norms, NormSpec)
        self.residual_scale = residual_scale
        self.dropout, self.drop_path = dropout, drop_path
        self.draws = layers.residual_draws if dropout else nullcontext
        self.attention = Attention(
            layers,
            width,
            heads,
            qkv_bias=qkv_bias,
            dropout=attention_dropout,
            weight=qkv_weight or weight,
            output_weight=output_weight,
        )
        self.mlp = MLP(layers, width, hidden, weight=weight, output_weight=output_weight)

    def _drop(self, x_btd: Tensor) -> Tensor:
        with self.draws():
            x_btd = F.dropout(x_btd, self.dropout, self.training)
        return drop_path(x_btd, self.drop_path, self.training)

    def forward(
        self, x_btd: Tensor, bias: Tensor | None, tensor: str = "block", part: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D), logit bias broadcastable to (B, heads, T, T) -> the block's output and its `tensor`, (B, T, D).

        `tensor`: "attention" and "ffn" are a and f above, "ffn_residual" the sum behind f, "block" the output. Sources
        take f after layer scale and drop path for vision (pre), before dropout for speech and text (post). `part`: the
        modality whose norms are used, where they are not all's.
        """
        norms = self.parts[part] if self.has_parts else self
        if norms.pre_norm:
            attention = self._drop(norms.attention_scale(self.attention(norms.attention_norm(x_btd), bias)))
            x_btd = x_btd + attention
            branch = self._drop(norms.mlp_scale(self.mlp(norms.mlp_norm(x_btd))))
            output = total = x_btd + branch
        else:
            attention = norms.attention_scale(self.attention(x_btd, bias))
            x_btd = norms.attention_norm(self._residual(x_btd) + self._drop(attention))
            branch = norms.mlp_scale(self.mlp(x_btd))
            total = self._residual(x_btd) + self._drop(branch)
            output = norms.mlp_norm(total)
        return output, {"attention": attention, "ffn": branch, "ffn_residual": total, "block": output}[tensor]

    def _residual(self, x_btd: Tensor) -> Tensor:
        return x_btd if self.residual_scale == 1.0 else self.residual_scale * x_btd

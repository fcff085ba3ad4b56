"""One Transformer block, pre- or post-norm."""

from __future__ import annotations

from contextlib import nullcontext

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


class Block(nn.Module):
    """Attention and MLP, each a residual branch. Returns the block's output and the MLP branch before its sum.

    pre:  x += branch(attn(LN1 x));  f = branch(mlp(LN2 x));  x += f      branch = layer scale, dropout, drop path
    post: x = LN1(x + branch(attn x));  f = mlp x;  x = LN2(x + branch f)
    Spec 1.4, 3.2. The second tensor is `f`: data2vec's FFN target. Sources differ in where it is taken: after layer
    scale and drop path for vision (pre), before dropout for speech and text (post).
    """

    def __init__(
        self,
        layers: Layers,
        *,
        width: int,
        heads: int,
        hidden: int,
        norm: str,
        eps: float,
        qkv_bias: str,
        layer_scale: float | None,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
        weight: Initialiser,
        output_weight: Initialiser,
    ) -> None:
        super().__init__()
        self.pre_norm = norm == "pre"
        self.dropout, self.drop_path = dropout, drop_path
        self.draws = layers.residual_draws if dropout else nullcontext
        self.attention_norm = layers.norm(width, eps)
        self.attention = Attention(
            layers,
            width,
            heads,
            qkv_bias=qkv_bias,
            dropout=attention_dropout,
            weight=weight,
            output_weight=output_weight,
        )
        self.mlp_norm = layers.norm(width, eps)
        self.mlp = MLP(layers, width, hidden, weight=weight, output_weight=output_weight)
        scaled = layer_scale is not None
        self.attention_scale = layers.scale(width, layer_scale) if scaled else nn.Identity()
        self.mlp_scale = layers.scale(width, layer_scale) if scaled else nn.Identity()

    def _drop(self, x_btd: Tensor) -> Tensor:
        with self.draws():
            x_btd = F.dropout(x_btd, self.dropout, self.training)
        return drop_path(x_btd, self.drop_path, self.training)

    def forward(self, x_btd: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D), logit bias broadcastable to (B, heads, T, T) -> block output, FFN branch; both (B, T, D)."""
        if self.pre_norm:
            x_btd = x_btd + self._drop(self.attention_scale(self.attention(self.attention_norm(x_btd), bias)))
            branch = self._drop(self.mlp_scale(self.mlp(self.mlp_norm(x_btd))))
            return x_btd + branch, branch
        x_btd = self.attention_norm(x_btd + self._drop(self.attention_scale(self.attention(x_btd, bias))))
        branch = self.mlp_scale(self.mlp(x_btd))
        return self.mlp_norm(x_btd + self._drop(branch)), branch

"""The Transformer encoder: what the teacher averages."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megad2v.models.attention import RelativePositionBias
from megad2v.models.block import Block
from megad2v.models.initialise import FAIRSEQ, Initialiser, scaled
from megad2v.models.layers import Layers, VanillaLayers


class Encoder(nn.Module):
    """Blocks with a shared relative position bias; one affine norm after the last block (pre-norm) or before the
    first (post-norm).

    `grid` is the side of the patch grid for the relative bias, None without one.
    `weight` starts every matrix; in pre-norm models output weights of block l (from 1) start divided by sqrt(2 l), as
    BEiT and fairseq do.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        norm: Literal["pre", "post"],
        eps: float,
        qkv_bias: str = "full",
        layer_scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        grid: int | None = None,
        weight: Initialiser = FAIRSEQ.encoder,
        layers: Layers | None = None,
    ) -> None:
        super().__init__()
        self.layers = layers = layers or VanillaLayers()
        self.pre_norm = norm == "pre"
        self.relative_bias = RelativePositionBias(layers, grid, heads) if grid is not None else None
        rates = [drop_path * position / max(1, depth - 1) for position in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                layers,
                width=width,
                heads=heads,
                hidden=int(width * mlp_ratio),
                norm=norm,
                eps=eps,
                qkv_bias=qkv_bias,
                layer_scale=layer_scale,
                dropout=dropout,
                attention_dropout=attention_dropout,
                drop_path=rate,
                weight=weight,
                output_weight=scaled(weight, 1.0 / math.sqrt(2 * number)) if self.pre_norm else weight,
            )
            for number, rate in enumerate(rates, start=1)
        )
        self.norm = layers.norm(width, eps)

    def _logit_bias(self, x_btd: Tensor, padding_bt: Tensor | None, extra: int) -> Tensor | None:
        """`extra` positions follow the sequence; nobody attends to them."""
        bias = None
        if self.relative_bias is not None:
            bias = F.pad(self.relative_bias(), (0, extra, 0, extra)).to(x_btd.dtype)
        if extra:
            # One row serves all samples where none has padding of its own.
            real_bt = x_btd.new_zeros(1, x_btd.shape[1], dtype=torch.bool) if padding_bt is None else padding_bt
            padding_bt = F.pad(real_bt, (0, extra), value=True)
        if padding_bt is None:
            return bias
        hidden = torch.zeros(padding_bt.shape, dtype=x_btd.dtype, device=x_btd.device)
        hidden = hidden.masked_fill(padding_bt, float("-inf"))[:, None, None, :]
        return hidden if bias is None else bias + hidden

    def forward(
        self,
        x_btd: Tensor,
        padding_bt: Tensor | None = None,
        *,
        last: int = 0,
        tensor: str = "block",
        run: Collection[int] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode. Returns the normalised output (B, T, D) and the `tensor` ("block" output or "ffn" branch) of the
        `last` blocks, bottom up, each (B, T, D). `padding_bt` is True where a position is padding. `run` are the blocks
        (from 0) that layer drop left in, None for all: another one is passed over as a whole, and yields no tensor.
        """
        length = x_btd.shape[1]
        extra = -length % self.layers.sequence_multiple
        bias = self._logit_bias(x_btd, padding_bt, extra)
        x_btd = self.layers.split_sequence(F.pad(x_btd, (0, 0, 0, extra)) if extra else x_btd)
        if not self.pre_norm:
            x_btd = self.norm(x_btd)
        kept: list[Tensor] = []
        for position, block in enumerate(self.blocks, start=1):
            if run is not None and position - 1 not in run:
                continue
            x_btd, branch = block(x_btd, bias)
            if position > len(self.blocks) - last:
                kept.append(x_btd if tensor == "block" else branch)
        x_btd = self.norm(x_btd) if self.pre_norm else x_btd
        return self._whole(x_btd, length), [self._whole(layer_btd, length) for layer_btd in kept]

    def _whole(self, x_btd: Tensor, length: int) -> Tensor:
        """The sequence without what was added to its end."""
        return self.layers.join_sequence(x_btd)[:, :length]

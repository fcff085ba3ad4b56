"""The Transformer encoder: what the teacher averages."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megad2v.models.attention import RelativePositionBias
from megad2v.models.block import Block, NormSpec
from megad2v.models.initialise import FAIRSEQ, Initialiser, scaled, values_scaled
from megad2v.models.layers import Layers, VanillaLayers


def deep_norm_scales(depth: int) -> tuple[float, float]:
    """DeepNorm for an encoder of `depth` post-norm blocks (arXiv:2203.00555, section 4): the factor on the residual
    stream before each norm, and the one on the initial value, output and MLP weights."""
    return (2 * depth) ** 0.25, (8 * depth) ** -0.25


@dataclass(frozen=True)
class StackSpec:
    """The blocks of an encoder: everything but their norms.

    `weight` starts every matrix; in pre-norm models (`pre_norm`) output weights of block l (from 1) start divided by
    sqrt(2 l), as BEiT and fairseq do. `deep_norm`: see `deep_norm_scales`.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    pre_norm: bool
    qkv_bias: str = "full"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    weight: Initialiser = FAIRSEQ.encoder
    deep_norm: bool = False

    def blocks(self, layers: Layers, norms: NormSpec | Mapping[str, NormSpec]) -> nn.ModuleList:
        """One after the other, drop path ramping up to the last."""
        alpha, beta = deep_norm_scales(self.depth) if self.deep_norm else (1.0, 1.0)
        rates = [self.drop_path * position / max(1, self.depth - 1) for position in range(self.depth)]
        return nn.ModuleList(
            Block(
                layers,
                width=self.width,
                heads=self.heads,
                hidden=int(self.width * self.mlp_ratio),
                norms=norms,
                qkv_bias=self.qkv_bias,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
                drop_path=rate,
                weight=scaled(self.weight, beta),
                output_weight=scaled(self.weight, 1.0 / math.sqrt(2 * number) if self.pre_norm else beta),
                qkv_weight=values_scaled(self.weight, self.heads, beta),
                residual_scale=alpha,
            )
            for number, rate in enumerate(rates, start=1)
        )


@dataclass(frozen=True)
class PartSpec:
    """What of an encoder belongs to one modality.

    `grid` is the side of the patch grid for the relative bias, None without one. `positions` makes from (B, T, D) what
    is added to it before all else (speech's convolutions).
    """

    norms: NormSpec
    grid: int | None = None
    positions: nn.Module | None = None


class EncoderPart(nn.Module):
    """What stands around the blocks: positions, a relative position bias that all blocks share, and one affine norm
    after the last block (pre-norm) or before the first (post-norm, with dropout behind it)."""

    def __init__(self, layers: Layers, stack: StackSpec, spec: PartSpec, place: Literal["pre", "post"]) -> None:
        """`place` is where the blocks have their norms."""
        super().__init__()
        self.layers, self.dropout, self.pre_norm = layers, stack.dropout, place == "pre"
        self.positions = spec.positions
        self.relative_bias = RelativePositionBias(layers, spec.grid, stack.heads) if spec.grid is not None else None
        self.norm = layers.norm(stack.width, spec.norms.eps)

    def _logit_bias(
        self, x_btd: Tensor, padding_bt: Tensor | None, hidden_tt: Tensor | None, extra: int
    ) -> Tensor | None:
        """`extra` positions follow the sequence; nobody attends to them."""
        bias = None
        if self.relative_bias is not None:
            bias = F.pad(self.relative_bias(), (0, extra, 0, extra)).to(x_btd.dtype)
        if extra:
            # One row serves all samples where none has padding of its own.
            real_bt = x_btd.new_zeros(1, x_btd.shape[1], dtype=torch.bool) if padding_bt is None else padding_bt
            padding_bt = F.pad(real_bt, (0, extra), value=True)
        if hidden_tt is not None:
            bias = _add(bias, _blocked(F.pad(hidden_tt, (0, extra, 0, extra)), x_btd.dtype)[None, None])
        if padding_bt is not None:
            bias = _add(bias, _blocked(padding_bt, x_btd.dtype)[:, None, None, :])
        return bias

    def through(
        self,
        blocks: nn.ModuleList,
        x_btd: Tensor,
        padding_bt: Tensor | None = None,
        *,
        last: int = 0,
        tensor: str = "block",
        run: Collection[int] | None = None,
        hidden_tt: Tensor | None = None,
        part: str | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """What `Encoder.forward` says, by `blocks`; `part` is the modality that this is of, None for the only one."""
        length = x_btd.shape[1]
        extra = -length % self.layers.sequence_multiple
        bias = self._logit_bias(x_btd, padding_bt, hidden_tt, extra)
        if self.positions is not None:
            if padding_bt is not None:
                # Once, as fairseq and Hugging Face do: what padding holds does not matter, that it follows still does,
                # since of several convolutions the second sees what the first made of the zeros.
                x_btd = x_btd.masked_fill(padding_bt.unsqueeze(-1), 0)
            x_btd = x_btd + self.positions(x_btd)
        x_btd = self.layers.split_sequence(F.pad(x_btd, (0, 0, 0, extra)) if extra else x_btd)
        if not self.pre_norm:
            x_btd = self._dropped(self.norm(x_btd))
        kept: list[Tensor] = []
        for position, block in enumerate(blocks, start=1):
            if run is not None and position - 1 not in run:
                continue
            wanted = position > len(blocks) - last
            x_btd, kept_btd = block(x_btd, bias, tensor if wanted else "block", part)
            if wanted:
                kept.append(kept_btd)
        x_btd = self.norm(x_btd) if self.pre_norm else x_btd
        return self._whole(x_btd, length), [self._whole(layer_btd, length) for layer_btd in kept]

    def _dropped(self, x_btd: Tensor) -> Tensor:
        """Dropout on what enters the first block (post-norm models: spec 1.4, 2.3)."""
        with self.layers.residual_draws() if self.dropout else nullcontext():
            return F.dropout(x_btd, self.dropout, self.training)

    def _whole(self, x_btd: Tensor, length: int) -> Tensor:
        """The sequence without what was added to its end."""
        return self.layers.join_sequence(x_btd)[:, :length]


class Encoder(EncoderPart):
    """Blocks, and what stands around them."""

    def __init__(self, stack: StackSpec, part: PartSpec, layers: Layers | None = None) -> None:
        layers = layers or VanillaLayers()
        super().__init__(layers, stack, part, part.norms.place)
        self.blocks = stack.blocks(layers, part.norms)

    def forward(
        self,
        x_btd: Tensor,
        padding_bt: Tensor | None = None,
        *,
        last: int = 0,
        tensor: str = "block",
        run: Collection[int] | None = None,
        hidden_tt: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode. Returns the normalised output (B, T, D) and the `tensor` (see `Block.forward`) of the `last` blocks,
        bottom up, each (B, T, D). `padding_bt` is True where a position is padding. `run` are the blocks (from 0) that
        layer drop left in, None for all: another one is passed over as a whole, and yields no tensor. `hidden_tt` is
        True where a position (row) may not attend to another (column).
        """
        return self.through(self.blocks, x_btd, padding_bt, last=last, tensor=tensor, run=run, hidden_tt=hidden_tt)


class JointEncoder(nn.Module):
    """One stack of blocks for several modalities, each with a part of its own around it (ours)."""

    def __init__(
        self, stack: StackSpec, parts: Mapping[str, PartSpec], norms: NormSpec | None, layers: Layers | None = None
    ) -> None:
        """`norms` are those of the blocks for all modalities; None: each has its own there, too."""
        super().__init__()
        layers = layers or VanillaLayers()
        own = {name: spec.norms for name, spec in parts.items()}
        self.blocks = stack.blocks(layers, norms or own)
        self.parts = nn.ModuleDict(
            {name: EncoderPart(layers, stack, spec, (norms or spec.norms).place) for name, spec in parts.items()}
        )

    def forward(
        self, x_btd: Tensor, padding_bt: Tensor | None = None, *, part: str, **how: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """As `Encoder.forward`, with the norms and positions of modality `part`."""
        return self.parts[part].through(self.blocks, x_btd, padding_bt, part=part, **how)


def _blocked(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where True, else 0."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, float("-inf"))


def _add(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more

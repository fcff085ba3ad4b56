"""From a waveform to the encoder's input: convolutions, projection, mask token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megad2v.config.modalities import SpeechConfig
from megad2v.models.data2vec import FrontEnd
from megad2v.models.initialise import FAIRSEQ, InitScheme, constant, kaiming_normal, torch_default, uniform, zeros
from megad2v.models.layers import ColumnLinear, Conv1d, LayerNorm

EPS = 1e-5
"""Of the norms between convolutions. Not a setting: fairseq and Hugging Face both leave it at torch's default."""


class GroupNorm(nn.Module):
    """Each channel over the time of its sample (one group a channel), affine; padded time included, as in fairseq."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.initialisers = {"weight": constant(1.0), "bias": zeros}

    def forward(self, x_bct: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        return F.group_norm(x_bct, self.channels, self.weight, self.bias, EPS)


class ConvBlock(nn.Module):
    """Convolution without padding, norm ("layer" over channels, "group" over time, or None), exact GELU.

    fairseq casts to float32 for the norm. torch's kernels compute a norm of bf16 in float32 anyway and round once at
    the end, so here the cast, and its memory (the first layer has 3,200 frames a second), is left out.
    """

    def __init__(self, inputs: int, channels: int, kernel: int, stride: int, *, bias: bool, norm: str | None) -> None:
        super().__init__()
        fan_in = inputs * kernel
        self.conv = Conv1d(
            inputs,
            channels,
            kernel,
            stride=stride,
            weight=kaiming_normal(fan_in),
            bias=torch_default(fan_in) if bias else None,
        )
        self.over_channels = norm == "layer"
        self.norm = LayerNorm(channels, EPS) if norm == "layer" else GroupNorm(channels) if norm else nn.Identity()

    def forward(self, x_bct: Tensor) -> Tensor:
        """(B, in, T) -> (B, channels, floor((T - kernel) / stride) + 1)."""
        x_bct = self.conv(x_bct)
        if self.over_channels:
            # GELU comes last, as elsewhere: torch rounds it differently where memory lies differently.
            return F.gelu(self.norm(x_bct.transpose(1, 2)).transpose(1, 2))
        return F.gelu(self.norm(x_bct))


class SpeechFrontEnd(FrontEnd):
    """Convolutions, layer norm, projection to D, mask token at hidden frames (spec 1.2, 1.3).

    Positions are the encoder's (`ConvPositions`). There is no dropout: the released recipes set fairseq's dropout_input
    to 0, and its dropout_features is read by nothing.
    """

    def __init__(self, config: SpeechConfig, width: int, eps: float = EPS, scheme: InitScheme = FAIRSEQ) -> None:
        """`eps` is that of the norm before the projection."""
        super().__init__()
        # wav2vec 2.0's one group norm stands behind the first convolution.
        first, others = ("layer", "layer") if config.extractor_norm == "layer" else ("group", None)
        blocks, inputs = [], 1
        for number, (channels, kernel, stride) in enumerate(config.conv_layers):
            norm = others if number else first
            blocks.append(ConvBlock(inputs, channels, kernel, stride, bias=config.conv_bias, norm=norm))
            inputs = channels
        self.convolutions = nn.ModuleList(blocks)
        self.norm = LayerNorm(inputs, eps)
        weight, bias = scheme.front_end(inputs)
        self.projection = ColumnLinear(inputs, width, weight=weight, bias=bias)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.initialisers = {"mask_token": uniform(0.0, 1.0)}

    def forward(self, waveforms_bs: Tensor, mask_bt: Tensor | None) -> tuple[Tensor, Tensor]:
        """Waveforms of 16,000 samples a second, already normalised, (B, S) -> masked and clean view, each (B, T, D)
        with T = `frame_count(S)`.

        Without a mask the two are the same tensor.
        """
        x_bct = waveforms_bs.unsqueeze(1)
        for block in self.convolutions:
            x_bct = block(x_bct)
        clean_btd = self.projection(self.norm(x_bct.transpose(1, 2)))
        if mask_bt is None:
            return clean_btd, clean_btd
        return torch.where(mask_bt.unsqueeze(-1), self.mask_token.to(clean_btd.dtype), clean_btd), clean_btd

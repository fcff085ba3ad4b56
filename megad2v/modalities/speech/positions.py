"""Convolutional positions: what a frame's neighbourhood says about where it is."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megad2v.config.modalities import SpeechConfig
from megad2v.models.initialise import torch_default
from megad2v.models.layers import Conv1d

EPS = 1e-5
"""Of the norms without affine; not a setting in fairseq and Hugging Face either."""


class ConvPositions(nn.Module):
    """Grouped convolutions over time, each followed by a layer norm over channels without affine and exact GELU; what
    comes out is added to the frames (spec 1.4, step 2). No weight norm: that belongs to wav2vec 2.0's single layer.

    Under tensor parallelism every rank computes all of it, before the sequence is split: the same input, so the same
    gradient.
    """

    def __init__(self, config: SpeechConfig, width: int) -> None:
        super().__init__()
        kernel, groups = config.position_kernel, config.position_groups
        start = torch_default(width // groups * kernel)  # spec 1.5: torch's own, unlike the rest of the encoder
        self.layers = nn.ModuleList(
            Conv1d(width, width, kernel, padding=kernel // 2, groups=groups, weight=start, bias=start)
            for _ in range(config.position_depth)
        )

    def forward(self, x_btd: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        length = x_btd.shape[1]
        for conv in self.layers:
            # An even kernel makes one frame too many.
            y_btd = conv(x_btd.transpose(1, 2))[..., :length].transpose(1, 2)
            x_btd = F.gelu(F.layer_norm(y_btd, y_btd.shape[-1:], eps=EPS).transpose(1, 2)).transpose(1, 2)
        return x_btd

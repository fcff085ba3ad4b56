"""Regression heads: from the student's output at masked positions to the teacher's space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megad2v.models.initialise import FAIRSEQ, InitScheme
from megad2v.models.layers import ColumnLinear


class HeadPerLayer(nn.Module):
    """One regression head for each of the K target layers (ablation, `targets.average` false)."""

    def __init__(self, width: int, depth: int, layers: int, scheme: InitScheme = FAIRSEQ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(regression_head(width, depth, scheme) for _ in range(layers))

    def forward(self, x_nd: Tensor) -> Tensor:
        """(n, D) -> (n, K, D)."""
        return torch.stack([head(x_nd) for head in self.heads], dim=1)


def regression_head(width: int, depth: int, scheme: InitScheme = FAIRSEQ) -> nn.Module:
    """depth 0: identity (fairseq vision), 1: Linear D-D (speech, published vision), 2: Linear D-2D, GELU, Linear 2D-D
    (text; spec 2.3)."""

    def linear(inputs: int, outputs: int) -> ColumnLinear:
        weight, bias = scheme.head(inputs)
        return ColumnLinear(inputs, outputs, weight=weight, bias=bias)

    if depth == 0:
        return nn.Identity()
    if depth == 1:
        return linear(width, width)
    return nn.Sequential(linear(width, 2 * width), nn.GELU(), linear(2 * width, width))

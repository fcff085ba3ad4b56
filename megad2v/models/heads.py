"""Regression heads: from the student's output at masked positions to the teacher's space."""

from __future__ import annotations

from torch import nn

from megad2v.models.initialise import FAIRSEQ, InitScheme
from megad2v.models.layers import ColumnLinear


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

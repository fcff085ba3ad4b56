"""Regression heads: from the student's output at masked positions to the teacher's space."""

from __future__ import annotations

from torch import nn

from megad2v.models.initialise import torch_default
from megad2v.models.layers import ColumnLinear


def regression_head(width: int, depth: int) -> nn.Module:
    """depth 0: identity (fairseq vision), 1: Linear D-D (speech, published vision), 2: Linear D-2D, GELU, Linear 2D-D
    (text; spec 2.3). Starts from torch's default (spec 1.5)."""

    def linear(inputs: int, outputs: int) -> ColumnLinear:
        return ColumnLinear(inputs, outputs, weight=torch_default(inputs), bias=torch_default(inputs))

    if depth == 0:
        return nn.Identity()
    if depth == 1:
        return linear(width, width)
    return nn.Sequential(linear(width, 2 * width), nn.GELU(), linear(2 * width, width))

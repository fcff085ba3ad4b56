"""data2vec's objective: targets from the teacher's top layers, and the regression loss on masked positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STATISTICS_EPS = 1e-5
"""Epsilon of every target normalisation (spec, notation: LN0 and IN)."""


def normalise(x_btd: Tensor, kind: str) -> Tensor:
    """`layer`: over channels, `instance`: over time per sample and channel (biased variance), `none`; no affine."""
    if kind == "layer":
        return F.layer_norm(x_btd, x_btd.shape[-1:], eps=STATISTICS_EPS)
    if kind == "instance":
        return F.instance_norm(x_btd.transpose(1, 2), eps=STATISTICS_EPS).transpose(1, 2)
    return x_btd


def average_targets(layers_btd: Sequence[Tensor], *, layer_norm: str, average_norm: str) -> Tensor:
    """Normalise each of the K layer tensors (B, T, D), average them, normalise the average; float32 (B, T, D).

    Paper section 3.3; per recipe in spec 1.6, 2.5, 3.4. Extra tokens such as CLS must be cut off before: instance
    norm's statistics run over time.
    """
    total = torch.zeros_like(layers_btd[0], dtype=torch.float32)
    for layer_btd in layers_btd:
        total += normalise(layer_btd.float(), layer_norm)
    return normalise(total / len(layers_btd), average_norm)


def regression_loss(prediction_nd: Tensor, target_nd: Tensor, *, kind: str, beta: float, scale: str) -> Tensor:
    """Loss SUMMED over n masked positions and D channels, times the recipe's factor; float32 scalar.

    Divide by the number of masked positions of the whole optimizer step, over all ranks and micro-batches.
    `kind` "mse" or "smooth_l1" (quadratic below `beta`); `scale` "rsqrt_width" 1/sqrt(D), "mean" 1/D, "sum" 1.
    """
    prediction_nd, target_nd = prediction_nd.float(), target_nd.float()
    if kind == "mse":
        total = F.mse_loss(prediction_nd, target_nd, reduction="sum")
    else:
        total = F.smooth_l1_loss(prediction_nd, target_nd, reduction="sum", beta=beta)
    width = prediction_nd.shape[-1]
    return total * {"rsqrt_width": width**-0.5, "mean": 1.0 / width, "sum": 1.0}[scale]

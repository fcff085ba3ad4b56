"""data2vec's objective: targets from the teacher's top layers, and the regression loss on masked positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STATISTICS_EPS = 1e-5
"""Epsilon of every target normalisation (spec, notation: LN0 and IN)."""


def normalise(x_btd: Tensor, kind: str, padding_bt: Tensor | None = None) -> Tensor:
    """`layer`: over channels, `instance`: over time per sample and channel (biased variance), `none`; no affine.

    Instance norm leaves the positions of `padding_bt` (True: padding) out of its statistics.
    """
    if kind == "layer":
        return F.layer_norm(x_btd, x_btd.shape[-1:], eps=STATISTICS_EPS)
    if kind == "instance" and padding_bt is not None:
        real_bt1 = (~padding_bt).unsqueeze(-1).to(x_btd.dtype)
        count_b11 = real_bt1.sum(dim=1, keepdim=True).clamp_min(1)
        centred_btd = x_btd - (x_btd * real_bt1).sum(dim=1, keepdim=True) / count_b11
        variance_b1d = (centred_btd.square() * real_bt1).sum(dim=1, keepdim=True) / count_b11
        return centred_btd * torch.rsqrt(variance_b1d + STATISTICS_EPS)
    if kind == "instance":
        return F.instance_norm(x_btd.transpose(1, 2), eps=STATISTICS_EPS).transpose(1, 2)
    return x_btd


def layer_targets(
    layers_btd: Sequence[Tensor],
    *,
    layer_norm: str,
    average_norm: str,
    average: bool = True,
    padding_bt: Tensor | None = None,
) -> Tensor:
    """Normalise each of the K layer tensors (B, T, D), average them, normalise the average; float32 (B, T, D).

    Without `average` the K normalised layers themselves, (B, T, K, D), the second normalisation on each.
    Paper section 3.3; per recipe in spec 1.6, 2.5, 3.4. Extra tokens such as CLS must be cut off before: instance
    norm's statistics run over time.
    """
    normalised = (normalise(layer_btd.float(), layer_norm, padding_bt) for layer_btd in layers_btd)
    if not average:
        return torch.stack([normalise(layer_btd, average_norm, padding_bt) for layer_btd in normalised], dim=2)
    total = torch.zeros_like(layers_btd[0], dtype=torch.float32)
    for layer_btd in normalised:
        total += layer_btd
    return normalise(total / len(layers_btd), average_norm, padding_bt)


def regression_loss(prediction_nd: Tensor, target_nd: Tensor, *, kind: str, beta: float, scale: str) -> Tensor:
    """Loss SUMMED over n masked positions and D channels, times the recipe's factor; float32 scalar. Of (n, K, D), with
    a prediction for each of K layers, the mean over K.

    Divide by the number of masked positions of the whole optimizer step, over all ranks and micro-batches.
    `kind` "mse" or "smooth_l1" (quadratic below `beta`); `scale` "rsqrt_width" 1/sqrt(D), "mean" 1/D, "sum" 1.
    """
    prediction_nd, target_nd = prediction_nd.float(), target_nd.float()
    if kind == "mse":
        total = F.mse_loss(prediction_nd, target_nd, reduction="sum")
    else:
        total = F.smooth_l1_loss(prediction_nd, target_nd, reduction="sum", beta=beta)
    width = prediction_nd.shape[-1]
    layers = prediction_nd.shape[1] if prediction_nd.dim() == 3 else 1
    return total * ({"rsqrt_width": width**-0.5, "mean": 1.0 / width, "sum": 1.0}[scale] / layers)


def variance_loss(prediction_nd: Tensor, margin: float) -> Tensor:
    """VICReg's variance term (arXiv:2105.04906), as the BEiT fork has it: the mean over channels of
    max(0, margin - sqrt(var + 1e-6)), var the unbiased variance over the n rows; 0 where they are fewer than two. Of
    (n, K, D), the mean over the K heads."""
    if len(prediction_nd) < 2:
        return prediction_nd.float().sum() * 0.0
    return F.relu(margin - (prediction_nd.float().var(dim=0) + 1e-6).sqrt()).mean()

"""Sections of the configuration that say what is regressed, and how errors are weighed. See schema.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Norm = Literal["none", "layer", "instance"]


@dataclass(frozen=True)
class TargetsConfig:
    """What the teacher's layers become before the student regresses it."""

    layers: int = 3
    """K: how many of the teacher's last blocks are averaged."""
    tensor: Literal["attention", "ffn", "ffn_residual", "block"] = "block"
    """Which tensor of a block: the attention's output or the feed-forward network's, each before its residual sum, the
    sum behind the latter, or the block's output (which differs from that sum where norms come last)."""
    layer_norm: Norm = "none"
    """Normalisation of each layer before averaging: layer (over channels) or instance (over time)."""
    average_norm: Norm = "layer"
    """Normalisation of the average."""
    average: bool = True
    """Regress the average of the K layers. False (ablation): each layer by a projection of its own, model.head_layers
    deep, from the same features; the loss is the mean over layers."""
    padding: Literal["exclude", "include"] = "exclude"
    """Whether instance norm's statistics take in padded positions; fairseq includes them."""
    shuffle: bool = False
    """Control experiment: permute targets over the masked positions of the micro-batch, so nothing can be learned."""


@dataclass(frozen=True)
class LossConfig:
    """Regression loss, summed over masked positions and channels, divided by the step's global count of positions."""

    kind: Literal["mse", "smooth_l1"] = "smooth_l1"
    """Squared error, or smooth L1."""
    beta: float = 2.0
    """Where smooth L1 turns from quadratic to linear."""
    scale: Literal["rsqrt_width", "mean", "sum"] = "rsqrt_width"
    """Factor on the sum over channels: 1/sqrt(D) (fairseq), 1/D (BEiT fork: a plain mean), or 1."""
    variance_weight: float = 0.0
    """Weight of VICReg's variance term on the predictions of a micro-batch (BEiT fork var_w0): the mean over channels
    of max(0, variance_margin - standard deviation). Not in validation. 0 leaves it out, as all released models do."""
    variance_margin: float = 0.5
    """Standard deviation that the term asks for (BEiT fork var_margin0)."""

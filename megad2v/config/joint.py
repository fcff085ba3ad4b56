"""Several modalities in one run: what each has for itself. See schema.py, docs/joint.md.

The encoder's attention and MLPs are shared. Everything else that the modalities' recipes disagree on is a key of a
modality's part, and `of_modality` gives the configuration that a run of this modality alone would have: front ends,
transforms, plans, objectives and exports read that, and know nothing of joint runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megad2v.config.modalities import MaskConfig, MicroBatchConfig
from megad2v.config.objective import LossConfig, TargetsConfig


@dataclass(frozen=True)
class JointPartConfig:
    """What one modality has for itself, where it takes part (weight above 0). Front ends and augmentation are in the
    sections vision, augment, speech and text, as in a run of one modality."""

    weight: float = 0.0
    """Updates of this modality over those of the others; only ratios count. 0: it takes no part."""
    loss_weight: float = 1.0
    """Factor on this modality's gradient. Adam's moments are shared, so it weighs modalities against each other."""
    norm: Literal["pre", "post"] = "pre"
    """As model.norm, for this modality's pass through the blocks (joint.norms own)."""
    norm_eps: float = 1e-5
    """As model.norm_eps (joint.norms own)."""
    layer_scale: float | None = None
    """As model.layer_scale (joint.norms own)."""
    relative_bias: bool = False
    """As model.relative_bias: vision's table, which the others have not."""
    head_layers: int = 1
    """As model.head_layers: every modality has its own head."""
    scope: Literal["encoder", "model"] = "encoder"
    """As teacher.scope."""
    copied: tuple[Literal["positions", "norm"], ...] = ()
    """As teacher.copied, of this modality's positions and first norm."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    micro_batch: MicroBatchConfig = field(default_factory=lambda: MicroBatchConfig(samples=16))
    """As data.micro_batch."""
    bucket_ratio: float = 1.1
    """As data.bucket_ratio."""


@dataclass(frozen=True)
class JointConfig:
    """modality joint: one encoder for two or three modalities, one of them to an update. Ours, not the paper's.

    Of the sections model, mask, targets, loss, teacher and data, keys that a part has are read from the part.
    """

    norms: Literal["own", "shared"] = "own"
    """own: every modality has its own norms and layer scales in every block, placed as its recipe places them, so that
    the student seen by one modality is a data2vec model of that modality, and exports as one. shared: the blocks'
    norms, their place (model.norm), model.norm_eps and model.layer_scale are everybody's. Positions, and the one norm
    outside of the blocks, are a modality's own either way."""
    vision: JointPartConfig = field(default_factory=JointPartConfig)
    speech: JointPartConfig = field(default_factory=JointPartConfig)
    text: JointPartConfig = field(default_factory=JointPartConfig)

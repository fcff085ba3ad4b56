"""A joint configuration, seen by one of its modalities: the configuration that a run of that one alone would have."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from megad2v.config.joint import JointPartConfig
from megad2v.config.schema import Config

MODALITIES = ("vision", "speech", "text")
JOINT = "joint"

PART_KEYS = {
    "model": ("norm", "norm_eps", "layer_scale", "relative_bias", "head_layers"),
    "teacher": ("scope", "copied"),
    "data": ("micro_batch", "bucket_ratio"),
}
"""Keys of a section that a part has under the same name."""
PART_SECTIONS = ("mask", "targets", "loss")
"""Whole sections that a part has."""
NORM_KEYS = ("norm", "norm_eps", "layer_scale")
"""Of the model's keys those that joint.norms shared leaves to all."""


def modalities(config: Config) -> tuple[str, ...]:
    """The modalities of a run, in the order of `MODALITIES`."""
    if config.modality != JOINT:
        return (config.modality,)
    return tuple(modality for modality in MODALITIES if _part(config, modality).weight > 0)


def of_modality(config: Config, modality: str) -> Config:
    """The configuration of a run of `modality` alone that computes what the joint one does for it; `config` itself
    where it is of that modality. Patterns of shards stay maps."""
    if config.modality == modality:
        return config
    assert config.modality == JOINT, (config.modality, modality)
    part = _part(config, modality)
    sections: dict[str, Any] = {}
    for section, keys in PART_KEYS.items():
        shared = NORM_KEYS if section == "model" and config.joint.norms == "shared" else ()
        own = {key: getattr(part, key) for key in keys if key not in shared}
        sections[section] = replace(getattr(config, section), **own)
    sections |= {section: getattr(part, section) for section in PART_SECTIONS}
    return replace(config, modality=modality, **sections)


def loss_weight(config: Config, modality: str) -> float:
    """The factor on the gradient of this modality's steps; 1 in a run of one modality."""
    return _part(config, modality).loss_weight if config.modality == JOINT else 1.0


def joint_key(config: Config, modality: str, text: str) -> str:
    """A line about keys of `of_modality(config, modality)`, with the names that they have in `config`."""
    if config.modality != JOINT:
        return text
    shared = NORM_KEYS if config.joint.norms == "shared" else ()
    keys = [f"{section}.{key}" for section, names in PART_KEYS.items() for key in names if key not in shared]
    keys.sort(key=len, reverse=True)  # model.norm_eps before model.norm
    names = "|".join(re.escape(key) for key in keys)
    text = re.sub(rf"(?<![\w.])(?:{names})\b", lambda m: f"joint.{modality}.{m[0].partition('.')[2]}", text)
    return re.sub(rf"(?<![\w.])({'|'.join(PART_SECTIONS)})\.(?=\w)", rf"joint.{modality}.\1.", text)


def _part(config: Config, modality: str) -> JointPartConfig:
    return getattr(config.joint, modality)

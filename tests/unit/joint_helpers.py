"""Shards of all three modalities and a joint configuration of them, for the tests of joint runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megad2v.config.joint import JointConfig, JointPartConfig
from megad2v.config.schema import Config
from tests.unit.data_helpers import config as vision_config
from tests.unit.data_helpers import write_shards
from tests.unit.speech_helpers import speech_config, write_speech
from tests.unit.text_helpers import story, text_config, write_text

WEIGHTS = {"vision": 3.0, "speech": 2.0, "text": 1.0}


def write_all(root: Path) -> dict[str, str]:
    """Modality -> folder of small shards; speech and text have a sample that cannot be decoded, vision one too."""
    vision = write_shards(root / "vision", bad={"b.tar": {2}})
    speech = write_speech(root / "speech", [900 + 170 * number for number in range(30)], bad=(4,))
    text = write_text(root / "text", [*(story(20 + 9 * number, number) for number in range(30)), b"no .npy"])
    return {"vision": str(vision), "speech": str(speech), "text": str(text)}


def part(alone: Config, weight: float) -> JointPartConfig:
    """What a joint run takes of the configuration of one modality, as part of it."""
    model = {key: getattr(alone.model, key) for key in ("norm", "norm_eps", "layer_scale", "head_layers")}
    return JointPartConfig(
        weight=weight,
        **model,
        relative_bias=alone.modality == "vision",
        scope=alone.teacher.scope,
        copied=alone.teacher.copied,
        mask=alone.mask,
        targets=alone.targets,
        loss=alone.loss,
        micro_batch=alone.data.micro_batch,
        bucket_ratio=alone.data.bucket_ratio,
    )


def singles(shards: dict[str, str]) -> dict[str, Config]:
    """The runs of one modality each, four micro-batches a step."""
    return {
        "vision": vision_config(shards["vision"]),
        "speech": speech_config(Path(shards["speech"])),
        "text": text_config(Path(shards["text"])),
    }


def joint_config(shards: dict[str, str], weights: dict[str, float] | None = None, **data: Any) -> Config:
    """All of them in one run."""
    alone, weights = singles(shards), WEIGHTS if weights is None else weights
    parts = {name: part(one, weights.get(name, 0.0)) for name, one in alone.items()}
    base = replace(alone["vision"], modality="joint", speech=alone["speech"].speech, text=alone["text"].text)
    usual = Config()  # of what each modality has for itself
    base = replace(base, joint=JointConfig(**parts), mask=usual.mask, targets=usual.targets, loss=usual.loss)
    base = replace(base, model=usual.model, teacher=usual.teacher)
    data = {"micro_batch": usual.data.micro_batch, "bucket_ratio": usual.data.bucket_ratio, **data}
    return replace(base, data=replace(base.data, **{"shards": shards, **data}))

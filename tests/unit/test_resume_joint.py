"""What a joint run may not change where it resumes, and what it may with a word."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest

from megad2v.config.load import load_config
from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.training.state import _check_stream, _check_weights, objective_changes
from tests.unit.data_helpers import config as vision_config

SHARDS = {"vision": "v", "speech": "s", "text": "t"}


def joint(**parts: Any) -> Config:
    """Recipe joint_tiny; `parts` are changes of a modality's part."""
    config = load_config("joint_tiny")
    config = replace(config, data=replace(config.data, shards=SHARDS))
    changed = {name: replace(getattr(config.joint, name), **change) for name, change in parts.items()}
    return replace(config, joint=replace(config.joint, **changed))


def saved(config: Config) -> Any:
    """A checkpoint of it, as far as these checks look."""
    return SimpleNamespace(directory="run/step_5", index=SimpleNamespace(config=json.loads(json.dumps(asdict(config)))))


def refused(then: Config, now: Config) -> str:
    def check() -> None:
        _check_weights(saved(then), now)
        _check_stream(saved(then), now)

    with pytest.raises(UserError) as caught:
        check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_goes_on() -> None:
    doubled = {name: {"weight": 2.0} for name in SHARDS}
    for now in (joint(), joint(**doubled)):
        _check_weights(saved(joint()), now)
        _check_stream(saved(joint()), now)
        assert objective_changes(saved(joint()), now) == []


def test_other_streams_are_refused_by_the_key_of_the_joint_run() -> None:
    base = joint()
    text, vision = base.joint.text.micro_batch, base.joint.vision.micro_batch
    for now, words in (
        (joint(speech={"bucket_ratio": 1.5}), "joint.speech.bucket_ratio: the run in run/step_5 has 1.3, not 1.5, and"),
        (joint(text={"micro_batch": replace(text, tokens=99)}), "joint.text.micro_batch: "),
        (
            joint(vision={"micro_batch": replace(vision, samples=9)}),
            "joint.vision.micro_batch: ",
        ),
        (
            replace(base, text=replace(base.text, max_tokens=64)),
            "text.max_tokens: the run in run/step_5 has 128, not 64, and would see other",
        ),
        (replace(base, speech=replace(base.speech, max_seconds=3.0)), "speech.max_seconds: "),
        (replace(base, train=replace(base.train, seed=9)), "train.seed: "),
        (replace(base, data=replace(base.data, window=3)), "data.window: "),
    ):
        assert refused(base, now).startswith(words)
    # A ratio that no length decides, and budgets of a section that no part is read from.
    _check_stream(saved(base), joint(vision={"bucket_ratio": 9.0}))
    _check_stream(saved(base), replace(base, data=replace(base.data, bucket_ratio=9.0)))


def test_other_weights_are_refused() -> None:
    base = joint()
    three = "speech 1, text 1, vision 1"
    for then, now, words in (
        (base, joint(vision={"weight": 2.0}), f"has {three}, not speech 1, text 1, vision 2, and would"),
        (base, joint(text={"weight": 0.0}), f"has {three}, not speech 1, vision 1, and would"),
        (base, vision_config("v"), f"has {three}, not one modality, and would"),
        (vision_config("v"), base, f"has one modality, not {three}, and would"),
    ):
        line = refused(then, now)
        assert line.startswith("joint.*.weight: the run in run/step_5 ") and words in line


def test_a_modality_that_takes_no_part_is_not_looked_at() -> None:
    base = joint(speech={"weight": 0.0})
    _check_stream(saved(base), joint(speech={"weight": 0.0, "bucket_ratio": 2.0}))
    assert objective_changes(saved(base), joint(speech={"weight": 0.0, "loss_weight": 2.0})) == []


def test_another_objective_is_said_once() -> None:
    base = joint()
    now = joint(
        vision={"mask": replace(base.joint.vision.mask, ratio=0.5), "scope": "encoder"},
        speech={"loss_weight": 0.5},
        text={"loss": replace(base.joint.text.loss, beta=2.0)},
    )
    now = replace(
        now,
        teacher=replace(now.teacher, decay_end=0.9, resident=not now.teacher.resident),
        text=replace(now.text, loss_on="mask"),
        mask=replace(now.mask, ratio=0.1),
    )
    assert objective_changes(saved(base), now) == [
        f"{line}: the objective changes here"
        for line in (
            "joint.vision.mask.ratio: 0.5, and 0.6 before",
            "joint.vision.scope: encoder, and model before",
            "teacher.decay_end: 0.9, and 0.9995 before",
            "joint.speech.loss_weight: 0.5, and 1.0 before",
            "joint.text.loss.beta: 2.0, and 4.0 before",
            "text.loss_on: mask, and all before",
        )
    ]

"""What must hold between keys: each broken rule is one line that names the key."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from types import FrameType
from typing import Any

import pytest

from megad2v.config import validate as validate_module
from megad2v.config.load import load_config
from megad2v.config.modalities import MaskConfig
from megad2v.config.schema import Config, MicroBatchConfig, MixConfig
from megad2v.config.validate import validate
from megad2v.errors import UserError


def broken(**sections: dict[str, Any]) -> Config:
    config = Config()
    return dataclasses.replace(config, **{
        name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()
    })  # fmt: skip


SECONDS = {"micro_batch": MicroBatchConfig(seconds=30.0)}


def of_lengths(**sections: dict[str, Any]) -> Config:
    """Speech in micro-batches of 30 s."""
    sections = {"model": {"norm": "post", "relative_bias": False}, "data": SECONDS, **sections}
    return dataclasses.replace(broken(**sections), modality="speech")


def broken_speech(model: dict[str, Any] | None = None, **speech: Any) -> Config:
    shape = {"norm": "post", "relative_bias": False, **(model or {})}
    return dataclasses.replace(broken(model=shape, speech=speech), modality="speech")


def broken_text(text: dict[str, Any] | None = None, **mask: Any) -> Config:
    shape = {"norm": "post", "relative_bias": False}
    return dataclasses.replace(broken(model=shape, text=text or {}, mask=mask), modality="text")


def broken_joint(text: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """joint_tiny, with other values of text's part and of sections."""
    config = load_config("joint_tiny")
    part = dataclasses.replace(config.joint.text, **(text or {}))
    config = dataclasses.replace(config, joint=dataclasses.replace(config.joint, text=part))
    return dataclasses.replace(config, **{
        name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()
    })  # fmt: skip


RULES: list[tuple[Config, str]] = [
    (broken(optimizer={"lr": math.nan}, model={"depth": 0}), "optimizer.lr: expected a finite number, got nan"),
    (broken(model={"depth": 0}), "model.width, model.depth and model.heads must be at least 1"),
    (broken(model={"width": 100}), "model.heads: 3 does not divide model.width 100"),
    (broken(model={"head_layers": 3}), "model.head_layers: expected 0, 1 or 2, got 3"),
    (broken(model={"attention_dropout": 1.0}), "model.attention_dropout: expected a probability in [0, 1), got 1.0"),
    (broken(model={"drop_path": -0.1}), "model.drop_path: expected a probability in [0, 1), got -0.1"),
    (broken(model={"layer_drop": 1.0}), "model.layer_drop: expected a probability in [0, 1), got 1.0"),
    (broken(model={"deep_norm": True}), "model.deep_norm: scales the residual stream before post-norms; set model.nor"),
    (broken(teacher={"context": 0.0}), "teacher.context: expected a fraction above 0, at most 1, got 0.0"),
    (broken(teacher={"copied": ("positions",)}), "teacher.copied: positions are a part of speech encoders, not of v"),
    (broken(teacher={"copied": ("norm",)}), "teacher.copied: norm is the one before the first block, which model.norm"),
    (
        broken(train={"init_teacher": "student"}),
        "train.init_teacher: says what the teacher starts from with train.init",
    ),
    (broken(targets={"average": False}), "targets.average: false needs a projection for each layer; set model.head_"),
    (broken(loss={"variance_weight": -1.0}), "loss.variance_weight and loss.variance_margin must be at least 0"),
    (broken(train={"hang_timeout": -1.0}), "train.hang_timeout: expected at least 0, got -1.0"),
    (broken_text({"vocabulary": 5}), "text.vocabulary: five ids are special, so at least 6, got 5"),
    (broken_text({"max_tokens": 7}), "text.max_tokens: expected at least 8, got 7"),
    (
        broken_text(random=0.6, kept=0.5),
        "mask.random and mask.kept: expected two fractions of the chosen positions, at",
    ),
    (
        dataclasses.replace(broken_text(), teacher=dataclasses.replace(Config().teacher, context=0.5)),
        "teacher.context: a fraction of the row, which here is as long as the longest",
    ),
    (broken_text({"loss_on": "mask"}, random=0.5, kept=0.5), "text.loss_on: mask, but mask.random + mask.kept is 1"),
    (
        dataclasses.replace(of_lengths(data={"micro_batch": MicroBatchConfig(tokens=511)}), modality="text"),
        "data.micro_batch.tokens: 511 cannot hold one row of text.max_tokens (512); raise it, or lower that",
    ),
    (broken(vision={"image_size": 60}), "vision.image_size: 60 is not a multiple of vision.patch_size 8"),
    (broken(vision={"patch_size": 0}), "vision.image_size: 64 is not a multiple of vision.patch_size 0"),
    (broken(vision={"channels": 1}), "vision.channels: images are decoded to RGB, so 3, got 1"),
    (
        broken_speech(conv_layers=()),
        "speech.conv_layers: expected at least one (channels, kernel, stride), every n",
    ),
    (
        broken_speech(conv_layers=((512, 10, 0),)),
        "speech.conv_layers: expected at least one (channels, kernel, st",
    ),
    (
        broken_speech(conv_layers=((8, 10, 5), (8, 2, 3))),
        "speech.conv_layers: (8, 2, 3) passes over 1 of every 3",
    ),
    (broken_speech(position_depth=0), "speech.position_depth and speech.position_kernel must be at least 1"),
    (broken_speech(position_groups=7), "speech.position_groups: 7 does not divide model.width 192"),
    (broken_speech(position_groups=0), "speech.position_groups: 0 does not divide model.width 192"),
    (
        broken_speech(model={"relative_bias": True}),
        "model.relative_bias: is a table over a grid of patches; speech",
    ),
    (broken(model={"mlp_ratio": 0.0}), "model.mlp_ratio: expected more than 0, got 0.0"),
    (broken(model={"norm_eps": -1e-6}), "model.norm_eps: expected more than 0, got -1e-06"),
    (broken(vision={"std": (0.5, 0.0, 0.5)}), "vision.std: pixels are divided by it, so every value must be above 0"),
    (broken(targets={"layers": 7}), "targets.layers: expected 1 to model.depth (6), got 7"),
    (broken(targets={"layers": 0}), "targets.layers: expected 1 to model.depth (6), got 0"),
    (broken(mask={"ratio": 1.0}), "mask.ratio: expected a fraction in [0, 1), got 1.0"),
    (broken(mask={"min_block": 0}), "mask.min_block: expected at least 1 patch, got 0"),
    (broken(mask={"min_block": 4, "max_block": 3}), "mask.max_block: expected null or at least mask.min_block (4)"),
    (broken(mask={"min_aspect": 1.5}), "mask.min_aspect: expected a ratio in (0, 1], got 1.5"),
    (broken(loss={"beta": 0.0}), "loss.beta: smooth_l1 needs a beta above 0, got 0.0 (use loss.kind mse)"),
    (broken(teacher={"decay_end": 1.1}), "teacher.decay_end: expected a decay in [0, 1], got 1.1"),
    (broken(teacher={"decay_start": -0.1}), "teacher.decay_start: expected a decay in [0, 1], got -0.1"),
    (broken(teacher={"decay_steps": -1}), "teacher.decay_steps: expected null or at least 0, got -1"),
    (broken(augment={"crop_scale_min": 0.0}), "augment.crop_scale_min and crop_scale_max: expected 0 < min"),
    (broken(augment={"crop_scale_min": 0.9, "crop_scale_max": 0.8}), "augment.crop_scale_min and crop_scale_max"),
    (broken(augment={"jitter": -0.1}), "augment.jitter: expected at least 0, got -0.1"),
    (broken(train={"precision": "fp16"}), "train.precision: fp16 is not supported"),
    (broken(parallel={"tensor": 0}), "parallel.tensor: expected at least 1, got 0"),
    (broken(parallel={"tensor": 2}), "parallel.tensor: 2 ranks cannot share model.heads = 3 equally"),
    (broken(parallel={"tensor": 3}, model={"mlp_ratio": 0.48}), "parallel.tensor: 3 ranks cannot share model.mlp"),
    (
        dataclasses.replace(
            broken(
                parallel={"tensor": 4},
                model={"norm": "post", "relative_bias": False, "heads": 4},
                text={"vocabulary": 6},
            ),
            modality="text",
        ),
        "parallel.tensor: 4 ranks take ceil(6 / 4) rows of the vocabulary each, which leaves none to the last",
    ),
    (broken(parallel={"sequence": True}), "parallel.sequence: splits over tensor-parallel ranks"),
    (
        broken(parallel={"tensor": 3}, model={"attention_dropout": 0.1}, train={"compile": True}),
        "train.compile: under tensor parallelism model.attention_dropout draws numbers of each rank's own",
    ),
    (broken(train={"steps": 0}), "train.steps: expected at least 1, got 0"),
    (broken(train={"micro_batches_per_step": 0}), "train.micro_batches_per_step: expected at least 1, got 0"),
    (broken(train={"keep_last": -1}), "train.keep_last: expected at least 0, got -1"),
    (broken(train={"max_minutes": 0.0}), "train.max_minutes: expected more than 0 minutes, or null, got 0"),
    (broken(train={"rendezvous_timeout": 0.0}), "train.rendezvous_timeout: expected more than 0 seconds, got 0"),
    (broken(data={"workers": -1}), "data.workers must be at least 0 and data.window at least 1"),
    (broken(data={"window": 0}), "data.workers must be at least 0 and data.window at least 1"),
    (broken(optimizer={"lr": 0.0}), "optimizer.lr and optimizer.eps must be above 0, optimizer.clip at least 0"),
    (broken(optimizer={"clip": -1.0}), "optimizer.lr and optimizer.eps must be above 0, optimizer.clip at least 0"),
    (broken(optimizer={"betas": (0.9, 1.0)}), "optimizer.betas: expected two decays in [0, 1), got (0.9, 1.0)"),
    (broken(optimizer={"betas": (-0.1, 0.999)}), "optimizer.betas: expected two decays in [0, 1), got (-0.1, 0.999)"),
    (broken(optimizer={"weight_decay": -0.05}), "optimizer.weight_decay: expected at least 0, got -0.05"),
    (broken(schedule={"warmup_steps": -1}), "schedule.warmup_steps: expected at least 0, got -1"),
    (broken(schedule={"hold_fraction": 1.5}), "schedule.hold_fraction: expected 0 to 1, got 1.5"),
    (broken(verdict={"spike_z": -1.0}), "verdict.spike_z: expected at least 0, got -1.0"),
    (broken(verdict={"max_bad_steps": -1}), "verdict.max_bad_steps: expected at least 0, got -1"),
    (broken(verdict={"window": 8}), "verdict.window: fewer than 16 steps say little"),
    (
        broken(schedule={"kind": "tri_stage", "final_scale": 0.0}),
        "schedule.final_scale: tri_stage decays exponentially",
    ),
    (broken(data={"max_bad_fraction": 1.5}), "data.max_bad_fraction: expected a fraction in [0, 1], got 1.5"),
    (broken(data={"max_bad_fraction": -0.1}), "data.max_bad_fraction: expected a fraction in [0, 1], got -0.1"),
    *[
        (broken(data={"micro_batch": dataclasses.replace(Config().data.micro_batch, **budget)}), message)
        for budget, message in (
            ({"samples": None}, "data.micro_batch: images are batched by samples: give one, the others null; got none"),
            ({"tokens": 5}, "data.micro_batch: images are batched by samples: give one, the others null; got samples,"),
            ({"samples": None, "seconds": 9.0}, "data.micro_batch: images are batched by samples: give one, the"),
            ({"samples": 0}, "data.micro_batch.samples: expected at least 1"),
        )
    ],
    (
        of_lengths(data=SECONDS | {"micro_batch": MicroBatchConfig(tokens=9)}),
        "data.micro_batch: recordings are batched b",
    ),
    (of_lengths(data=SECONDS | {"bucket_ratio": 1.0}), "data.bucket_ratio: longest over shortest of a bucket, more th"),
    (
        of_lengths(speech={"min_seconds": 3.0, "max_seconds": 2.0}),
        "speech.min_seconds and max_seconds: expected 0 < min",
    ),
    (
        of_lengths(speech={"min_seconds": 0.0}),
        "speech.min_seconds and max_seconds: expected 0 < min <= max, got 0 and 20",
    ),
    (
        of_lengths(speech={"max_seconds": 31.0}),
        "data.micro_batch.seconds: 30 cannot hold one recording of speech.max_s",
    ),
    (broken(data={"mix": {}}), "data.mix: names no data set; give NAME: {shards: PATTERN, weight: NUMBER}"),
    (broken(data={"mix": {"a": MixConfig("x")}, "shards": "y"}), "data.shards and data.mix both say what to train on"),
    (broken(data={"mix": {"a/b": MixConfig("x")}}), "data.mix: a name is made of letters, digits, dots, dashes and"),
    (broken(data={"mix": {"a": MixConfig("x", 0.0)}}), "data.mix.a.weight: expected a number above 0, got 0.0"),
    (of_lengths(mask={"span": 0}), "mask.span must be at least 1 and mask.min_spans at least 0, got 0 and 1"),
    (broken_joint({"weight": -1.0}), "joint.text.weight: expected at least 0, got -1"),
    (broken_joint({"weight": math.nan}), "joint.text.weight: expected a finite number, got nan"),
    (broken_joint({"loss_weight": 0.0}), "joint.text.loss_weight: expected more than 0, got 0; to leave the modality"),
    (dataclasses.replace(Config(), modality="joint"), "joint: no modality takes part; give two or all of vision, spee"),
    (broken_joint(model={"deep_norm": True}), "model.deep_norm: is of one modality's post-norm encoder; set it false"),
    (
        broken_joint(data={"mix": {"a": MixConfig("x")}}),
        "data.mix: joint runs read one set of shards for each modality",
    ),
    (broken_joint(data={"shards": "x"}), "data.shards: a joint run needs a map modality: pattern, such as {vision: x}"),
    (
        broken_joint(data={"valid": {"vision": "x", "text": "y"}}),
        "data.valid: names no shards of speech; give them, or",
    ),
    (
        broken_joint(data={"shards": {"image": "x"}}),
        "data.shards: image is no modality; expected vision, speech and",
    ),
    (broken_joint(mask={"ratio": 0.3}), "mask: in a joint run each modality has its own; set joint.vision.mask and th"),
    (broken_joint(model={"norm_eps": 0.1}), "model.norm_eps: in a joint run each modality has its own; set joint.vis"),
    # Rules of one modality, by the names that its keys have here.
    (broken_joint({"mask": MaskConfig(ratio=1.0)}), "joint.text.mask.ratio: expected a fraction in [0, 1), got 1.0"),
    (
        broken_joint({"norm": "pre"}),
        "joint.text.copied: norm is the one before the first block, which joint.text.norm pre",
    ),
    (
        broken_joint({"micro_batch": MicroBatchConfig(seconds=9.0)}),
        "joint.text.micro_batch: rows of text are batched by",
    ),
    (broken_joint({"head_layers": 3}), "joint.text.head_layers: expected 0, 1 or 2, got 3"),
    (of_lengths(mask={"min_spans": -1}), "mask.span must be at least 1 and mask.min_spans at least 0, got 10 and -1"),
]


@pytest.mark.parametrize(("config", "message"), RULES, ids=[message for _, message in RULES])
def test_rule(config: Config, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(config)
    assert str(caught.value).startswith(message)


def test_every_rule_has_a_case() -> None:
    """A rule that is added to validate.py without a case above turns this red: each of its complaints is reached."""
    source, first = inspect.getsourcelines(validate_module)
    complaints = {number for number, line in enumerate(source, start=max(1, first)) if "problems.append(" in line}
    reached: set[int] = set()

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename == validate_module.__file__:
            reached.add(frame.f_lineno)
            return look
        return None

    before = sys.gettrace()
    sys.settrace(look)
    try:
        for config, _ in RULES:
            with pytest.raises(UserError):
                validate(config)
    finally:
        sys.settrace(before)
    assert len(complaints) > 15
    assert complaints <= reached, f"no case for validate.py lines {sorted(complaints - reached)}"


def test_good_configurations_pass() -> None:
    validate(Config())
    validate(broken(mask={"ratio": 0.0}))  # the control that hides nothing
    validate(broken(targets={"layers": 6}, loss={"kind": "mse", "beta": 0.0}))
    # At the borders of their ranges.
    validate(broken(optimizer={"betas": (0.0, 0.0), "weight_decay": 0.0}, mask={"min_block": 4, "max_block": 4}))
    validate(broken(teacher={"decay_steps": 0}, schedule={"final_scale": 0.0}, data={"max_bad_fraction": 1.0}))
    validate(broken(data={"max_bad_fraction": 0.0}))
    validate(of_lengths(speech={"min_seconds": 30.0, "max_seconds": 30.0}, mask={"span": 1, "min_spans": 0}))
    validate(of_lengths(data={"micro_batch": MicroBatchConfig(samples=1)}))
    # A modality's rules are its own.
    validate(broken(speech={"position_groups": 7}))
    validate(dataclasses.replace(broken_speech(), vision=dataclasses.replace(Config().vision, image_size=60)))

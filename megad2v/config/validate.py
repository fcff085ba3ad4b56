"""What must hold between keys. Each broken rule is one line that names the key and what would be right."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from megad2v.config.parts import (
    JOINT,
    MODALITIES,
    NORM_KEYS,
    PART_KEYS,
    PART_SECTIONS,
    joint_key,
    modalities,
    of_modality,
)
from megad2v.config.schema import Config
from megad2v.errors import UserError

BUDGETS = {
    "vision": ("images", ("samples",)),
    "speech": ("recordings", ("seconds", "samples")),
    "text": ("rows of text", ("tokens", "samples")),
}
"""What a micro-batch may be measured by."""


def validate(config: Config) -> None:
    """Raise UserError for the first contradiction inside the configuration."""
    # Finiteness first: NaN breaks most of the rules below too, and their words would not say so.
    for rules in (_finite, _joint):
        for problem in rules(config):
            raise UserError(problem)
    for modality in modalities(config):
        alone = of_modality(config, modality)
        for rules in (_model, _objective, _optimisation, _verdict, _data, _run):
            for problem in rules(alone):
                raise UserError(joint_key(config, modality, problem))


def validate_model(config: Config) -> None:
    """Raise UserError for the first contradiction in what the model and its objective are: for a configuration that
    another program's settings were read into, of which training uses nothing else."""
    for rules in (_finite, _model, _objective):
        for problem in rules(config):
            raise UserError(problem)


def _finite(section: Any, prefix: str = "") -> list[str]:
    """YAML can write .nan and .inf, and no key means either."""
    problems = []
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            problems += _finite(value, f"{key}.")
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            problems.append(f"{key}: expected a finite number, got {value}")
    return problems


def _joint(config: Config) -> list[str]:
    """What holds between the modalities of a joint run; each by itself is looked at as a run of its own."""
    problems, names = [], modalities(config)
    if config.modality != JOINT:
        return []
    for modality in MODALITIES:
        part = getattr(config.joint, modality)
        if part.weight < 0:
            problems.append(f"joint.{modality}.weight: expected at least 0, got {part.weight:g}")
        if part.loss_weight <= 0:
            problems.append(
                f"joint.{modality}.loss_weight: expected more than 0, got {part.loss_weight:g}; to leave the modality "
                f"out set joint.{modality}.weight 0"
            )
    if not names:
        problems.append("joint: no modality takes part; give two or all of vision, speech and text a weight above 0")
        return problems
    if config.model.deep_norm:
        problems.append("model.deep_norm: is of one modality's post-norm encoder; set it false in a joint run")
    if config.data.mix is not None:
        problems.append("data.mix: joint runs read one set of shards for each modality (data.shards); set it null")
    for key in ("shards", "valid"):
        value = getattr(config.data, key)
        if isinstance(value, dict) and (unknown := sorted(set(value) - set(MODALITIES))):
            problems.append(f"data.{key}: {unknown[0]} is no modality; expected vision, speech and text")
        if isinstance(value, str):
            problems.append(
                f"data.{key}: a joint run needs a map modality: pattern, such as {{{names[0]}: {value}}}, got {value}"
            )
        elif value is not None and (missing := [name for name in names if name not in value]):
            problems.append(
                f"data.{key}: names no shards of {missing[0]}; give them, or set joint.{missing[0]}.weight 0 to leave "
                "the modality out"
            )
    return problems + _unread(config)


def _unread(config: Config) -> list[str]:
    """Settings that a joint run would pass over, since each modality has its own."""
    problems, usual = [], Config()
    keys = [(section, section) for section in PART_SECTIONS]
    keys += [(f"{section}.{key}", key) for section, names in PART_KEYS.items() for key in names if key != "norm"]
    for key, own in keys:
        section, _, leaf = key.partition(".")
        if own in NORM_KEYS and config.joint.norms == "shared":
            continue
        values = [getattr(tree, section) for tree in (config, usual)]
        if leaf:
            values = [getattr(value, leaf) for value in values]
        if values[0] != values[1]:
            problems.append(f"{key}: in a joint run each modality has its own; set joint.vision.{own} and the others'")
    return problems


def _model(config: Config) -> list[str]:
    model, problems = config.model, []
    if min(model.width, model.depth, model.heads) < 1:
        problems.append("model.width, model.depth and model.heads must be at least 1")
    elif model.width % model.heads:
        problems.append(f"model.heads: {model.heads} does not divide model.width {model.width}")
    if model.head_layers not in (0, 1, 2):
        problems.append(f"model.head_layers: expected 0, 1 or 2, got {model.head_layers}")
    for key in ("mlp_ratio", "norm_eps"):
        if getattr(model, key) <= 0:
            problems.append(f"model.{key}: expected more than 0, got {getattr(model, key)}")
    for key in ("dropout", "attention_dropout", "drop_path", "layer_drop"):
        if not 0 <= getattr(model, key) < 1:
            problems.append(f"model.{key}: expected a probability in [0, 1), got {getattr(model, key)}")
    if model.deep_norm and model.norm != "post":
        problems.append("model.deep_norm: scales the residual stream before post-norms; set model.norm post")
    return problems + {"vision": _vision, "speech": _speech, "text": _text}[config.modality](config)


def _vision(config: Config) -> list[str]:
    vision, problems = config.vision, []
    if vision.patch_size < 1 or vision.image_size < 1 or vision.image_size % vision.patch_size:
        problems.append(
            f"vision.image_size: {vision.image_size} is not a multiple of vision.patch_size {vision.patch_size}"
        )
    if vision.channels != 3:
        problems.append(f"vision.channels: images are decoded to RGB, so 3, got {vision.channels}")
    if min(vision.std) <= 0:
        problems.append(f"vision.std: pixels are divided by it, so every value must be above 0, got {vision.std}")
    return problems


def _speech(config: Config) -> list[str]:
    model, speech, problems = config.model, config.speech, []
    if not speech.conv_layers or any(min(layer) < 1 for layer in speech.conv_layers):
        problems.append(
            "speech.conv_layers: expected at least one (channels, kernel, stride), every number at least 1, "
            f"got {speech.conv_layers}"
        )
    for channels, kernel, stride in speech.conv_layers:
        if stride > kernel:
            problems.append(
                f"speech.conv_layers: ({channels}, {kernel}, {stride}) passes over {stride - kernel} of every {stride} "
                "samples; a stride is at most its kernel"
            )
    if speech.position_depth < 1 or speech.position_kernel < 1:
        problems.append("speech.position_depth and speech.position_kernel must be at least 1")
    if speech.position_groups < 1 or model.width % speech.position_groups:
        problems.append(f"speech.position_groups: {speech.position_groups} does not divide model.width {model.width}")
    return problems + _no_grid(config)


def _text(config: Config) -> list[str]:
    text, mask, problems = config.text, config.mask, []
    if text.vocabulary is not None and text.vocabulary < 6:
        problems.append(f"text.vocabulary: five ids are special, so at least 6, got {text.vocabulary}")
    if text.max_tokens < 8:
        problems.append(f"text.max_tokens: expected at least 8, got {text.max_tokens}")
    if min(mask.random, mask.kept) < 0 or mask.random + mask.kept > 1:
        problems.append(
            "mask.random and mask.kept: expected two fractions of the chosen positions, at most 1 together, "
            f"got {mask.random:g} and {mask.kept:g}"
        )
    if 0 < config.teacher.context < 1:
        problems.append(
            "teacher.context: a fraction of the row, which here is as long as the longest of its micro-batch; texts "
            f"need 1, got {config.teacher.context}"
        )
    if text.loss_on == "mask" and mask.random + mask.kept == 1:
        problems.append("text.loss_on: mask, but mask.random + mask.kept is 1, so the student never sees `<mask>`")
    return problems + _no_grid(config)


def _no_grid(config: Config) -> list[str]:
    if not config.model.relative_bias:
        return []
    return [f"model.relative_bias: is a table over a grid of patches; {config.modality} has none, set it false"]


def _objective(config: Config) -> list[str]:
    problems = []
    if not 1 <= config.targets.layers <= config.model.depth:
        problems.append(
            f"targets.layers: expected 1 to model.depth ({config.model.depth}), got {config.targets.layers}"
        )
    mask = config.mask
    if not 0 <= mask.ratio < 1:
        problems.append(f"mask.ratio: expected a fraction in [0, 1), got {mask.ratio}")
    if mask.min_block < 1:
        problems.append(f"mask.min_block: expected at least 1 patch, got {mask.min_block}")
    if mask.max_block is not None and mask.max_block < mask.min_block:
        problems.append(
            f"mask.max_block: expected null or at least mask.min_block ({mask.min_block}), got {mask.max_block}"
        )
    if not 0 < mask.min_aspect <= 1:
        problems.append(f"mask.min_aspect: expected a ratio in (0, 1], got {mask.min_aspect}")
    if config.loss.kind == "smooth_l1" and config.loss.beta <= 0:
        problems.append(f"loss.beta: smooth_l1 needs a beta above 0, got {config.loss.beta} (use loss.kind mse)")
    for key in ("decay_start", "decay_end"):
        value = getattr(config.teacher, key)
        if not 0 <= value <= 1:
            problems.append(f"teacher.{key}: expected a decay in [0, 1], got {value}")
    if not 0 < config.teacher.context <= 1:
        problems.append(f"teacher.context: expected a fraction above 0, at most 1, got {config.teacher.context}")
    if "positions" in config.teacher.copied and config.modality != "speech":
        problems.append(f"teacher.copied: positions are a part of speech encoders, not of {config.modality}")
    if "norm" in config.teacher.copied and config.model.norm != "post":
        problems.append("teacher.copied: norm is the one before the first block, which model.norm pre has not")
    if not config.targets.average and config.model.head_layers == 0:
        problems.append(
            "targets.average: false needs a projection for each layer; set model.head_layers to 1 or 2, got 0"
        )
    if config.loss.variance_weight < 0 or config.loss.variance_margin < 0:
        problems.append("loss.variance_weight and loss.variance_margin must be at least 0")
    if config.teacher.decay_steps is not None and config.teacher.decay_steps < 0:
        problems.append(f"teacher.decay_steps: expected null or at least 0, got {config.teacher.decay_steps}")
    augment = config.augment
    if not 0 < augment.crop_scale_min <= augment.crop_scale_max <= 1:
        problems.append(
            "augment.crop_scale_min and crop_scale_max: expected 0 < min <= max <= 1, "
            f"got {augment.crop_scale_min} and {augment.crop_scale_max}"
        )
    if augment.jitter < 0:
        problems.append(f"augment.jitter: expected at least 0, got {augment.jitter}")
    return problems


def _optimisation(config: Config) -> list[str]:
    optimizer, schedule, problems = config.optimizer, config.schedule, []
    if optimizer.lr <= 0 or optimizer.eps <= 0 or optimizer.clip < 0:
        problems.append("optimizer.lr and optimizer.eps must be above 0, optimizer.clip at least 0")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        problems.append(f"optimizer.betas: expected two decays in [0, 1), got {optimizer.betas}")
    if optimizer.weight_decay < 0:
        problems.append(f"optimizer.weight_decay: expected at least 0, got {optimizer.weight_decay}")
    if schedule.warmup_steps < 0:
        problems.append(f"schedule.warmup_steps: expected at least 0, got {schedule.warmup_steps}")
    if not 0 <= schedule.hold_fraction <= 1:
        problems.append(f"schedule.hold_fraction: expected 0 to 1, got {schedule.hold_fraction}")
    if schedule.kind == "tri_stage" and schedule.final_scale <= 0:
        problems.append(
            f"schedule.final_scale: tri_stage decays exponentially to it, so it must be above 0, "
            f"got {schedule.final_scale}"
        )
    return problems


def _parallel(config: Config) -> list[str]:
    tensor, model, problems = config.parallel.tensor, config.model, []
    if tensor < 1:
        return [f"parallel.tensor: expected at least 1, got {tensor}"]
    if tensor == 1:
        alone = "parallel.sequence: splits over tensor-parallel ranks; set parallel.tensor above 1 or leave it"
        return [alone] if config.parallel.sequence else []
    hidden = int(model.width * model.mlp_ratio)
    for key, total in (("model.heads", model.heads), ("model.mlp_ratio x width", hidden)):
        if total % tensor:
            problems.append(f"parallel.tensor: {tensor} ranks cannot share {key} = {total} equally; use a divisor")
    vocabulary = config.text.vocabulary
    if config.modality == "text" and vocabulary is not None and -(-vocabulary // tensor) * (tensor - 1) >= vocabulary:
        problems.append(
            f"parallel.tensor: {tensor} ranks take ceil({vocabulary} / {tensor}) rows of the vocabulary each, which "
            "leaves none to the last; use fewer"
        )
    drawn = [("model.attention_dropout", model.attention_dropout)]
    drawn += [("model.dropout", model.dropout)] if config.parallel.sequence else []
    for key, rate in drawn:
        if config.train.compile and rate > 0:
            problems.append(
                f"train.compile: under tensor parallelism {key} draws numbers of each rank's own, which torch.compile "
                f"cannot put into one graph; set {key} 0 or train.compile false"
            )
    return problems


def _verdict(config: Config) -> list[str]:
    verdict, problems = config.verdict, []
    for key in ("spike_z", "max_bad_steps", "min_target_std", "min_pred_std", "std_after"):
        if getattr(verdict, key) < 0:
            problems.append(f"verdict.{key}: expected at least 0, got {getattr(verdict, key)}")
    if verdict.window < 16:
        problems.append(f"verdict.window: fewer than 16 steps say little of what is usual, got {verdict.window}")
    return problems


def _run(config: Config) -> list[str]:
    train, problems = config.train, []
    if train.precision == "fp16":
        problems.append(
            "train.precision: fp16 is not supported (loss scaling skips steps that the teacher would still average); "
            "use bf16 on GPUs or fp32"
        )
    if train.init_teacher == "student" and train.init is None:
        problems.append("train.init_teacher: says what the teacher starts from with train.init, which is not set")
    problems += _parallel(config)
    for key, least in (
        ("steps", 1),
        ("micro_batches_per_step", 1),
        ("log_every", 1),
        ("save_every", 0),
        ("eval_every", 0),
        ("keep_last", 0),
        ("keep_every", 0),
        ("hang_timeout", 0),
    ):
        if getattr(train, key) < least:
            problems.append(f"train.{key}: expected at least {least}, got {getattr(train, key)}")
    if train.max_minutes is not None and train.max_minutes <= 0:
        problems.append(f"train.max_minutes: expected more than 0 minutes, or null, got {train.max_minutes:g}")
    if train.rendezvous_timeout <= 0:
        problems.append(f"train.rendezvous_timeout: expected more than 0 seconds, got {train.rendezvous_timeout:g}")
    return problems


def _data(config: Config) -> list[str]:
    data, mask, problems = config.data, config.mask, []
    budgets = [k for k in ("samples", "tokens", "seconds") if getattr(data.micro_batch, k) is not None]
    what, allowed = BUDGETS[config.modality]
    if len(budgets) != 1 or budgets[0] not in allowed:
        got = ", ".join(budgets) or "none"
        problems.append(
            f"data.micro_batch: {what} are batched by {' or '.join(allowed)}: give one, the others null; got {got}"
        )
    elif budgets == ["samples"] and data.micro_batch.samples < 1:
        problems.append("data.micro_batch.samples: expected at least 1")
    if data.workers < 0 or data.window < 1:
        problems.append("data.workers must be at least 0 and data.window at least 1")
    if not 0 <= data.max_bad_fraction <= 1:
        problems.append(f"data.max_bad_fraction: expected a fraction in [0, 1], got {data.max_bad_fraction}")
    if mask.span < 1 or mask.min_spans < 0:
        problems.append(
            f"mask.span must be at least 1 and mask.min_spans at least 0, got {mask.span} and {mask.min_spans}"
        )
    if data.bucket_ratio <= 1:
        problems.append(f"data.bucket_ratio: longest over shortest of a bucket, more than 1, got {data.bucket_ratio}")
    problems += _mix(config)
    lengths = {"speech": _speech_lengths, "text": _text_lengths}.get(config.modality)
    return problems + (lengths(config) if lengths else [])


def _mix(config: Config) -> list[str]:
    data, problems = config.data, []
    if data.mix is None:
        return []
    if data.shards is not None:
        problems.append("data.shards and data.mix both say what to train on: give one, the other null")
    if not data.mix:
        problems.append("data.mix: names no data set; give NAME: {shards: PATTERN, weight: NUMBER}, or null")
    for name, part in data.mix.items():
        if not re.fullmatch(r"[\w.-]+", name):
            problems.append(f"data.mix: a name is made of letters, digits, dots, dashes and underscores, got {name!r}")
        if not (math.isfinite(part.weight) and part.weight > 0):
            problems.append(
                f"data.mix.{name}.weight: expected a number above 0, got {part.weight}; or leave the set out"
            )
    return problems


def _text_lengths(config: Config) -> list[str]:
    tokens, longest = config.data.micro_batch.tokens, config.text.max_tokens
    if tokens is None or tokens >= longest:
        return []
    return [
        f"data.micro_batch.tokens: {tokens} cannot hold one row of text.max_tokens ({longest}); raise it, or lower that"
    ]


def _speech_lengths(config: Config) -> list[str]:
    data, speech, problems = config.data, config.speech, []
    if not 0 < speech.min_seconds <= speech.max_seconds:
        problems.append(
            "speech.min_seconds and max_seconds: expected 0 < min <= max, "
            f"got {speech.min_seconds:g} and {speech.max_seconds:g}"
        )
    seconds = data.micro_batch.seconds
    if seconds is not None and seconds < speech.max_seconds:
        problems.append(
            f"data.micro_batch.seconds: {seconds:g} cannot hold one recording of speech.max_seconds "
            f"({speech.max_seconds:g}); raise it, or lower that"
        )
    return problems

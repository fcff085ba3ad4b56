"""From a configuration to the student and teacher modules. The explicit list of modalities is `FRONT_ENDS`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container
from contextlib import suppress
from types import ModuleType

import torch
from torch import Tensor, nn

from megad2v.config.parts import JOINT, modalities, of_modality
from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.modalities.speech import hf_keys as speech_keys
from megad2v.modalities.speech.front_end import SpeechFrontEnd
from megad2v.modalities.speech.geometry import frame_count, sample_count, samples_needed
from megad2v.modalities.speech.positions import ConvPositions
from megad2v.modalities.text import hf_keys as text_keys
from megad2v.modalities.text.front_end import TextFrontEnd
from megad2v.modalities.vision import hf_keys as vision_keys
from megad2v.modalities.vision.front_end import VisionFrontEnd
from megad2v.models.block import NormSpec
from megad2v.models.data2vec import (
    FrontEnd,
    JointStudent,
    JointTeacher,
    ObjectiveSpec,
    Student,
    StudentPart,
    Teacher,
    TeacherPart,
)
from megad2v.models.encoder import Encoder, JointEncoder, PartSpec, StackSpec
from megad2v.models.heads import HeadPerLayer, regression_head
from megad2v.models.initialise import INIT_SCHEMES
from megad2v.models.layers import Layers


def _vision(config: Config, layers: Layers | None) -> FrontEnd:
    return VisionFrontEnd(config.vision, config.model.width, INIT_SCHEMES[config.model.init])


def _speech(config: Config, layers: Layers | None) -> FrontEnd:
    return SpeechFrontEnd(config.speech, config.model.width, config.model.norm_eps, INIT_SCHEMES[config.model.init])


def _text(config: Config, layers: Layers | None) -> FrontEnd:
    if config.text.vocabulary is None:
        raise UserError("text.vocabulary: not known; name the tokenizer's folder (text.tokenizer), or give the number")
    return TextFrontEnd(config.text, config.model.width, INIT_SCHEMES[config.model.init], layers)


HUGGING_FACE: dict[str, ModuleType] = {"vision": vision_keys, "speech": speech_keys, "text": text_keys}
"""How each modality's model is called there: see modalities/vision/hf_keys.py for what a key map offers."""

FRONT_ENDS: dict[str, Callable[[Config, Layers | None], FrontEnd]] = {
    "vision": _vision,
    "speech": _speech,
    "text": _text,
}


def positions(config: Config) -> int:
    """T: maskable positions of one sample (patches of an image), the most where samples differ (frames of a crop,
    tokens of a row)."""
    if config.modality == "text":
        return config.text.max_tokens
    if config.modality == "speech":
        return frame_count(sample_count(config.speech.max_seconds), config.speech.conv_layers)
    return (config.vision.image_size // config.vision.patch_size) ** 2


def blank_inputs(config: Config, count: int) -> Tensor:
    """Zeros as the front end takes them, one sample of `count` positions (images have the configured size).
    float32: (1, C, H, W) or (1, S); int64: (1, 1, T)."""
    if config.modality == "text":
        return torch.zeros(1, 1, count, dtype=torch.int64)
    if config.modality == "speech":
        return torch.zeros(1, samples_needed(count, config.speech.conv_layers))
    vision = config.vision
    return torch.zeros(1, vision.channels, vision.image_size, vision.image_size)


def _grid(config: Config) -> int | None:
    """Side of the square that the positions form, None for a sequence."""
    return config.vision.image_size // config.vision.patch_size if config.modality == "vision" else None


def _stack(config: Config) -> StackSpec:
    """The blocks that `model.*` describes."""
    model = config.model
    return StackSpec(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        pre_norm=model.norm == "pre",
        qkv_bias=model.qkv_bias,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        drop_path=model.drop_path,
        weight=INIT_SCHEMES[model.init].encoder,
        deep_norm=model.deep_norm,
    )


def _norms(config: Config) -> NormSpec:
    return NormSpec(config.model.norm, config.model.norm_eps, config.model.layer_scale)


def _encoder_part(config: Config) -> PartSpec:
    return PartSpec(
        _norms(config),
        grid=_grid(config) if config.model.relative_bias else None,
        positions=ConvPositions(config.speech, config.model.width) if config.modality == "speech" else None,
    )


def build_encoder(config: Config, layers: Layers | None = None) -> Encoder:
    """The encoder that `model.*` describes."""
    return Encoder(_stack(config), _encoder_part(config), layers)


def _joint_encoder(config: Config, layers: Layers | None) -> JointEncoder:
    parts = {name: _encoder_part(of_modality(config, name)) for name in modalities(config)}
    shared = _norms(config) if config.joint.norms == "shared" else None
    return JointEncoder(_stack(config), parts, shared, layers)


def objective(config: Config) -> ObjectiveSpec:
    """`targets.*` and `loss.*` as the models take them."""
    targets, loss, teacher = config.targets, config.loss, config.teacher
    return ObjectiveSpec(
        layers=targets.layers,
        tensor=targets.tensor,
        layer_norm=targets.layer_norm,
        average_norm=targets.average_norm,
        average=targets.average,
        padding=targets.padding,
        shuffle=targets.shuffle,
        kind=loss.kind,
        beta=loss.beta,
        scale=loss.scale,
        variance_weight=loss.variance_weight,
        variance_margin=loss.variance_margin,
        context=teacher.context,
    )


def _head(config: Config) -> nn.Module:
    model, scheme = config.model, INIT_SCHEMES[config.model.init]
    if config.targets.average:
        return regression_head(model.width, model.head_layers, scheme)
    return HeadPerLayer(model.width, model.head_layers, config.targets.layers, scheme)


def build_student(config: Config, layers: Layers | None = None) -> Student | JointStudent:
    """Front end, encoder and head, uninitialised (see models.initialise); of a joint run, for each modality."""
    if config.modality != JOINT:
        return Student(
            FRONT_ENDS[config.modality](config, layers),
            build_encoder(config, layers),
            _head(config),
            objective(config),
        )
    parts = {}
    for name in modalities(config):
        alone = of_modality(config, name)
        parts[name] = StudentPart(FRONT_ENDS[name](alone, layers), _head(alone), objective(alone))
    return JointStudent(_joint_encoder(config, layers), parts)


def build_teacher(config: Config, layers: Layers | None = None) -> Teacher | JointTeacher:
    """The averaged copy of what `teacher.scope` names. Its parameters are called as in the student."""
    if config.modality != JOINT:
        own, prefix = _teacher_front_end(config, layers)
        return Teacher(build_encoder(config, layers), own, objective(config), prefix, _grid(config))
    parts = {}
    for name in modalities(config):
        alone = of_modality(config, name)
        own, prefix = _teacher_front_end(alone, layers)
        parts[name] = TeacherPart(own, objective(alone), prefix, _grid(alone))
    return JointTeacher(_joint_encoder(config, layers), parts)


def _teacher_front_end(config: Config, layers: Layers | None) -> tuple[FrontEnd | None, int]:
    """The teacher's own front end, None where it is the student's, and its prefix tokens."""
    front_end = FRONT_ENDS[config.modality](config, layers)
    return (front_end if config.teacher.scope == "model" else None), front_end.prefix_tokens


def copied_prefixes(config: Config) -> list[str]:
    """Beginnings of the teacher's parameters that follow the student's as they are (`teacher.copied`)."""
    if config.modality != JOINT:
        return [f"encoder.{part}." for part in config.teacher.copied]
    alone = {name: of_modality(config, name).teacher.copied for name in modalities(config)}
    return [f"encoder.parts.{name}.{part}." for name, copied in alone.items() for part in copied]


def joint_name(modality: str, name: str, known: Container[str]) -> str:
    """What the parameter `name` of a modality's own model is called in a joint one, whose names are `known`. Raises
    KeyError where that has none."""
    head, _, tail = name.partition(".")
    candidates = [name, f"parts.{modality}.{name}"]
    if head == "encoder":
        candidates.append(f"encoder.parts.{modality}.{tail}")
        _, _, inner = tail.partition(".")  # of "blocks.3.mlp_norm.weight"
        number, _, inner = inner.partition(".")
        candidates.append(f"encoder.blocks.{number}.parts.{modality}.{inner}")
    for candidate in candidates:
        if candidate in known:
            return candidate
    raise KeyError(name)


def names_in(saved: Collection[str], then: str, ours: Collection[str], now: str) -> dict[str, str]:
    """Parameters that both of two models have, each of a modality or joint: their names in one of `now`, among `ours`,
    to those in one of `then`, among `saved`."""
    if (then == JOINT) == (now == JOINT):
        return {name: name for name in ours if name in saved}
    found = {}
    for name in ours if then == JOINT else saved:
        with suppress(KeyError):
            if then == JOINT:
                found[name] = joint_name(now, name, saved)
            else:
                found[joint_name(then, name, ours)] = name
    return {name: found[name] for name in ours if name in found}


def part_of(name: str) -> str | None:
    """The modality whose own the parameter `name` of a joint model is; None: it is everybody's."""
    match = re.search(r"(?:^|\.)parts\.(\w+)\.", name)
    return match[1] if match else None

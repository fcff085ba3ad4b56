"""From a configuration to the student and teacher modules. The explicit list of modalities is `FRONT_ENDS`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

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
from megad2v.models.data2vec import FrontEnd, ObjectiveSpec, Student, Teacher
from megad2v.models.encoder import Encoder
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


def build_encoder(config: Config, layers: Layers | None = None) -> Encoder:
    """The encoder that `model.*` describes."""
    model = config.model
    return Encoder(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        norm=model.norm,
        eps=model.norm_eps,
        qkv_bias=model.qkv_bias,
        layer_scale=model.layer_scale,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        drop_path=model.drop_path,
        weight=INIT_SCHEMES[model.init].encoder,
        deep_norm=model.deep_norm,
        grid=_grid(config) if model.relative_bias else None,
        positions=ConvPositions(config.speech, model.width) if config.modality == "speech" else None,
        layers=layers,
    )


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


def build_student(config: Config, layers: Layers | None = None) -> Student:
    """Front end, encoder and head, uninitialised (see models.initialise)."""
    return Student(
        FRONT_ENDS[config.modality](config, layers),
        build_encoder(config, layers),
        _head(config),
        objective(config),
    )


def build_teacher(config: Config, layers: Layers | None = None) -> Teacher:
    """The averaged copy of what `teacher.scope` names. Its parameters are called as in the student."""
    front_end = FRONT_ENDS[config.modality](config, layers)
    own = front_end if config.teacher.scope == "model" else None
    return Teacher(build_encoder(config, layers), own, objective(config), front_end.prefix_tokens, _grid(config))

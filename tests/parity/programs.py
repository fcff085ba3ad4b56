"""What differs between modalities in the reference vectors: configuration keys, inputs, names of intermediates."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megad2v.config.modalities import MaskConfig, SpeechConfig, TextConfig, VisionConfig
from megad2v.config.schema import Config, LossConfig, ModelConfig, TargetsConfig, TeacherConfig
from megad2v.modalities.speech import fairseq_keys as speech_keys
from megad2v.modalities.speech.geometry import frame_count
from megad2v.modalities.text import fairseq_keys as text_keys
from megad2v.modalities.text.codecs import PAD
from megad2v.modalities.vision import fairseq_keys as vision_keys
from megad2v.models.data2vec import Student, Teacher

Kept = dict[str, Tensor]
"""Intermediates under the reference's names without their axes, (B, T, D)."""


@dataclass(frozen=True)
class Program:
    """One of the reference's programs beside ours."""

    cases: tuple[str, ...]
    """Of the vectors that came with the project."""
    keys: ModuleType
    """The modality's fairseq_keys."""
    config: Callable[[dict[str, Any], dict[str, Tensor]], Config]
    """Our configuration for the reference's description and the forward's arguments."""
    inputs: Callable[[dict[str, Tensor], Config], tuple[Tensor, Tensor | None]]
    """Raw inputs and padding_bt from the forward's arguments."""
    watch: Callable[[Student, Teacher], Kept]
    """Hooks on both; returns the dict that a forward will fill."""
    layer: str
    """Name of the intermediate that targets are made of, by the number of the teacher's block."""
    padding: Callable[[str, dict[str, Tensor]], Tensor | None] = lambda name, arguments: None
    """Positions, bool (B, T), at which an intermediate is not compared, from its name and the forward's arguments."""
    copied: tuple[str, ...] = ()
    """What of a teacher of scope "model" is the student's after an EMA step: there scope is "encoder" in training."""

    @staticmethod
    def batch_first(name: str, value: Tensor) -> Tensor:
        """The intermediate as (B, T, D), from the axes at the end of its name."""
        axes = name.rpartition("_")[2]
        return value.permute(*(axes.index(axis) for axis in "BTC"))


def _norms(reference: dict[str, Any]) -> dict[str, str]:
    kinds = [("layer_norm_target_layer", "layer"), ("instance_norm_target_layer", "instance")]
    averaged = [("layer_norm_targets", "layer"), ("instance_norm_targets", "instance")]
    return {
        "layer_norm": next((ours for theirs, ours in kinds if reference[theirs]), "none"),
        "average_norm": next((ours for theirs, ours in averaged if reference[theirs]), "none"),
    }


def _loss(reference: dict[str, Any]) -> LossConfig:
    smooth = reference["loss_beta"] > 0
    return LossConfig(kind="smooth_l1" if smooth else "mse", beta=reference["loss_beta"], scale="rsqrt_width")


def _vision_config(description: dict[str, Any], arguments: dict[str, Tensor]) -> Config:
    reference = description["config"]
    return Config(
        model=ModelConfig(
            width=reference["embed_dim"],
            depth=reference["depth"],
            heads=reference["num_heads"],
            # fairseq's port ignores `mlp_ratio`: its blocks are always four times as wide (see the weights' shapes).
            mlp_ratio=4.0,
            layer_scale=reference["layer_scale_init_value"],
            drop_path=reference["drop_path"],
            attention_dropout=reference["attention_dropout"],
            relative_bias=reference["shared_rel_pos_bias"],
        ),
        vision=VisionConfig(image_size=reference["image_size"], patch_size=reference["patch_size"]),
        mask=MaskConfig(
            ratio=reference["num_mask_patches"] / (reference["image_size"] // reference["patch_size"]) ** 2
        ),
        targets=TargetsConfig(
            layers=reference["average_top_k_layers"],
            tensor="block" if reference["end_of_block_targets"] else "ffn",
            **_norms(reference),
        ),
        loss=_loss(reference),
    )


def _vision_inputs(arguments: dict[str, Tensor], config: Config) -> tuple[Tensor, None]:
    return arguments["img"], None


def _vision_watch(student: Student, teacher: Teacher) -> Kept:
    kept: Kept = {}
    student.front_end.register_forward_hook(lambda m, i, o: kept.__setitem__("patch_embed", o[1][:, 1:]))
    student.encoder.register_forward_hook(lambda m, i, o: kept.__setitem__("student_encoder_out", o[0][:, 1:]))
    for index, block in enumerate(teacher.encoder.blocks):
        block.register_forward_hook(lambda m, i, o, n=index: kept.__setitem__(f"teacher_block{n}_end", o[0]))
    return kept


def _conv_layers(formula: str) -> tuple[tuple[int, int, int], ...]:
    """fairseq writes "[(512, 10, 5)] + [(512, 3, 2)] * 4": a sum of lists, each with an optional factor."""
    layers: list[tuple[int, int, int]] = []
    for triple, factor in re.findall(r"\[\(([^)]*)\)\](?:\s*\*\s*(\d+))?", formula):
        channels, kernel, stride = map(int, triple.split(","))
        layers += [(channels, kernel, stride)] * int(factor or 1)
    return tuple(layers)


def _speech_config(description: dict[str, Any], arguments: dict[str, Tensor]) -> Config:
    reference = description["config"]
    width = reference["encoder_embed_dim"]
    return Config(
        modality="speech",
        model=ModelConfig(
            width=width,
            depth=reference["encoder_layers"],
            heads=reference["encoder_attention_heads"],
            mlp_ratio=reference["encoder_ffn_embed_dim"] / width,
            norm="pre" if reference["layer_norm_first"] else "post",
            layer_scale=None,
            qkv_bias="full",
            relative_bias=False,
            head_layers=1,
            dropout=reference["dropout"],
            attention_dropout=reference["attention_dropout"],
            layer_drop=reference["encoder_layerdrop"],
        ),
        speech=SpeechConfig(
            conv_layers=_conv_layers(reference["conv_feature_layers"]),
            conv_bias=reference["conv_bias"],
            extractor_norm="layer" if reference["extractor_mode"] == "layer_norm" else "group",
            position_depth=reference["pos_conv_depth"],
            position_kernel=max(3, reference["conv_pos"] // reference["pos_conv_depth"]),
            position_groups=reference["conv_pos_groups"],
        ),
        targets=TargetsConfig(
            layers=reference["average_top_k_layers"], tensor="ffn", padding="include", **_norms(reference)
        ),
        loss=_loss(reference),
        teacher=TeacherConfig(copied=("positions",) if reference["ema_layers_only"] else ()),
    )


def _speech_inputs(arguments: dict[str, Tensor], config: Config) -> tuple[Tensor, Tensor | None]:
    if "padding_mask" not in arguments:
        return arguments["source"], None
    layers = config.speech.conv_layers
    frames = [frame_count(int((~row).sum()), layers) for row in arguments["padding_mask"]]
    total = frame_count(arguments["source"].shape[1], layers)
    return arguments["source"], torch.arange(total)[None] >= torch.tensor(frames)[:, None]


def _speech_watch(student: Student, teacher: Teacher) -> Kept:
    kept: Kept = {}
    last = student.front_end.convolutions[-1]
    last.register_forward_hook(lambda m, i, o: kept.__setitem__("conv_features", o.transpose(1, 2)))
    student.front_end.register_forward_hook(lambda m, i, o: kept.__setitem__("local_features", o[1]))
    student.encoder.register_forward_hook(lambda m, i, o: kept.__setitem__("student_encoder_out", o[0]))
    for index, block in enumerate(teacher.encoder.blocks):
        block.mlp.register_forward_hook(lambda m, i, o, n=index: kept.__setitem__(f"teacher_layer{n}_fc", o))
    return kept


def _text_config(description: dict[str, Any], arguments: dict[str, Tensor]) -> Config:
    reference, transformer = description["config"], description["config"]["transformer"]
    encoder, width = transformer["encoder"], transformer["encoder"]["embed_dim"]
    student, teacher = (arguments[name] == PAD for name in ("src_tokens", "target_tokens"))
    return Config(
        modality="text",
        model=ModelConfig(
            width=width,
            depth=encoder["layers"],
            heads=encoder["attention_heads"],
            mlp_ratio=encoder["ffn_embed_dim"] / width,
            norm="pre" if encoder["normalize_before"] else "post",
            layer_scale=None,
            qkv_bias="full",
            relative_bias=False,
            head_layers=reference["head_layers"],
            dropout=transformer["dropout"],
            attention_dropout=transformer["attention_dropout"],
            layer_drop=encoder["layerdrop"],
        ),
        text=TextConfig(
            vocabulary=description["vocab"]["size"],
            max_tokens=transformer["max_source_positions"],
            teacher_sees="full" if torch.equal(student, teacher) else "masked_only",
        ),
        targets=TargetsConfig(layers=reference["average_top_k_layers"], tensor="ffn", **_norms(reference)),
        loss=replace(_loss(reference), scale="rsqrt_width" if reference["loss_scale"] <= 0 else "sum"),
        # The vectors' teacher has embeddings of its own, moved away from the student's like all the rest.
        teacher=TeacherConfig(scope="model", copied=("norm",) if reference["ema_transformer_layers_only"] else ()),
    )


def _text_inputs(arguments: dict[str, Tensor], config: Config) -> tuple[Tensor, Tensor]:
    student = arguments["src_tokens"]
    return torch.stack([arguments["target_tokens"], student], dim=1), student == PAD


def _text_watch(student: Student, teacher: Teacher) -> Kept:
    kept: Kept = {}
    student.encoder.register_forward_hook(lambda m, i, o: kept.__setitem__("student_encoder_out", o[0]))
    for index, block in enumerate(teacher.encoder.blocks):
        block.mlp.register_forward_hook(lambda m, i, o, n=index: kept.__setitem__(f"teacher_layer{n}_fc", o))
    return kept


def _text_padding(name: str, arguments: dict[str, Tensor]) -> Tensor:
    """fairseq zeroes padding behind the first norm, and nobody sees it there."""
    return arguments["src_tokens" if name.startswith("student") else "target_tokens"] == PAD


PROGRAMS = {
    "vision": Program(("plain",), vision_keys, _vision_config, _vision_inputs, _vision_watch, "teacher_block{}_end"),
    # The reference keeps a frame that it pads the sequence with (spec 1.4, step 4): compared is what lies before it.
    "speech": Program(
        ("plain", "padded"), speech_keys, _speech_config, _speech_inputs, _speech_watch, "teacher_layer{}_fc"
    ),
    "text": Program(
        ("fairseq", "full"),
        text_keys,
        _text_config,
        _text_inputs,
        _text_watch,
        "teacher_layer{}_fc",
        padding=_text_padding,
        copied=("front_end.",),
    ),
}

"""Our speech settings as those of fairseq's data2vec_audio, and back.

Keys are those of Data2VecAudioConfig and Wav2Vec2Config (examples/data2vec/models/data2vec_audio.py and
fairseq/models/wav2vec/wav2vec2.py at 3d262bb) and of its audio_pretraining task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.modalities.fairseq_cfg import Rules, objective_keys, objective_rules, refuse, with_objective
from megad2v.modalities.keys import mlp_ratio
from megad2v.modalities.speech.fairseq_keys import from_fairseq, to_fairseq
from megad2v.modalities.speech.geometry import SAMPLE_RATE

__all__ = ["from_fairseq", "to_fairseq"]

MODEL, TASK, RECIPES = "data2vec_audio", "audio_pretraining", ("speech_base", "speech_large")
EMA = "_ema"
"""Where the state dict keeps the float32 teacher."""
DROPPED = ()
"""Beginnings of names that data2vec does not use."""

DEFAULT_CONVOLUTIONS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"


def check(config: Config) -> None:
    """Raises UserError when data2vec_audio cannot compute what this configuration describes."""
    model, speech, teacher = config.model, config.speech, config.teacher
    rules: Rules = (
        ("model.norm", model.norm != "post", "is exported post-norm, as every data2vec speech model is; not pre-norm"),
        ("model.layer_scale", model.layer_scale is not None, "has no layer scale"),
        ("model.drop_path", model.drop_path > 0, "has no drop path"),
        ("model.head_layers", model.head_layers != 1, f"has one linear layer as its head, not {model.head_layers}"),
        ("speech.position_depth", speech.position_depth < 2, "norms the weight of a single positional convolution"),
        ("speech.position_kernel", speech.position_kernel < 3, "has positional kernels of at least 3"),
        ("mask.min_spans", config.mask.min_spans != 1, "draws at least one span"),
        ("teacher.scope", teacher.scope != "encoder", "averages all layers' outputs where it averages the whole model"),
        ("teacher.copied", "norm" in teacher.copied, "averages the encoder's first norm; ours copies it"),
    )
    refuse(f"fairseq's {MODEL}", (*rules, *objective_rules(config, "ffn")))


def sections(config: Config) -> dict[str, dict[str, Any]]:
    """`model` and `task` of fairseq's cfg. Values that matter are all written: its defaults are wav2vec 2.0's."""
    model, speech, mask = config.model, config.speech, config.mask
    layers = "[" + ", ".join(f"({c}, {k}, {s})" for c, k, s in speech.conv_layers) + "]"
    return {
        "model": {
            "_name": MODEL,
            "extractor_mode": "layer_norm" if speech.extractor_norm == "layer" else "default",
            "conv_feature_layers": layers,
            "conv_bias": speech.conv_bias,
            "feature_grad_mult": 1.0,
            "encoder_layers": model.depth,
            "encoder_embed_dim": model.width,
            "encoder_ffn_embed_dim": int(model.width * model.mlp_ratio),
            "encoder_attention_heads": model.heads,
            "activation_fn": "gelu",
            "layer_type": "transformer",
            "layer_norm_first": False,
            "dropout": float(model.dropout),
            "attention_dropout": float(model.attention_dropout),
            "activation_dropout": 0.0,
            "encoder_layerdrop": float(model.layer_drop),
            "dropout_input": 0.0,
            "dropout_features": 0.0,
            "pos_conv_depth": speech.position_depth,
            "conv_pos": speech.position_kernel * speech.position_depth,
            "conv_pos_groups": speech.position_groups,
            "mask_prob": float(mask.ratio),
            "mask_length": mask.span,
            "require_same_masks": mask.equal_counts,
            "mask_dropout": 0.0,
            "mask_channel_prob": 0.0,
            "required_seq_len_multiple": 2,
            "ema_transformer_only": True,
            "ema_layers_only": "positions" in config.teacher.copied,
            "max_update": max(1, config.train.steps),
            "min_target_var": float(config.verdict.min_target_std),
            "min_pred_var": float(config.verdict.min_pred_std),
            **objective_keys(config),
        },
        "task": {
            "_name": TASK,
            "data": ".",
            "sample_rate": SAMPLE_RATE,
            "normalize": speech.normalise,
            "max_sample_size": round(speech.max_seconds * SAMPLE_RATE),
            "min_sample_size": round(speech.min_seconds * SAMPLE_RATE),
            "enable_padding": False,
        },
    }


def read(config: Config, model: Mapping[str, Any], task: Mapping[str, Any]) -> Config:
    """`config` as a fairseq `model` and `task` section say. Raises UserError for what our model cannot compute."""
    width, depth = int(model.get("encoder_embed_dim", 768)), int(model.get("pos_conv_depth", 1))
    for key, wrong in (
        ("layer_type", model.get("layer_type", "transformer") != "transformer"),
        ("activation_fn", model.get("activation_fn", "gelu") != "gelu"),
        ("layer_norm_first", model.get("layer_norm_first", False)),
        ("pos_conv_depth", depth < 2),
    ):
        if wrong:
            raise UserError(f"model.{key}: {model.get(key)}; our speech model has no such thing")
    layers_only = bool(model.get("ema_layers_only", True))
    encoder_only = layers_only or bool(model.get("ema_transformer_only", True))
    config = replace(
        config,
        model=replace(
            config.model,
            width=width,
            depth=int(model.get("encoder_layers", 12)),
            heads=int(model.get("encoder_attention_heads", 12)),
            mlp_ratio=mlp_ratio(int(model.get("encoder_ffn_embed_dim", 3072)), width),
            dropout=float(model.get("dropout", 0.1)),
            attention_dropout=float(model.get("attention_dropout", 0.1)),
            layer_drop=float(model.get("encoder_layerdrop", 0.0)),
        ),
        speech=replace(
            config.speech,
            conv_layers=parse_convolutions(model.get("conv_feature_layers", DEFAULT_CONVOLUTIONS)),
            conv_bias=bool(model.get("conv_bias", False)),
            extractor_norm="layer" if model.get("extractor_mode", "default") == "layer_norm" else "group",
            position_depth=depth,
            position_kernel=max(3, int(model.get("conv_pos", 128)) // depth),
            position_groups=int(model.get("conv_pos_groups", 16)),
            normalise=bool(task.get("normalize", False)),
            max_seconds=(task.get("max_sample_size") or 320_000) / SAMPLE_RATE,
            min_seconds=(task.get("min_sample_size") or 32_000) / SAMPLE_RATE,
        ),
        mask=replace(
            config.mask,
            ratio=float(model.get("mask_prob", 0.65)),
            span=int(model.get("mask_length", 10)),
            equal_counts=bool(model.get("require_same_masks", True)),
        ),
        targets=replace(config.targets, padding="include"),  # of theirs (spec 1.6)
        teacher=replace(
            config.teacher,
            scope="encoder" if encoder_only else "model",
            copied=("positions",) if layers_only else (),
        ),
    )
    config = with_objective(config, model)
    if encoder_only:
        return config
    # Where the teacher is the whole model, their program averages the outputs of all layers (spec 1.6).
    return replace(config, targets=replace(config.targets, layers=config.model.depth))


def parse_convolutions(formula: str) -> tuple[tuple[int, int, int], ...]:
    """(channels, kernel, stride) of fairseq's `conv_feature_layers`: a sum of lists of triples, each list with an
    optional factor. fairseq evaluates it; here nothing else than that is understood.

    Raises UserError for another formula.
    """
    term = r"\[((?:\(\d+,\d+,\d+\),?)+)\](?:\*(\d+))?"
    text = re.sub(r"\s", "", str(formula))
    if not re.fullmatch(rf"{term}(?:\+{term})*", text):
        raise UserError(f"model.conv_feature_layers: {formula!r}; expected a sum of [(channels, kernel, stride)] * N")
    layers: list[tuple[int, int, int]] = []
    for triples, factor in re.findall(term, text):
        found = [tuple(map(int, triple)) for triple in re.findall(r"\((\d+),(\d+),(\d+)\)", triples)]
        layers += found * int(factor or 1)
    return tuple(layers)


def averaged(config: Config) -> str:
    """Beginning of the names of what the teacher averages; its own are without it."""
    return "encoder." if config.teacher.scope == "encoder" else ""


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under today's names: they have not changed here."""
    return state


def unused(config: Config) -> dict[str, Tensor]:
    """Parameters that fairseq's model has and data2vec does not use."""
    return {}

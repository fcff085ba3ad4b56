"""Our text settings as those of fairseq's data2vec_text, and back.

Keys are those of Data2VecTextConfig (examples/data2vec/models/data2vec_text.py at 3d262bb), of the TransformerConfig in
it, and of fairseq's masked_lm task.
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
from megad2v.modalities.text.codecs import PAD
from megad2v.modalities.text.fairseq_keys import from_fairseq, to_fairseq

__all__ = ["from_fairseq", "to_fairseq"]

MODEL, TASK, RECIPES = "data2vec_text", "masked_lm", ("text_base_fairseq",)
EMA = "encoder._ema"
"""Where the state dict keeps the float32 teacher."""
_ENCODER = "encoder.sentence_encoder."
DROPPED = ("encoder.lm_head.",)
"""Beginnings of names that data2vec does not use: the released model has RoBERTa's head (fairseq issue 4535)."""


def check(config: Config) -> None:
    """Raises UserError when data2vec_text cannot compute what this configuration describes."""
    model, teacher = config.model, config.teacher
    rules: Rules = (
        ("model.norm", model.norm != "post", "is exported post-norm, as every data2vec text model is; not pre-norm"),
        ("model.layer_scale", model.layer_scale is not None, "has no layer scale"),
        ("model.drop_path", model.drop_path > 0, "has no drop path"),
        ("model.head_layers", model.head_layers < 1, "has a head of at least one layer"),
        (
            "teacher.copied",
            (teacher.scope == "encoder") != ("norm" in teacher.copied),
            "averages the embeddings and their norm together, or copies both (teacher.scope, teacher.copied)",
        ),
    )
    refuse(f"fairseq's {MODEL}", (*rules, *objective_rules(config, "ffn")))


def sections(config: Config) -> dict[str, dict[str, Any]]:
    """`model` and `task` of fairseq's cfg. Values that matter are all written: its defaults are a translator's."""
    model, text, mask = config.model, config.text, config.mask
    encoder = {
        "embed_dim": model.width,
        "ffn_embed_dim": int(model.width * model.mlp_ratio),
        "layers": model.depth,
        "attention_heads": model.heads,
        "normalize_before": False,
        "learned_pos": True,
        "layerdrop": float(model.layer_drop),
    }
    return {
        "model": {
            "_name": MODEL,
            "max_positions": text.max_tokens,
            "head_layers": model.head_layers,
            "load_checkpoint_heads": False,
            "ema_transformer_layers_only": config.teacher.scope == "encoder",
            "transformer": {
                "dropout": float(model.dropout),
                "attention_dropout": float(model.attention_dropout),
                "activation_dropout": 0.0,
                "activation_fn": "gelu",
                "layernorm_embedding": True,
                "no_scale_embedding": True,
                "max_source_positions": text.max_tokens,
                "encoder": encoder,
            },
            **objective_keys(config),
        },
        "task": {
            "_name": TASK,
            "data": ".",
            "sample_break_mode": "complete_doc",
            "tokens_per_sample": text.max_tokens,
            "include_target_tokens": True,
            "mask_prob": float(mask.ratio),
            "mask_multiple_length": mask.span,
            "random_token_prob": float(mask.random),
            "leave_unmasked_prob": float(mask.kept),
            "mask_whole_words": False,
            "seed": config.train.seed,
        },
    }


def read(config: Config, model: Mapping[str, Any], task: Mapping[str, Any]) -> Config:
    """`config` as a fairseq `model` and `task` section say. Raises UserError for what our model cannot compute."""
    transformer = model.get("transformer")
    encoder = transformer.get("encoder") if isinstance(transformer, Mapping) else None
    if not isinstance(encoder, Mapping) or not encoder.get("embed_dim"):
        raise UserError("model.transformer.encoder: not in the file's cfg; it is not that of a data2vec_text model")
    for key, wrong in (
        ("normalize_before", encoder.get("normalize_before", False)),
        ("learned_pos", not encoder.get("learned_pos", False)),
        ("layernorm_embedding", not transformer.get("layernorm_embedding", False)),
        ("no_scale_embedding", not transformer.get("no_scale_embedding", False)),
        ("activation_fn", transformer.get("activation_fn", "relu") != "gelu"),
    ):
        if wrong:
            section = encoder if key in ("normalize_before", "learned_pos") else transformer
            raise UserError(f"model.transformer: {key} is {section.get(key)}; our text model cannot compute that")
    heads = int(model.get("head_layers", 1))
    if heads not in (1, 2):
        raise UserError(f"model.head_layers: {heads}; ours has one or two (model.head_layers)")
    layers_only = bool(model.get("ema_transformer_layers_only", True))
    width, random = int(encoder["embed_dim"]), float(task.get("random_token_prob", 0.1))
    config = replace(
        config,
        model=replace(
            config.model,
            width=width,
            depth=int(encoder["layers"]),
            heads=int(encoder["attention_heads"]),
            mlp_ratio=mlp_ratio(int(encoder["ffn_embed_dim"]), width),
            head_layers=heads,
            dropout=float(transformer.get("dropout", 0.1)),
            attention_dropout=float(transformer.get("attention_dropout", 0.0)),
            layer_drop=float(encoder.get("layerdrop") or 0.0),
        ),
        text=replace(config.text, max_tokens=int(transformer.get("max_source_positions", 1024))),
        mask=replace(
            config.mask,
            ratio=float(task.get("mask_prob", 0.15)),
            span=int(task.get("mask_multiple_length", 1)),
            random=random,
            kept=float(task.get("leave_unmasked_prob", 0.1)),
        ),
        teacher=replace(
            config.teacher,
            scope="encoder" if layers_only else "model",
            copied=("norm",) if layers_only else (),
        ),
    )
    return with_objective(config, model)


def with_vocabulary(config: Config, state: Mapping[str, Tensor]) -> Config:
    """`config` with the numbers of ids and positions that the tables have; the cfg does not say the first. Raises
    UserError where one is not there."""
    tokens, positions = (state.get(f"{_ENCODER}embed_{name}.weight") for name in ("tokens", "positions"))
    if tokens is None or positions is None:
        raise UserError(f"{_ENCODER}embed_tokens.weight and embed_positions.weight: not both in the file")
    rows = len(positions) - PAD - 1
    return replace(config, text=replace(config.text, vocabulary=len(tokens), max_tokens=rows))


def averaged(config: Config) -> str:
    """Beginning of the names of what the teacher averages; its own are without it."""
    return _ENCODER


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under today's names: older files call the encoder, its first norm and the regression head
    otherwise (`upgrade_state_dict_named`)."""

    def today(name: str) -> str:
        name = re.sub(r"^decoder\.", "encoder.", name).replace(".emb_layer_norm.", ".layernorm_embedding.")
        return re.sub(r"^encoder\.lm_head\.(\d+)\.", r"encoder.regression_head.\1.", name)

    return {today(name): value for name, value in state.items()}


def unused(config: Config) -> dict[str, Tensor]:
    """Parameters that fairseq's model has and data2vec does not use."""
    return {}

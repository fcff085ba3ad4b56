"""Our vision settings as those of fairseq's port of data2vec vision, and back.

Keys are those of Data2VecVisionConfig (examples/data2vec/models/data2vec_vision.py at 3d262bb) and of its
image_pretraining task. The port is another program than the one behind the published models, which is the BEiT fork
(spec 3.1): what that computes is refused here, with the key that differs, and goes to beit_keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.modalities.fairseq_cfg import Rules, objective_keys, objective_rules, refuse, with_objective
from megad2v.modalities.vision.fairseq_keys import from_fairseq, to_fairseq
from megad2v.models.initialise import initial_value, torch_default

__all__ = ["from_fairseq", "to_fairseq"]

MODEL, TASK, RECIPES = "data2vec_vision", "image_pretraining", ("vision_base_d2v1",)
EMA = "_ema"
"""Where the state dict keeps the float32 teacher."""
DROPPED = ("final_proj.",)
"""Beginnings of names that data2vec does not use: the port has a head and never calls it (spec 3.1)."""


def check(config: Config) -> None:
    """Raises UserError when the port cannot compute what this configuration describes."""
    model, teacher = config.model, config.teacher
    beit = "export with --to beit"
    rules: Rules = (
        ("model.head_layers", model.head_layers != 0, f"compares the encoder's output itself, without a head; {beit}"),
        ("teacher.scope", teacher.scope != "encoder", f"shares patches and CLS with the teacher; {beit}"),
        ("model.norm", model.norm != "pre", "is pre-norm"),
        ("model.layer_scale", not model.layer_scale, "is exported with layer scale, which all of data2vec's have"),
        ("model.qkv_bias", model.qkv_bias != "no_key", f"has biases on query and value alone, not {model.qkv_bias}"),
        ("model.relative_bias", not model.relative_bias, "has one table of relative positions, and crashes without"),
        ("model.mlp_ratio", model.mlp_ratio != 4.0, "has MLPs four times as wide, whatever its mlp_ratio says"),
        ("model.layer_drop", model.layer_drop > 0, "has no layer drop"),
        ("model.dropout", model.dropout > 0, "has no dropout but in the attention"),
        ("teacher.copied", bool(teacher.copied), "averages all of the encoder"),
    )
    refuse(f"fairseq's {MODEL}", (*rules, *objective_rules(config, "block")))


def sections(config: Config) -> dict[str, dict[str, Any]]:
    """`model` and `task` of fairseq's cfg."""
    model, vision, mask = config.model, config.vision, config.mask
    patches = (vision.image_size // vision.patch_size) ** 2
    return {
        "model": {
            "_name": MODEL,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "in_channels": vision.channels,
            "depth": model.depth,
            "embed_dim": model.width,
            "num_heads": model.heads,
            "mlp_ratio": 4,
            "layer_scale_init_value": float(model.layer_scale or 0.0),
            "shared_rel_pos_bias": True,
            "drop_path": float(model.drop_path),
            "attention_dropout": float(model.attention_dropout),
            "num_mask_patches": round(mask.ratio * patches),
            "min_mask_patches_per_block": mask.min_block,
            "max_mask_patches_per_block": mask.max_block or patches,
            "end_of_block_targets": True,
            "ema_transformer_only": True,
            **objective_keys(config),
        },
        "task": {
            "_name": TASK,
            "data": ".",
            "input_size": vision.image_size,
            "normalization_mean": list(vision.mean),
            "normalization_std": list(vision.std),
        },
    }


def read(config: Config, model: Mapping[str, Any], task: Mapping[str, Any]) -> Config:
    """`config` as a fairseq `model` and `task` section say. Raises UserError for what our model cannot compute."""
    for key, wrong in (
        ("shared_rel_pos_bias", not model.get("shared_rel_pos_bias", True)),
        ("ema_transformer_only", not model.get("ema_transformer_only", True)),
        ("end_of_block_targets", not model.get("end_of_block_targets", True)),
        ("layer_scale_init_value", not model.get("layer_scale_init_value", 1e-4) > 0),
    ):
        if wrong:
            raise UserError(f"model.{key}: {model[key]}; our vision model has no such thing")
    size, patch = int(model.get("image_size", 224)), int(model.get("patch_size", 16))
    patches = (size // patch) ** 2
    config = replace(
        config,
        model=replace(
            config.model,
            width=int(model.get("embed_dim", 768)),
            depth=int(model.get("depth", 12)),
            heads=int(model.get("num_heads", 12)),
            layer_scale=float(model.get("layer_scale_init_value", 1e-4)),
            drop_path=float(model.get("drop_path", 0.1)),
            attention_dropout=float(model.get("attention_dropout", 0.0)),
        ),
        vision=replace(
            config.vision,
            image_size=size,
            patch_size=patch,
            channels=int(model.get("in_channels", 3)),
            mean=tuple(map(float, task.get("normalization_mean", config.vision.mean))),
            std=tuple(map(float, task.get("normalization_std", config.vision.std))),
        ),
        mask=replace(
            config.mask,
            ratio=int(model.get("num_mask_patches", 75)) / patches,
            min_block=int(model.get("min_mask_patches_per_block", 16)),
            max_block=int(model.get("max_mask_patches_per_block", 196)),
        ),
    )
    return with_objective(config, model)


def averaged(config: Config) -> str:
    """Beginning of the names of what the teacher averages; its own are without it."""
    return "encoder."


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under today's names: they have not changed here."""
    return state


def unused(config: Config) -> dict[str, Tensor]:
    """The head that the port has and never calls, as torch starts a Linear: its loader wants one."""
    width = config.model.width
    start = torch_default(width)
    shapes = {"final_proj.weight": torch.Size((width, width)), "final_proj.bias": torch.Size((width,))}
    return {name: initial_value(config.train.seed, name, shape, start) for name, shape in shapes.items()}

"""Our text parameters under fairseq's names and shapes (examples/data2vec/models/data2vec_text.py), and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megad2v.config.schema import Config
from megad2v.modalities.keys import KeyMap

_ENCODER = "encoder.sentence_encoder"
_LAYER = f"{_ENCODER}.layers.*"
_PLAIN = {
    "front_end.tokens.weight": f"{_ENCODER}.embed_tokens.weight",
    "front_end.positions.weight": f"{_ENCODER}.embed_positions.weight",
    "encoder.norm.weight": f"{_ENCODER}.layernorm_embedding.weight",
    "encoder.norm.bias": f"{_ENCODER}.layernorm_embedding.bias",
    "encoder.blocks.*.attention.output.bias": f"{_LAYER}.self_attn.out_proj.bias",
    "encoder.blocks.*.attention_norm.weight": f"{_LAYER}.self_attn_layer_norm.weight",
    "encoder.blocks.*.attention_norm.bias": f"{_LAYER}.self_attn_layer_norm.bias",
    "encoder.blocks.*.mlp.input.weight": f"{_LAYER}.fc1.weight",
    "encoder.blocks.*.mlp.input.bias": f"{_LAYER}.fc1.bias",
    "encoder.blocks.*.mlp.output.bias": f"{_LAYER}.fc2.bias",
    "encoder.blocks.*.mlp_norm.weight": f"{_LAYER}.final_layer_norm.weight",
    "encoder.blocks.*.mlp_norm.bias": f"{_LAYER}.final_layer_norm.bias",
}
_TRANSPOSED = {
    "encoder.blocks.*.attention.output.weight": f"{_LAYER}.self_attn.out_proj.weight",
    "encoder.blocks.*.mlp.output.weight": f"{_LAYER}.fc2.weight",
}
_PROJECTIONS = tuple(f"{_LAYER}.self_attn.{part}_proj" for part in ("q", "k", "v"))
_HEAD = {1: ("head", "encoder.regression_head.0"), 2: ("head.*", "encoder.regression_head.*")}
"""model.head_layers -> names; fairseq's head of one layer is a sequence of one."""
_MAPS = {
    layers: KeyMap(
        "fairseq",
        plain={**_PLAIN, **{f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}},
        transposed=_TRANSPOSED,
        projections=_PROJECTIONS,
    )
    for layers, (ours, theirs) in _HEAD.items()
}
_VERSION = f"{_ENCODER}.version"
_VERSION_NUMBER = 3.0
"""A buffer of theirs. Without it their loader takes a state for one of before 2018, and drops norms."""


def to_fairseq(parameters: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """fairseq's state dict of a student's (or teacher's) parameters."""
    return {
        **_MAPS[config.model.head_layers].to_theirs(parameters, config),
        _VERSION: torch.tensor([_VERSION_NUMBER]),
    }


def from_fairseq(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our parameters from a fairseq state dict. Raises UserError for a tensor that has no place in ours.

    A teacher's state (a sentence encoder alone) has its names without "encoder.sentence_encoder.": add it before.
    """
    kept = {name: value for name, value in state.items() if name != _VERSION}
    return _MAPS[config.model.head_layers].to_ours(kept, config)

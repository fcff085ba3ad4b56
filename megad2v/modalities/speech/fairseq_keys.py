"""Our speech parameters under fairseq's names and shapes (examples/data2vec/models/data2vec_audio.py), and back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megad2v.config.schema import Config
from megad2v.modalities.keys import KeyMap

_CONVOLUTION, _LAYER = "feature_extractor.conv_layers.*", "encoder.layers.*"
_PLAIN = {
    "front_end.mask_token": "mask_emb",
    "front_end.convolutions.*.conv.weight": f"{_CONVOLUTION}.0.weight",
    "front_end.convolutions.*.conv.bias": f"{_CONVOLUTION}.0.bias",
    "front_end.norm.weight": "layer_norm.weight",
    "front_end.norm.bias": "layer_norm.bias",
    "front_end.projection.weight": "post_extract_proj.weight",
    "front_end.projection.bias": "post_extract_proj.bias",
    "encoder.positions.layers.*.weight": "encoder.pos_conv.*.0.weight",
    "encoder.positions.layers.*.bias": "encoder.pos_conv.*.0.bias",
    "encoder.norm.weight": "encoder.layer_norm.weight",
    "encoder.norm.bias": "encoder.layer_norm.bias",
    "encoder.blocks.*.attention.output.bias": f"{_LAYER}.self_attn.out_proj.bias",
    "encoder.blocks.*.attention_norm.weight": f"{_LAYER}.self_attn_layer_norm.weight",
    "encoder.blocks.*.attention_norm.bias": f"{_LAYER}.self_attn_layer_norm.bias",
    "encoder.blocks.*.mlp.input.weight": f"{_LAYER}.fc1.weight",
    "encoder.blocks.*.mlp.input.bias": f"{_LAYER}.fc1.bias",
    "encoder.blocks.*.mlp.output.bias": f"{_LAYER}.fc2.bias",
    "encoder.blocks.*.mlp_norm.weight": f"{_LAYER}.final_layer_norm.weight",
    "encoder.blocks.*.mlp_norm.bias": f"{_LAYER}.final_layer_norm.bias",
    "head.weight": "final_proj.weight",
    "head.bias": "final_proj.bias",
}
_TRANSPOSED = {
    "encoder.blocks.*.attention.output.weight": f"{_LAYER}.self_attn.out_proj.weight",
    "encoder.blocks.*.mlp.output.weight": f"{_LAYER}.fc2.weight",
}
_PROJECTIONS = tuple(f"{_LAYER}.self_attn.{part}_proj" for part in ("q", "k", "v"))
_NORM = {"layer": f"{_CONVOLUTION}.2.1", "group": f"{_CONVOLUTION}.2"}
"""Layer norm lies between two transpositions, group norm does not."""

_MAPS = {
    kind: KeyMap(
        "fairseq",
        plain={**_PLAIN, **{f"front_end.convolutions.*.norm.{p}": f"{place}.{p}" for p in ("weight", "bias")}},
        transposed=_TRANSPOSED,
        projections=_PROJECTIONS,
    )
    for kind, place in _NORM.items()
}


def to_fairseq(parameters: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """fairseq's state dict of a student's (or teacher's) parameters."""
    return _MAPS[config.speech.extractor_norm].to_theirs(parameters, config)


def from_fairseq(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our parameters from a fairseq state dict. Raises UserError for a tensor that has no place in ours.

    A teacher's state (an encoder alone) has its names without "encoder.": add it before.
    """
    return _MAPS[config.speech.extractor_norm].to_ours(state, config)

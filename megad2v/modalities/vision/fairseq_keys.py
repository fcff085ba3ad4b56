"""Our vision parameters under fairseq's names and shapes (examples/data2vec/models/data2vec_vision.py), and back.

Tensors keep their dtype and any linear quantity of theirs (a weight, a gradient) may be mapped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megad2v.config.schema import Config
from megad2v.models.attention import relative_index

_TOP = {
    "front_end.patches.weight": "patch_embed.conv.weight",
    "front_end.patches.bias": "patch_embed.conv.bias",
    "encoder.norm.weight": "encoder.norm.weight",
    "encoder.norm.bias": "encoder.norm.bias",
    "head.weight": "final_proj.weight",
    "head.bias": "final_proj.bias",
}
_BLOCK = {
    "attention_scale.gamma": "gamma_1",
    "mlp_scale.gamma": "gamma_2",
    "attention_norm.weight": "norm1.weight",
    "attention_norm.bias": "norm1.bias",
    "mlp_norm.weight": "norm2.weight",
    "mlp_norm.bias": "norm2.bias",
    "attention.output.bias": "attn.proj.bias",
    "mlp.input.weight": "mlp.0.weight",
    "mlp.input.bias": "mlp.0.bias",
    "mlp.output.bias": "mlp.2.bias",
}
_BLOCK_TRANSPOSED = {"attention.output.weight": "attn.proj.weight", "mlp.output.weight": "mlp.2.weight"}
_TABLE = "encoder.rel_pos_bias.relative_position_bias_table"


def to_fairseq(parameters: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """fairseq's state dict of a student's (or teacher's) parameters."""
    heads = config.model.heads
    out: dict[str, Tensor] = {}
    for name, value in parameters.items():
        if name in _TOP:
            out[_TOP[name]] = value
        elif name in ("front_end.cls_token", "front_end.mask_token"):
            out[name.removeprefix("front_end.").removesuffix("token") + "emb"] = value.view(1, 1, -1)
        elif name == "encoder.relative_bias.table":
            out[_TABLE] = value.t().contiguous()
            grid = (round((value.shape[1] - 3) ** 0.5) + 1) // 2
            out[_TABLE.replace("bias_table", "index")] = relative_index(grid)
        else:
            out.update(_block_to_fairseq(name, value, heads))
    return out


def _block_to_fairseq(name: str, value: Tensor, heads: int) -> dict[str, Tensor]:
    *prefix, key = name.split(".", 3)
    place = ".".join(prefix) + "."
    if key in _BLOCK:
        return {place + _BLOCK[key]: value}
    if key in _BLOCK_TRANSPOSED:
        return {place + _BLOCK_TRANSPOSED[key]: value.t().contiguous()}
    if key == "attention.qkv.weight":
        split = value.view(heads, 3, -1, value.shape[1]).transpose(0, 1)
        return {place + "attn.qkv.weight": split.reshape(value.shape)}
    if key == "attention.qkv.bias":
        query, value_bias = value.view(heads, 2, -1).unbind(1)
        return {place + "attn.q_bias": query.flatten(), place + "attn.v_bias": value_bias.flatten()}
    raise KeyError(f"no fairseq name for the vision parameter {name}")


def from_fairseq(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our parameters from a fairseq state dict; keys that hold no parameter (the position index) are left out.

    A teacher's state (an encoder alone) has its names without "encoder.": add it before.
    """
    heads = config.model.heads
    top = {theirs: ours for ours, theirs in _TOP.items()}
    block = {theirs: ours for ours, theirs in _BLOCK.items()}
    transposed = {theirs: ours for ours, theirs in _BLOCK_TRANSPOSED.items()}
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in top:
            out[top[name]] = value
        elif name in ("cls_emb", "mask_emb"):
            out["front_end." + name.removesuffix("emb") + "token"] = value.flatten()
        elif name == _TABLE:
            out["encoder.relative_bias.table"] = value.t().contiguous()
        elif name.startswith("encoder.blocks."):
            *prefix, key = name.split(".", 3)
            place = ".".join(prefix) + "."
            if key in block:
                out[place + block[key]] = value
            elif key in transposed:
                out[place + transposed[key]] = value.t().contiguous()
            elif key == "attn.qkv.weight":
                split = value.view(3, heads, -1, value.shape[1]).transpose(0, 1)
                out[place + "attention.qkv.weight"] = split.reshape(value.shape)
            elif key == "attn.q_bias":
                pair = torch.stack((value.view(heads, -1), state[place + "attn.v_bias"].view(heads, -1)), dim=1)
                out[place + "attention.qkv.bias"] = pair.flatten()
    return out

"""The encoders of other programs, computed from their own state dicts by torch's functions alone.

Written from those programs and not from our modules: separate query, key and value, matrices the way they are stored,
no Module. So a certificate can compare two independent computations where the other program is not installed. Each
function returns what enters the first block, what leaves each block, and the encoder's output, each (B, T, D).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """What a state dict does not say about itself."""

    heads: int
    eps: float = EPS
    strides: tuple[int, ...] = ()
    """Speech: of the convolutions."""
    position_groups: int = 1
    """Speech: of the convolutional positions."""
    pad: int = 1
    """Text: the id of padding."""


def speech(
    state: State, shape: Shape, waveforms_bs: Tensor, mask_bt: Tensor | None, padding_bt: Tensor | None
) -> list[Tensor]:
    """fairseq's data2vec_audio (spec 1.2 to 1.4), either extractor mode."""
    x_bct = waveforms_bs.unsqueeze(1)
    for number, stride in enumerate(shape.strides):
        place = f"feature_extractor.conv_layers.{number}"
        x_bct = F.conv1d(x_bct, state[f"{place}.0.weight"], state.get(f"{place}.0.bias"), stride=stride)
        if f"{place}.2.1.weight" in state:
            norm = F.layer_norm(x_bct.mT, x_bct.shape[1:2], state[f"{place}.2.1.weight"], state[f"{place}.2.1.bias"])
            x_bct = norm.mT
        elif f"{place}.2.weight" in state:
            x_bct = F.group_norm(x_bct, x_bct.shape[1], state[f"{place}.2.weight"], state[f"{place}.2.bias"])
        x_bct = F.gelu(x_bct)
    x_btd = _linear(state, "post_extract_proj", _norm(state, "layer_norm", x_bct.mT, EPS))
    if mask_bt is not None:
        x_btd = torch.where(mask_bt[..., None], state["mask_emb"], x_btd)
    if padding_bt is not None:
        x_btd = x_btd * ~padding_bt[..., None]
    return _post_norm(state, "encoder.", speech_positions(state, shape, x_btd), "layer_norm", shape, padding_bt)


def speech_positions(state: State, shape: Shape, x_btd: Tensor) -> Tensor:
    """x and its convolutional positions, (B, T, D)."""
    y_bct, number = x_btd.mT, 0
    while (place := f"encoder.pos_conv.{number}.0") + ".weight" in state:
        weight = state[f"{place}.weight"]
        y_bct = F.conv1d(
            y_bct, weight, state[f"{place}.bias"], padding=weight.shape[2] // 2, groups=shape.position_groups
        )
        if weight.shape[2] % 2 == 0:
            y_bct = y_bct[..., :-1]
        y_bct = F.gelu(F.layer_norm(y_bct.mT, y_bct.shape[1:2]).mT)
        number += 1
    return x_btd + y_bct.mT


def text(state: State, shape: Shape, ids_bt: Tensor) -> list[Tensor]:
    """fairseq's data2vec_text (spec 2.3)."""
    prefix = "encoder.sentence_encoder."
    real = ids_bt != shape.pad
    places = real.long().cumsum(1) * real + shape.pad
    x_btd = state[f"{prefix}embed_tokens.weight"][ids_bt] + state[f"{prefix}embed_positions.weight"][places]
    padding = ~real if not real.all() else None
    return _post_norm(state, prefix, x_btd, "layernorm_embedding", shape, padding)


def _post_norm(
    state: State, prefix: str, x_btd: Tensor, first: str, shape: Shape, padding_bt: Tensor | None
) -> list[Tensor]:
    """The first norm, and the layers behind it (spec 1.4, step 6)."""
    states = [_norm(state, prefix + first, x_btd, shape.eps)]
    while f"{(place := f'{prefix}layers.{len(states) - 1}.')}fc1.weight" in state:
        x_btd = states[-1]
        parts = [_linear(state, f"{place}self_attn.{part}_proj", x_btd) for part in ("q", "k", "v")]
        attended = _attend(*parts, shape.heads, _hidden(padding_bt, x_btd))
        x_btd = x_btd + _linear(state, f"{place}self_attn.out_proj", attended)
        x_btd = _norm(state, f"{place}self_attn_layer_norm", x_btd, shape.eps)
        branch = _linear(state, f"{place}fc2", F.gelu(_linear(state, f"{place}fc1", x_btd)))
        states.append(_norm(state, f"{place}final_layer_norm", x_btd + branch, shape.eps))
    return [*states, states[-1]]


@dataclass(frozen=True)
class VisionNames:
    """What the two vision programs call the same things."""

    patches: str
    cls: str
    mask: str
    encoder: str
    first: str
    """The MLP's first and second matrix."""
    second: str


PORT = VisionNames("patch_embed.conv", "cls_emb", "mask_emb", "encoder.", "mlp.0", "mlp.2")
FORK = VisionNames("patch_embed.proj", "cls_token", "mask_token", "", "mlp.fc1", "mlp.fc2")


def vision(state: State, shape: Shape, names: VisionNames, images_bchw: Tensor, mask_bt: Tensor | None) -> list[Tensor]:
    """fairseq's port (spec 3.2) and the BEiT fork, which differ in names and in the norms' epsilon."""
    kernel = state[f"{names.patches}.weight"]
    patches = F.conv2d(images_bchw, kernel, state[f"{names.patches}.bias"], stride=kernel.shape[2:])
    x_btd = patches.flatten(2).mT
    if mask_bt is not None:
        x_btd = torch.where(mask_bt[..., None], state[names.mask].view(1, 1, -1), x_btd)
    x_btd = torch.cat((state[names.cls].view(1, 1, -1).expand(len(x_btd), 1, -1), x_btd), dim=1)
    bias = _relative_bias(state[f"{names.encoder}rel_pos_bias.relative_position_bias_table"], patches.shape[2])
    states = [x_btd]
    while f"{(place := f'{names.encoder}blocks.{len(states) - 1}.')}norm1.weight" in state:
        x_btd = states[-1]
        query_bias, value_bias = state[f"{place}attn.q_bias"], state[f"{place}attn.v_bias"]
        biases = torch.cat((query_bias, torch.zeros_like(query_bias), value_bias))
        inner = _norm(state, f"{place}norm1", x_btd, shape.eps)
        parts = F.linear(inner, state[f"{place}attn.qkv.weight"], biases).chunk(3, dim=-1)
        attended = _linear(state, f"{place}attn.proj", _attend(*parts, shape.heads, bias))
        x_btd = x_btd + state[f"{place}gamma_1"] * attended
        inner = F.gelu(_linear(state, f"{place}{names.first}", _norm(state, f"{place}norm2", x_btd, shape.eps)))
        states.append(x_btd + state[f"{place}gamma_2"] * _linear(state, f"{place}{names.second}", inner))
    return [*states, _norm(state, f"{names.encoder}norm", states[-1], shape.eps)]


def _relative_bias(table_eh: Tensor, grid: int) -> Tensor:
    """(heads, 1 + T, 1 + T) of BEiT's table: an entry for each offset, then CLS to patch, patch to CLS, CLS to CLS."""
    rows, columns = torch.arange(grid).repeat_interleave(grid), torch.arange(grid).repeat(grid)
    down = rows[:, None] - rows + grid - 1
    right = columns[:, None] - columns + grid - 1
    index = torch.empty(grid * grid + 1, grid * grid + 1, dtype=torch.long)
    index[1:, 1:] = down * (2 * grid - 1) + right
    index[0, :], index[:, 0], index[0, 0] = len(table_eh) - 3, len(table_eh) - 2, len(table_eh) - 1
    return table_eh[index].permute(2, 0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Softmax attention of (B, T, D) in `heads` heads."""
    batch, length, width = query.shape
    query, key, value = (x.view(batch, length, heads, width // heads).transpose(1, 2) for x in (query, key, value))
    logits = query @ key.mT * (width // heads) ** -0.5
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).reshape(batch, length, width)


def _hidden(padding_bt: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to the logits so that nobody attends to padding."""
    if padding_bt is None:
        return None
    return torch.zeros(padding_bt.shape, dtype=like.dtype).masked_fill(padding_bt, float("-inf"))[:, None, None]


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

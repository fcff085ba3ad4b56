"""Our vision parameters under the names of the program that trained the published models, and back.

That is the BEiT fork, facebookresearch/data2vec_vision (beit/modeling_cyclical.py); its checkpoints hold such a state
dict under "model" for the student and under "model_ema" for the teacher, the head included (utils.save_model). Shapes
and layout are those of fairseq's port, which renamed what it took over: so do we.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.modalities.vision.fairseq_keys import from_fairseq, to_fairseq

_WHOLE = {
    "cls_token": "cls_emb",
    "mask_token": "mask_emb",
}
_PREFIXES = {
    "patch_embed.proj.": "patch_embed.conv.",
    "rel_pos_bias.": "encoder.rel_pos_bias.",
    "norm.": "encoder.norm.",
    "lm_head.": "final_proj.",
    "blocks.": "encoder.blocks.",
}
_LAYERS = {".mlp.fc1.": ".mlp.0.", ".mlp.fc2.": ".mlp.2."}
INDEX = "rel_pos_bias.relative_position_index"
"""A buffer, the same for every model of a grid: read past, and written from the grid."""


def to_beit(parameters: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The program's state dict of a student's (or, without the head, a teacher's) parameters. Tensors keep their dtype,
    and any linear quantity of theirs may be mapped. Raises KeyError for a parameter that has no counterpart."""
    prefixes = {fairseq: beit for beit, fairseq in _PREFIXES.items()}
    whole = {fairseq: beit for beit, fairseq in _WHOLE.items()}
    layers = {fairseq: beit for beit, fairseq in _LAYERS.items()}
    fairseq = to_fairseq(parameters, config)
    return {_rename(name, whole, prefixes, layers): value for name, value in fairseq.items()}


def from_beit(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our parameters from such a state dict. Raises UserError for a tensor that has no place in our model, such as
    absolute positions or a bias table per block, which other BEiT models have."""
    renamed = {_rename(name, _WHOLE, _PREFIXES, _LAYERS): name for name in state if name != INDEX}
    ours = from_fairseq({fairseq: state[beit] for fairseq, beit in renamed.items()}, config)
    placed = to_beit(ours, config)
    for name in state:
        if name not in placed and name != INDEX:
            raise UserError(f"{name}: our vision model has no such parameter")
    return ours


def _rename(name: str, whole: dict[str, str], prefixes: dict[str, str], layers: dict[str, str]) -> str:
    name = whole.get(name, name)
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    for theirs, ours in layers.items():
        name = name.replace(theirs, ours)
    return name

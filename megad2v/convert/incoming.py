"""What files of other programs hold, in our names: fairseq's checkpoints and the BEiT fork's. Nothing is run from them.

Hugging Face's folders: hf_incoming.py.
"""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megad2v.config.load import load_config
from megad2v.config.schema import Config
from megad2v.convert import plain
from megad2v.convert.certificate import Theirs
from megad2v.convert.foreign import Mapped, fit, parameter_shapes, understood, with_key_biases
from megad2v.convert.torch_file import read_torch_file, tensors_of
from megad2v.errors import UserError
from megad2v.modalities.fairseq_cfg import with_training
from megad2v.modalities.keys import Example, mlp_ratio
from megad2v.modalities.speech import fairseq_config as speech_fairseq
from megad2v.modalities.text import fairseq_config as text_fairseq
from megad2v.modalities.text.byte_level import import_byte_level
from megad2v.modalities.text.tokenizer import ABOUT_FILE, Tokenizer
from megad2v.modalities.vision import fairseq_config as vision_fairseq
from megad2v.modalities.vision.beit_keys import from_beit, to_beit

FAIRSEQ: dict[str, ModuleType] = {"speech": speech_fairseq, "text": text_fairseq, "vision": vision_fairseq}
"""fairseq's models: see modalities/speech/fairseq_config.py for what each module offers."""
LARGE = 24
"""Blocks of the released large models."""
INCEPTION = (0.5, 0.5, 0.5)
"""Mean and deviation that the BEiT fork normalises with, unless told to take ImageNet's."""
BEIT_EPS = 1e-6
"""Of the BEiT fork's norms (spec 3.1)."""


@dataclass
class Incoming:
    """A model of another program in our names: what its file holds, and no more."""

    program: str
    config: Config
    student: dict[str, Tensor]
    forward: Theirs
    """Its own hidden states."""
    teacher: dict[str, Tensor] = field(default_factory=dict)
    teacher_forward: Theirs | None = None
    """Those of the model with the teacher's weights; None where the file has no teacher."""
    step: int = 0
    report: list[str] = field(default_factory=list)
    """For people: what the file says that is unusual, and what was left out."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What `student` was made of, in the file's own names and layout."""
    teacher_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    to_theirs: Mapped | None = None
    """The key map back: what is stored has to become `tensors` again."""
    tokenizer: Tokenizer | None = None
    rounded: bool = False
    """Whether some of `student` are sums of what the file holds, rounded to float32."""


class _Cast(Mapping[str, Tensor]):
    """A state dict in `dtype`, a tensor at a time as it is asked for: no second model in memory."""

    def __init__(self, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._state, self._dtype = state, dtype

    def __getitem__(self, name: str) -> Tensor:
        value = self._state[name]
        return value.to(self._dtype) if value.is_floating_point() else value

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def plain_forward(modality: str, state: Mapping[str, Tensor], shape: plain.Shape) -> Theirs:
    """fairseq's hidden states from its state dict (see convert/plain.py)."""

    def run(example: Example, dtype: torch.dtype) -> list[Tensor]:
        cast = _Cast(state, dtype)
        if modality == "speech":
            return plain.speech(cast, shape, example.inputs, example.mask_bt, example.padding_bt)
        if modality == "text":
            return plain.text(cast, shape, example.inputs[:, 0])
        names = plain.PORT if "cls_emb" in cast else plain.FORK
        return plain.vision(cast, shape, names, example.inputs, example.mask_bt)

    return run


def plain_shape(modality: str, model: Mapping[str, Any]) -> plain.Shape:
    """What fairseq's cfg, section model, says beside the state dict."""
    if modality == "text":
        return plain.Shape(int(model["transformer"]["encoder"]["attention_heads"]))
    if modality == "vision":
        return plain.Shape(int(model.get("num_heads", 12)))
    layers = speech_fairseq.parse_convolutions(
        model.get("conv_feature_layers", speech_fairseq.DEFAULT_CONVOLUTIONS),
    )
    return plain.Shape(
        int(model.get("encoder_attention_heads", 12)),
        strides=tuple(stride for _, _, stride in layers),
        position_groups=int(model.get("conv_pos_groups", 16)),
    )


# --- fairseq


def read_fairseq(path: Path, tokenizer: Path | None = None) -> Incoming:
    """A checkpoint of fairseq's data2vec_audio, data2vec_text or data2vec_vision.

    `tokenizer`: tokenizer.json, vocab.json or a folder with one, for text. Raises UserError for another model's file,
    for settings that ours cannot compute, and as `fit` and `read_torch_file`.
    """
    file = read_torch_file(path)
    cfg = fairseq_cfg(file, path)
    model = cfg["model"]
    modality = _modality(str(model.get("_name")), path)
    keys = FAIRSEQ[modality]
    state = dict(file["model"]) if isinstance(file.get("model"), Mapping) else {}
    averaged = state.pop(keys.EMA, None)
    state = keys.renamed(tensors_of(state, f"{path}, model"))
    config = understood(f"{path}, cfg", lambda: _fairseq_config(file, cfg, modality, state))
    student, left = fit(
        state,
        config,
        keys.to_fairseq,
        keys.from_fairseq,
        where=f"{path}, model",
        names=parameter_shapes(config),
        dropped=keys.DROPPED,
    )
    shape = plain_shape(modality, model)
    forward, step = plain_forward(modality, state, shape), config.train.steps
    found = Incoming(f"fairseq's {keys.MODEL}", config, student, forward, step=step)
    found.tensors, found.to_theirs = state, keys.to_fairseq
    if left:
        found.report.append(f"left out, since data2vec does not use them: {', '.join(left)}")
    if modality == "text":
        find_tokenizer(path.parent, tokenizer, found)
    elif tokenizer is not None:
        raise UserError(f"--tokenizer: is for text; {path} holds a {keys.MODEL}")
    if averaged is not None:
        _add_teacher(found, state, tensors_of(averaged, f"{path}, model, {keys.EMA}"), keys, shape, path)
    return found


def _fairseq_config(
    file: Mapping[str, Any], cfg: Mapping[str, Any], modality: str, state: Mapping[str, Tensor]
) -> Config:
    """The recipe of that modality and size with what the file says otherwise."""
    keys, model = FAIRSEQ[modality], cfg["model"]
    large = modality == "speech" and int(model.get("encoder_layers", 12)) >= LARGE
    base = load_config(keys.RECIPES[-1 if large else 0])
    config = with_training(keys.read(base, model, cfg.get("task") or {}), cfg)
    if modality == "text":
        config = text_fairseq.with_vocabulary(config, state)
    return with_key_biases(replace(config, train=replace(config.train, steps=_updates(file))), state)


def _add_teacher(
    found: Incoming,
    state: Mapping[str, Tensor],
    averaged: Mapping[str, Tensor],
    keys: ModuleType,
    shape: plain.Shape,
    path: Path,
) -> None:
    config, prefix = found.config, keys.averaged(found.config)
    theirs = {prefix + name: value for name, value in averaged.items()}
    names = parameter_shapes(config, "teacher")
    # Parts that the program averages, or copies, and ours takes from the student: embeddings, an unused head.
    dropped = (*keys.to_fairseq(parameter_shapes(config), config), *keys.DROPPED)
    found.teacher, _ = fit(
        theirs,
        config,
        keys.to_fairseq,
        keys.from_fairseq,
        where=f"{path}, model, {keys.EMA}",
        names=names,
        lacking=(),
        dropped=dropped,
    )
    found.teacher_tensors = {n: v for n, v in theirs.items() if n in keys.to_fairseq(names, config)}
    merged = {**state, **found.teacher_tensors}
    found.teacher_forward = plain_forward(config.modality, merged, shape)


def fairseq_cfg(file: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings of a fairseq checkpoint: its cfg, or the flat arguments of older ones as one section.

    Raises UserError where there are none.
    """
    cfg = file.get("cfg")
    if isinstance(cfg, Mapping) and isinstance(cfg.get("model"), Mapping):
        return dict(cfg)
    arguments = file.get("args")
    if isinstance(arguments, argparse.Namespace):
        flat = vars(arguments)
        return {"model": {"_name": flat.get("arch"), **flat}, "task": flat}
    raise UserError(f"{path}: no checkpoint of fairseq's (it has neither cfg nor args); --from hf and beit read others")


def _modality(name: str, path: Path) -> str:
    for modality, keys in FAIRSEQ.items():
        if name == keys.MODEL:
            return modality
    known = ", ".join(keys.MODEL for keys in FAIRSEQ.values())
    why = {
        "data2vec_multi": " (that is data2vec 2.0)",
        "wav2vec_ctc": " (that is fine-tuned: name the pretrained one)",
        "data2vec_text_classification": " (that is fine-tuned: name the pretrained one)",
        "data2vec_image_classification": " (that is fine-tuned: name the pretrained one)",
    }
    raise UserError(f"{path}: holds fairseq's {name}{why.get(name, '')}; expected one of {known}")


def _updates(file: Mapping[str, Any]) -> int:
    history = file.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else {}
    return int(last.get("num_updates", 0)) if isinstance(last, Mapping) else 0


def find_tokenizer(folder: Path, named: Path | None, found: Incoming) -> None:
    """Give `found` the tokenizer that `named` means (one of ours, or a byte-level BPE's files), else the one in
    `folder`, where it is one that we can use; if not, the report says so.

    Raises UserError where `named` does not read, or is of another size than the model.
    """
    beside = (folder / "tokenizer" / ABOUT_FILE, folder / "tokenizer.json", folder / "vocab.json")
    place = named if named is not None else next((path for path in beside if path.exists()), None)
    if place is None:
        return
    try:
        found.tokenizer = _tokenizer(place, found.config.text.vocabulary)
    except UserError as error:
        if named is not None:
            raise
        found.report.append(f"tokenizer left out ({error})")


def _tokenizer(place: Path, vocabulary: int | None) -> Tokenizer:
    if place.name == ABOUT_FILE or (place / ABOUT_FILE).exists():
        tokenizer = Tokenizer.load(place.parent if place.name == ABOUT_FILE else place)
    else:
        tokenizer = import_byte_level(place)
    if tokenizer.vocabulary != vocabulary:
        raise UserError(f"{place}: has {tokenizer.vocabulary} ids, the model {vocabulary}; name the model's own")
    return tokenizer


# --- the BEiT fork


def read_beit(path: Path) -> Incoming:
    """A checkpoint of the BEiT fork (facebookresearch/data2vec_vision): "model", "model_ema", or a bare state dict.

    Raises UserError for another model's file, and as `fit` and `read_torch_file`.
    """
    file = read_torch_file(path)
    bare = next((file[key] for key in ("model", "module") if isinstance(file.get(key), Mapping)), file)
    state = tensors_of(bare, f"{path}, model")
    config = understood(str(path), lambda: _with_arguments(_beit_config(state, path), file.get("args")))
    config = replace(config, train=replace(config.train, steps=0))
    take = partial(fit, config=config, to_theirs=to_beit, to_ours=from_beit)
    student, _ = take(state, where=f"{path}, model", names=parameter_shapes(config))
    shape = plain.Shape(config.model.heads, BEIT_EPS)
    found = Incoming("the BEiT fork's model", config, student, plain_forward("vision", state, shape))
    found.tensors, found.to_theirs = state, to_beit
    if isinstance(file.get("model_ema"), Mapping):
        averaged = tensors_of(file["model_ema"], f"{path}, model_ema")
        names = parameter_shapes(config, "teacher")
        where = f"{path}, model_ema"
        found.teacher, _ = take(averaged, where=where, names=names, lacking=("front_end.mask_token",), dropped=("lm_",))
        found.teacher_tensors = averaged
        found.teacher_forward = plain_forward("vision", {**state, **averaged}, shape)
    return found


def _beit_config(state: Mapping[str, Tensor], path: Path) -> Config:
    """The published recipe at the size of the tensors."""
    table, patches = (
        state.get(name) for name in ("rel_pos_bias.relative_position_bias_table", "patch_embed.proj.weight")
    )
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if table is None or patches is None or hidden is None:
        fine_tuned = "blocks.0.attn.relative_position_bias_table" in state
        why = "is fine-tuned (a bias table per block)" if fine_tuned else "is no model of the BEiT fork"
        raise UserError(f"{path}: {why}; expected a pretrained one, with rel_pos_bias.relative_position_bias_table")
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    grid = (round(math.sqrt(len(table) - 3)) + 1) // 2
    base = load_config("vision_large" if depth >= LARGE else "vision_base")
    width, patch = patches.shape[0], patches.shape[2]
    model = replace(
        base.model,
        width=width,
        depth=depth,
        heads=table.shape[1],
        mlp_ratio=mlp_ratio(hidden.shape[0], width),
        norm_eps=BEIT_EPS,
    )
    vision = replace(base.vision, image_size=grid * patch, patch_size=patch, channels=patches.shape[1])
    layers = min(base.targets.layers, depth)
    return replace(base, model=model, vision=vision, targets=replace(base.targets, layers=layers))


def _with_arguments(config: Config, arguments: Any) -> Config:
    """What the fork's arguments say of the objective, where the file has them."""
    given = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    if not isinstance(given, Mapping):
        return config
    model, loss, targets, vision = config.model, config.loss, config.targets, config.vision
    if given.get("drop_path") is not None:
        model = replace(model, drop_path=float(given["drop_path"]))
    if given.get("l1_beta"):
        loss = replace(loss, beta=float(given["l1_beta"]))
    blocks = given.get("target_layers")
    if isinstance(blocks, str):
        targets = replace(targets, layers=min(len(ast.literal_eval(blocks)), model.depth) or targets.layers)
    if given.get("imagenet_default_mean_and_std") is False:  # else the recipe's, which is ImageNet's
        vision = replace(vision, mean=INCEPTION, std=INCEPTION)
    if given.get("normalization_mean") and given.get("normalization_std"):  # in files of ours
        mean, std = (tuple(map(float, given[f"normalization_{name}"])) for name in ("mean", "std"))
        vision = replace(vision, mean=mean, std=std)
    return replace(config, model=model, loss=loss, targets=targets, vision=vision)

"""A folder of Hugging Face's data2vec models in our names: config.json, weights, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megad2v.config.load import load_config
from megad2v.config.schema import Config
from megad2v.convert.certificate import Theirs, of_transformers, quiet, require_transformers
from megad2v.convert.foreign import MAY_LACK, fit, parameter_shapes, understood, with_key_biases
from megad2v.convert.incoming import LARGE, Incoming, find_tokenizer
from megad2v.convert.torch_file import read_torch_file, tensors_of
from megad2v.errors import UserError
from megad2v.modalities.build import HUGGING_FACE
from megad2v.modalities.keys import Example, mlp_ratio
from megad2v.modalities.speech.geometry import SAMPLE_RATE
from megad2v.modalities.text.codecs import PAD
from megad2v.modalities.text.hf_keys import POSITIONS, SEGMENTS

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_DROPPED = ("lm_head.", "pooler.", "classifier.", "projector.", "qa_outputs.")
"""Beginnings of parameters that belong to a task."""


def read_hugging_face(folder: Path, tokenizer: Path | None = None) -> Incoming:
    """A folder as `save_pretrained` writes it. Raises UserError for another kind of model, for settings that ours
    cannot compute, and as `fit`."""
    transformers = require_transformers()
    settings = _settings(folder)
    modality, read = _reader(settings, folder)
    config = understood(str(folder / "config.json"), lambda: read(_recipe(modality, settings), settings))
    config, report = _with_processor(config, folder)
    config = replace(config, train=replace(config.train, steps=0))
    keys = HUGGING_FACE[modality]
    keys.check(config)
    state, left = _without_prefix(_weights(folder), f"data2vec_{settings['model_type'].split('-')[1]}.")
    config = with_key_biases(config, state)
    mean_pooling = modality == "vision" and settings.get("use_mean_pooling", True)
    student, dropped = fit(
        state,
        config,
        keys.to_hugging_face,
        keys.from_hugging_face,
        where=str(folder),
        names=parameter_shapes(config),
        # With mean pooling there is no norm behind the encoder, but one behind the mean.
        lacking=(*MAY_LACK, "encoder.norm.") if mean_pooling else MAY_LACK,
        dropped=_DROPPED,
    )
    forward = _forward(transformers, folder, None if not mean_pooling else config.model.norm_eps)
    found = Incoming(f"Hugging Face's {keys.MODEL_CLASS}", config, student, forward)
    found.tensors, found.to_theirs = state, keys.to_hugging_face
    found.report += report
    if left or dropped:
        found.report.append(f"left out, since they belong to a task: {', '.join((*left, *dropped))}")
    if modality == "text":
        found.rounded = bool(state[SEGMENTS].any())
        if found.rounded:  # the two tables became one
            found.tensors = {name: value for name, value in state.items() if name not in (SEGMENTS, POSITIONS)}
        find_tokenizer(folder, tokenizer, found)
    elif tokenizer is not None:
        raise UserError(f"--tokenizer: is for text; {folder} holds a {keys.MODEL_CLASS}")
    trained = _recipe(modality, settings).model.norm_eps
    if modality == "vision" and config.model.norm_eps != trained:
        found.report.append(
            f"model.norm_eps {config.model.norm_eps:g}, as its config.json says and transformers computes (the program "
            f"that trained the released models: {trained:g})"
        )
    return found


def _recipe(modality: str, settings: Mapping[str, Any]) -> Config:
    """The published recipe of that modality nearest in depth."""
    depth = int(settings.get("num_hidden_layers", 12))
    small, large = {
        "speech": ("speech_base", "speech_large"),
        "text": ("text_base_fairseq", "text_large"),
        "vision": ("vision_base", "vision_large"),
    }[modality]
    base = load_config(large if depth >= LARGE else small)
    return replace(base, targets=replace(base.targets, layers=min(base.targets.layers, depth)))


def _with_processor(config: Config, folder: Path) -> tuple[Config, list[str]]:
    """What preprocessor_config.json says of raw samples, and where there is none, what is taken instead."""
    path = folder / "preprocessor_config.json"
    if config.modality == "text":
        return config, []
    if not path.exists():
        vision = config.vision
        taken = f"waveforms to mean 0 and variance 1 (speech.normalise {config.speech.normalise})"
        if config.modality == "vision":
            taken = f"pixels with vision.mean {list(vision.mean)}, vision.std {list(vision.std)}"
        return config, [f"{path.name}: not in the folder; the recipe normalises {taken}"]

    def read() -> Config:
        said = json.loads(path.read_text(encoding="utf-8"))
        if config.modality == "speech":
            _refuse(said, {"sampling_rate": SAMPLE_RATE}, path.name)
            normalise = bool(said.get("do_normalize", config.speech.normalise))
            return replace(config, speech=replace(config.speech, normalise=normalise))
        _refuse(said, {"do_rescale": True, "rescale_factor": 1 / 255}, path.name)
        mean, std = (said.get(f"image_{name}", getattr(config.vision, name)) for name in ("mean", "std"))
        if not said.get("do_normalize", True):
            mean, std = (0.0,) * 3, (1.0,) * 3
        return replace(config, vision=replace(config.vision, mean=_three(mean), std=_three(std)))

    return understood(str(path), read), []


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["model_type"]
    except FileNotFoundError:
        raise UserError(f"{folder}: not a folder of Hugging Face's (it has no config.json)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the settings of a model ({error!r}); copy the folder again") from None
    return settings


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors, float32. Raises UserError where there is no file of weights, or it is not whole."""
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder}: no weights here (one of {', '.join(WEIGHTS)})")
    if path.suffix == ".bin":
        return tensors_of(read_torch_file(path), str(path))
    try:
        files = [path.name]
        if path.suffix == ".json":
            files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        state = {name: value for file in files for name, value in load_file(folder / Path(file).name).items()}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not readable ({error}); copy the folder again") from None
    return tensors_of(state, str(path))


def _without_prefix(state: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """Models for a task hold the encoder under a name of their own; beside it stands what belongs to the task."""
    if not any(name.startswith(prefix) for name in state):
        return state, []
    inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return inner, [name for name in state if not name.startswith(prefix)]


def _forward(transformers: Any, folder: Path, new_norm: float | None) -> Theirs:
    """Of what transformers loads from the folder. `new_norm`: epsilon of a norm that it has not behind the encoder, and
    that starts in ours as one without weights."""
    with quiet(transformers):
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    model.config.apply_spec_augment = True  # else the mask that is asked for would be passed over
    run = of_transformers(model)

    def forward(example: Example, dtype: torch.dtype) -> list[Tensor]:
        states = run(example, dtype)
        if new_norm is not None:
            states[-1] = F.layer_norm(states[-1], states[-1].shape[-1:], eps=new_norm)
        return states

    return forward


Reader = Callable[[Config, Mapping[str, Any]], Config]


def _reader(settings: Mapping[str, Any], folder: Path) -> tuple[str, Reader]:
    kind = settings["model_type"]
    readers: dict[str, tuple[str, Reader]] = {
        "data2vec-audio": ("speech", _speech),
        "data2vec-text": ("text", _text),
        "data2vec-vision": ("vision", _vision),
    }
    if not isinstance(kind, str) or kind not in readers:
        raise UserError(f"{folder}: holds a model of type {kind}; expected {', '.join(readers)}")
    return readers[kind]


def _refuse(settings: Mapping[str, Any], wanted: Mapping[str, Any], file: str = "config.json") -> None:
    """Raises UserError for a setting that is not what ours computes; `wanted` is it, and transformers' default."""
    for key, value in wanted.items():
        if settings.get(key, value) != value:
            raise UserError(f"{file}, {key}: {settings[key]}; our model knows {value} alone")


def _encoder(config: Config, settings: Mapping[str, Any], *, dropout: str, attention: str, eps: float) -> Config:
    width = int(settings.get("hidden_size", 768))
    model = replace(
        config.model,
        width=width,
        depth=int(settings.get("num_hidden_layers", 12)),
        heads=int(settings.get("num_attention_heads", 12)),
        mlp_ratio=mlp_ratio(int(settings.get("intermediate_size", 3072)), width),
        norm_eps=float(settings.get("layer_norm_eps", eps)),
        dropout=float(settings.get(dropout, config.model.dropout)),
        attention_dropout=float(settings.get(attention, config.model.attention_dropout)),
    )
    return replace(config, model=model)


def _speech(config: Config, settings: Mapping[str, Any]) -> Config:
    _refuse(settings, {"hidden_act": "gelu", "feat_extract_activation": "gelu", "add_adapter": False})
    defaults = tuple(zip(*config.speech.conv_layers, strict=True))
    sizes = [settings.get(key, default) for key, default in zip(("conv_dim", "conv_kernel", "conv_stride"), defaults)]
    speech = replace(
        config.speech,
        conv_layers=tuple((int(c), int(k), int(s)) for c, k, s in zip(*sizes, strict=True)),
        conv_bias=bool(settings.get("conv_bias", False)),
        position_depth=int(settings.get("num_conv_pos_embeddings", 5)),
        position_kernel=int(settings.get("conv_pos_kernel_size", 19)),
        position_groups=int(settings.get("num_conv_pos_embedding_groups", 16)),
    )
    config = _encoder(config, settings, dropout="hidden_dropout", attention="attention_dropout", eps=1e-5)
    return replace(config, speech=speech, model=replace(config.model, layer_drop=float(settings.get("layerdrop", 0.1))))


def _text(config: Config, settings: Mapping[str, Any]) -> Config:
    _refuse(settings, {"hidden_act": "gelu", "position_embedding_type": "absolute", "pad_token_id": PAD})
    _refuse(settings, {"is_decoder": False, "add_cross_attention": False})
    text = replace(
        config.text,
        vocabulary=int(settings.get("vocab_size", 30522)),
        max_tokens=int(settings.get("max_position_embeddings", 512)) - PAD - 1,
    )
    words = {"dropout": "hidden_dropout_prob", "attention": "attention_probs_dropout_prob"}
    return replace(_encoder(config, settings, eps=1e-12, **words), text=text)


def _vision(config: Config, settings: Mapping[str, Any]) -> Config:
    _refuse(settings, {"hidden_act": "gelu", "use_absolute_position_embeddings": False})
    _refuse(settings, {"use_relative_position_bias": False})
    words = {"dropout": "hidden_dropout_prob", "attention": "attention_probs_dropout_prob"}
    config = _encoder(config, settings, eps=1e-12, **words)
    scale = float(settings.get("layer_scale_init_value", 0.1))
    model = replace(
        config.model,
        # Above 0 it only says where a new model would start.
        layer_scale=None if scale == 0 else config.model.layer_scale,
        drop_path=float(settings.get("drop_path_rate", config.model.drop_path)),
        relative_bias=bool(settings.get("use_shared_relative_position_bias", False)),
    )
    vision = replace(
        config.vision,
        image_size=int(settings.get("image_size", 224)),
        patch_size=int(settings.get("patch_size", 16)),
        channels=int(settings.get("num_channels", 3)),
    )
    return replace(config, model=model, vision=vision)

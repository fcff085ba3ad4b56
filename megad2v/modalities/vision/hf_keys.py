"""Our vision model as Hugging Face's Data2VecVisionModel: configuration, weights (both ways), image processor.

Nothing here imports transformers: a configuration is a plain dict, weights are tensors by name.

`use_mean_pooling` is False in what we write. Only then does Data2VecVisionModel apply our final norm (encoder.norm,
there `layernorm`) to every token: `last_hidden_state` is our encoder's output, and `hidden_states[0..depth]` are the
encoder's input and each block's output before that norm. (With True it would leave the norm out and put a new one
behind the mean.) The regression head has no place there and stays behind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.modalities.keys import Example

MODEL_CLASS = "Data2VecVisionModel"
PIPELINE = "image-feature-extraction"
CARD_SECTIONS = ("vision", "augment")
NEW_THERE: tuple[str, ...] = ()
"""Beginnings of parameters that AutoModel starts anew, since they belong to a task."""
USAGE = """\
```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

folder = "."  # this folder
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder).eval()
output = model(**processor(Image.open("picture.jpg"), return_tensors="pt")).last_hidden_state
features = output[:, 1:].mean(dim=1)  # token 0 is CLS, which pretraining gives no target: prefer the patches' mean
```

To fine-tune a classifier on the mean of the patches, as data2vec was evaluated, say
`AutoModelForImageClassification.from_pretrained(folder, num_labels=N, use_mean_pooling=True)`: the norm behind the mean
starts new, and the encoder's own final norm is left out. Without `use_mean_pooling` the classifier reads the CLS token.
"""
"""Of the model card: how to load and fine-tune it."""

_TOP = {
    "front_end.patches.weight": "embeddings.patch_embeddings.projection.weight",
    "front_end.patches.bias": "embeddings.patch_embeddings.projection.bias",
    "encoder.norm.weight": "layernorm.weight",
    "encoder.norm.bias": "layernorm.bias",
}
_TOKENS = {
    "front_end.cls_token": "embeddings.cls_token",
    "front_end.mask_token": "embeddings.mask_token",
}
_TRANSPOSED_TOP = {
    "encoder.relative_bias.table": "encoder.relative_position_bias.relative_position_bias_table",
}
_BLOCK = {
    "attention_norm.weight": "layernorm_before.weight",
    "attention_norm.bias": "layernorm_before.bias",
    "attention.output.bias": "attention.output.dense.bias",
    "attention_scale.gamma": "lambda_1",
    "mlp_norm.weight": "layernorm_after.weight",
    "mlp_norm.bias": "layernorm_after.bias",
    "mlp.input.weight": "intermediate.dense.weight",
    "mlp.input.bias": "intermediate.dense.bias",
    "mlp.output.bias": "output.dense.bias",
    "mlp_scale.gamma": "lambda_2",
}
_TRANSPOSED_BLOCK = {
    "attention.output.weight": "attention.output.dense.weight",
    "mlp.output.weight": "output.dense.weight",
}
_ATTENTION = "attention.attention."
_QUERY, _KEY, _VALUE = (_ATTENTION + name for name in ("query", "key", "value"))

BICUBIC = 3
"""Pillow's number of its bicubic filter, which is how image processors name filters."""


def check(config: Config) -> None:
    """Raises UserError when Data2VecVisionModel cannot compute what this configuration describes."""
    if config.model.norm != "pre":
        raise UserError("model.norm: Hugging Face's Data2VecVisionModel is pre-norm; a post-norm encoder has no place")


def model_config(config: Config) -> dict[str, Any]:
    """The content of config.json (Data2VecVisionConfig). Values that matter are all written: HF's defaults differ."""
    model, vision = config.model, config.vision
    depth = model.depth
    return {
        "architectures": [MODEL_CLASS],
        "model_type": "data2vec-vision",
        "hidden_size": model.width,
        "num_hidden_layers": depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": float(model.dropout),
        "attention_probs_dropout_prob": float(model.attention_dropout),
        "drop_path_rate": float(model.drop_path),
        "initializer_range": 0.02,
        "layer_norm_eps": float(model.norm_eps),
        # 0 means "no layer scale" to them, and any other value only says where a new model would start.
        "layer_scale_init_value": 0.0 if model.layer_scale is None else float(model.layer_scale) or 1.0,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": vision.channels,
        "use_mask_token": True,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": model.relative_bias,
        "use_mean_pooling": False,
        # The four levels of their segmentation head, where BEiT takes them: (3, 5, 7, 11) of 12 blocks.
        "out_indices": [max(1, part) - 1 for part in (depth // 3, depth // 2, 2 * depth // 3, depth)],
    }


def processor_config(config: Config) -> dict[str, Any]:
    """The content of preprocessor_config.json: short side to S with a bicubic filter, centre crop, mean and std.

    CLIPImageProcessor is their plain "resize the short side, crop the centre, normalise", with and without torchvision
    and in every version since 4.45; BeitImageProcessor knew no short side before 5.0 and would squeeze the image.
    Our validation cuts the central square BEFORE resizing, at fractions of a pixel; theirs resizes, rounds, then cuts.
    So square images agree to float32 rounding and others are shifted by less than a pixel of the output.
    """
    size = config.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.vision.mean),
        "image_std": list(config.vision.std),
    }


def processor_files(config: Config, tokenizer: object = None) -> dict[str, str]:
    """What prepares raw input, by file name; `tokenizer` is text's."""
    return {"preprocessor_config.json": json.dumps(processor_config(config), indent=2) + "\n"}


def example(config: Config, generator: torch.Generator) -> Example:
    """Two images of normal noise, float32 (2, C, S, S): the first unmasked, the second with half its patches hidden.

    Together they make every parameter count, the mask token included.
    """
    vision = config.vision
    images = torch.randn(2, vision.channels, vision.image_size, vision.image_size, generator=generator)
    patches = (vision.image_size // vision.patch_size) ** 2
    mask_bt = torch.zeros(2, patches, dtype=torch.bool)
    mask_bt[1, torch.randperm(patches, generator=generator)[: patches // 2]] = True
    words = f"{tuple(images.shape)} normal noise; half the patches of row 1 masked"
    return Example(images, mask_bt, None, {"pixel_values": images, "bool_masked_pos": mask_bt}, words)


def to_hugging_face(parameters: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """State dict of Data2VecVisionModel from a student's parameters by name; contiguous, dtype kept.

    A bias on the key adds the same number to every logit of a query, so softmax does not see it: it is left out, as
    there is no place for it. Raises KeyError for a parameter that has no counterpart.
    """
    out: dict[str, Tensor] = {}
    for name, value in parameters.items():
        if name in _TOP:
            out[_TOP[name]] = value.contiguous()
        elif name in _TOKENS:
            out[_TOKENS[name]] = value.reshape(1, 1, -1)
        elif name in _TRANSPOSED_TOP:
            out[_TRANSPOSED_TOP[name]] = value.t().contiguous()
        elif name.startswith("encoder.blocks."):
            _, _, number, key = name.split(".", 3)
            theirs = _block_to_hugging_face(key, value, config)
            out |= {f"encoder.layer.{number}.{place}": tensor for place, tensor in theirs.items()}
        elif not name.startswith("head."):
            raise KeyError(f"no Hugging Face name for the vision parameter {name}")
    return out


def _block_to_hugging_face(key: str, value: Tensor, config: Config) -> dict[str, Tensor]:
    heads, kind = config.model.heads, config.model.qkv_bias
    if key in _BLOCK:
        return {_BLOCK[key]: value.contiguous()}
    if key in _TRANSPOSED_BLOCK:
        return {_TRANSPOSED_BLOCK[key]: value.t().contiguous()}
    if key == "attention.qkv.weight":
        width = value.shape[1]
        parts = value.view(heads, 3, -1, width).unbind(1)
        names = (f"{_QUERY}.weight", f"{_KEY}.weight", f"{_VALUE}.weight")
        out = {name: part.reshape(width, width) for name, part in zip(names, parts, strict=True)}
        if kind == "none":
            out |= {f"{_QUERY}.bias": value.new_zeros(width), f"{_VALUE}.bias": value.new_zeros(width)}
        return out
    if key == "attention.qkv.bias":
        parts = value.view(heads, 3 if kind == "full" else 2, -1)
        return {f"{_QUERY}.bias": parts[:, 0].flatten(), f"{_VALUE}.bias": parts[:, -1].flatten()}
    raise KeyError(f"no Hugging Face name for the vision block's parameter {key}")


def from_hugging_face(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our parameters, without the head, from a state dict as `to_hugging_face` writes it.

    With model.qkv_bias "full" the key's bias is zero; with "none" theirs have to be zero. Raises UserError for a
    tensor that has no place in our model, such as another model's.
    """
    top, tokens, transposed, block, transposed_block = (
        {theirs: ours for ours, theirs in table.items()}
        for table in (_TOP, _TOKENS, _TRANSPOSED_TOP, _BLOCK, _TRANSPOSED_BLOCK)
    )
    out: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name in top:
            out[top[name]] = value
        elif name in tokens:
            out[tokens[name]] = value.flatten()
        elif name in transposed:
            out[transposed[name]] = value.t().contiguous()
        elif name.startswith("encoder.layer."):
            _, _, number, key = name.split(".", 3)
            if key in block:
                out[f"encoder.blocks.{number}.{block[key]}"] = value
            elif key in transposed_block:
                out[f"encoder.blocks.{number}.{transposed_block[key]}"] = value.t().contiguous()
            elif key.startswith(_ATTENTION):
                blocks.setdefault(number, {})[key] = value
            else:
                raise UserError(f"{name}: our vision encoder has no such parameter")
        else:
            raise UserError(f"{name}: our vision model has no such parameter")
    for number, attention in blocks.items():
        ours = _attention_from_hugging_face(attention, config, f"encoder.layer.{number}")
        out |= {f"encoder.blocks.{number}.attention.qkv.{key}": value for key, value in ours.items()}
    return out


def _attention_from_hugging_face(attention: Mapping[str, Tensor], config: Config, where: str) -> dict[str, Tensor]:
    heads, kind = config.model.heads, config.model.qkv_bias
    wanted = {f"{_QUERY}.weight", f"{_KEY}.weight", f"{_VALUE}.weight", f"{_QUERY}.bias", f"{_VALUE}.bias"}
    if attention.keys() != wanted:
        odd = ", ".join(sorted(attention.keys() ^ wanted))
        raise UserError(f"{where}: missing or unknown parameters of the attention: {odd}")
    weights = [attention[f"{part}.weight"] for part in (_QUERY, _KEY, _VALUE)]
    width = weights[0].shape[1]
    out = {"weight": torch.stack([w.reshape(heads, -1, width) for w in weights], dim=1).reshape(3 * width, width)}
    query, value = (attention[f"{part}.bias"].reshape(heads, -1) for part in (_QUERY, _VALUE))
    if kind == "none":
        if query.any() or value.any():
            raise UserError(f"{where}: has biases on query and value, which model.qkv_bias none has no place for")
        return out
    parts = [query, torch.zeros_like(query), value] if kind == "full" else [query, value]
    return {**out, "bias": torch.stack(parts, dim=1).flatten()}

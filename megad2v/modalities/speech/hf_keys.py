"""Our speech model as Hugging Face's Data2VecAudioModel: configuration, weights (both ways), feature extractor.

Nothing here imports transformers: a configuration is a plain dict, weights are tensors by name.

`hidden_states[0]` is what enters the first block (behind positions and norm), the others are the blocks' outputs, and
`last_hidden_state` is the last of them. The regression head has no place there and stays behind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.modalities.keys import Example, KeyMap
from megad2v.modalities.speech.geometry import SAMPLE_RATE, frame_count, samples_needed

MODEL_CLASS = "Data2VecAudioModel"
PIPELINE = "feature-extraction"
CARD_SECTIONS = ("speech",)
NEW_THERE: tuple[str, ...] = ()
"""Beginnings of parameters that AutoModel starts anew, since they belong to a task."""
USAGE = """\
```python
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoModel

folder = "."  # this folder
extractor = AutoFeatureExtractor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder).eval()
waveform, rate = soundfile.read("recording.wav")  # mono, 16,000 samples a second
inputs = extractor(waveform, sampling_rate=rate, return_tensors="pt")
with torch.no_grad():
    features = model(**inputs).last_hidden_state  # one vector for each 20 ms
```

Give recordings of different lengths to the extractor with `padding=True`, and its `attention_mask` to the model. To
fine-tune for transcription, `AutoModelForCTC.from_pretrained(folder, vocab_size=N)` puts a new linear layer on top.
"""
"""Of the model card: how to load and fine-tune it."""

_CONVOLUTION, _LAYER = "feature_extractor.conv_layers.*", "encoder.layers.*"
_MAP = KeyMap(
    MODEL_CLASS,
    plain={
        "front_end.mask_token": "masked_spec_embed",
        "front_end.convolutions.*.conv.weight": f"{_CONVOLUTION}.conv.weight",
        "front_end.convolutions.*.conv.bias": f"{_CONVOLUTION}.conv.bias",
        "front_end.convolutions.*.norm.weight": f"{_CONVOLUTION}.layer_norm.weight",
        "front_end.convolutions.*.norm.bias": f"{_CONVOLUTION}.layer_norm.bias",
        "front_end.norm.weight": "feature_projection.layer_norm.weight",
        "front_end.norm.bias": "feature_projection.layer_norm.bias",
        "front_end.projection.weight": "feature_projection.projection.weight",
        "front_end.projection.bias": "feature_projection.projection.bias",
        "encoder.positions.layers.*.weight": "encoder.pos_conv_embed.layers.*.conv.weight",
        "encoder.positions.layers.*.bias": "encoder.pos_conv_embed.layers.*.conv.bias",
        "encoder.norm.weight": "encoder.layer_norm.weight",
        "encoder.norm.bias": "encoder.layer_norm.bias",
        "encoder.blocks.*.attention.output.bias": f"{_LAYER}.attention.out_proj.bias",
        "encoder.blocks.*.attention_norm.weight": f"{_LAYER}.layer_norm.weight",
        "encoder.blocks.*.attention_norm.bias": f"{_LAYER}.layer_norm.bias",
        "encoder.blocks.*.mlp.input.weight": f"{_LAYER}.feed_forward.intermediate_dense.weight",
        "encoder.blocks.*.mlp.input.bias": f"{_LAYER}.feed_forward.intermediate_dense.bias",
        "encoder.blocks.*.mlp.output.bias": f"{_LAYER}.feed_forward.output_dense.bias",
        "encoder.blocks.*.mlp_norm.weight": f"{_LAYER}.final_layer_norm.weight",
        "encoder.blocks.*.mlp_norm.bias": f"{_LAYER}.final_layer_norm.bias",
    },
    transposed={
        "encoder.blocks.*.attention.output.weight": f"{_LAYER}.attention.out_proj.weight",
        "encoder.blocks.*.mlp.output.weight": f"{_LAYER}.feed_forward.output_dense.weight",
    },
    projections=tuple(f"{_LAYER}.attention.{part}_proj" for part in ("q", "k", "v")),
)


def check(config: Config) -> None:
    """Raises UserError when Data2VecAudioModel cannot compute what this configuration describes."""
    model, speech = config.model, config.speech
    for key, wrong, words in (
        ("model.norm", model.norm != "post", "is post-norm; a pre-norm encoder"),
        ("model.deep_norm", model.deep_norm, "does not scale residuals; DeepNorm"),
        ("model.layer_scale", model.layer_scale is not None, "has no layer scale; one"),
        ("speech.extractor_norm", speech.extractor_norm != "layer", "norms every convolution; one group norm"),
    ):
        if wrong:
            raise UserError(f"{key}: Hugging Face's Data2VecAudioModel {words} has no place")


def model_config(config: Config) -> dict[str, Any]:
    """The content of config.json (Data2VecAudioConfig). Values that matter are all written: HF's defaults differ."""
    model, speech = config.model, config.speech
    channels, kernels, strides = zip(*speech.conv_layers, strict=True)
    return {
        "architectures": [MODEL_CLASS],
        "model_type": "data2vec-audio",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout": float(model.dropout),
        "activation_dropout": 0.0,
        "attention_dropout": float(model.attention_dropout),
        "feat_proj_dropout": 0.0,
        "layerdrop": float(model.layer_drop),
        "initializer_range": 0.02,
        "layer_norm_eps": float(model.norm_eps),
        "feat_extract_activation": "gelu",
        "conv_dim": list(channels),
        "conv_kernel": list(kernels),
        "conv_stride": list(strides),
        "conv_bias": speech.conv_bias,
        "num_conv_pos_embeddings": speech.position_depth,
        "conv_pos_kernel_size": speech.position_kernel,
        "num_conv_pos_embedding_groups": speech.position_groups,
        # Above 0 the mask token has a place. What fine-tuning masks is its own choice: this is their default.
        "mask_time_prob": 0.05,
        "mask_time_length": 10,
    }


def processor_config(config: Config) -> dict[str, Any]:
    """The content of preprocessor_config.json: 16 kHz mono, mean 0 and variance 1, zeros and a mask behind the end.

    Theirs adds 1e-7 to the variance where fairseq's layer norm adds 1e-5. That changes the scale of quiet recordings,
    most of which the norm behind the first convolution takes out again: features of LibriSpeech's (standard deviation
    0.04) move by 1e-4, at 0.01 by 2e-3, at 0.001 by 6 % (measured, random weights).
    """
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_side": "right",
        "padding_value": 0.0,
        "do_normalize": config.speech.normalise,
        "return_attention_mask": True,
    }


def processor_files(config: Config, tokenizer: object = None) -> dict[str, str]:
    """What prepares raw input, by file name; `tokenizer` is text's."""
    return {"preprocessor_config.json": json.dumps(processor_config(config), indent=2) + "\n"}


def example(config: Config, generator: torch.Generator) -> Example:
    """Two waveforms of normal noise, float32 (2, S), 40 frames and 27 with zeros behind; in each every third real frame
    is hidden.

    Together they make every parameter count, the mask token included, and show a wrong treatment of padding.
    """
    layers = config.speech.conv_layers
    frames, real = 40, 27
    lengths = [samples_needed(frames, layers), samples_needed(real, layers)]
    waveforms = torch.randn(2, lengths[0], generator=generator)
    waveforms[1, lengths[1] :] = 0.0
    attention = torch.arange(lengths[0])[None] < torch.tensor(lengths)[:, None]
    assert frame_count(lengths[1], layers) == real
    padding_bt = torch.arange(frames)[None] >= torch.tensor([frames, real])[:, None]
    mask_bt = (torch.arange(frames) % 3 == 0)[None] & ~padding_bt
    arguments = {"input_values": waveforms, "attention_mask": attention.long(), "mask_time_indices": mask_bt}
    words = f"{frames} frames of normal noise, and {real} with padding behind; every third frame hidden"
    return Example(waveforms, mask_bt, padding_bt, arguments, words)


def to_hugging_face(parameters: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """State dict of Data2VecAudioModel from a student's parameters by name; contiguous, dtype kept.

    Raises KeyError for a parameter that has no counterpart.
    """
    return _MAP.to_theirs({n: p for n, p in parameters.items() if not n.startswith("head.")}, config)


def from_hugging_face(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our parameters, without the head, from a state dict as `to_hugging_face` writes it. Raises UserError for a tensor
    that has no place in ours, such as another model's."""
    return _MAP.to_ours(state, config)

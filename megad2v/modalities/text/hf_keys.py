"""Our text model as Hugging Face's Data2VecTextModel: configuration, weights (both ways), tokenizer.

Nothing here imports transformers: a configuration is a plain dict, weights are tensors by name.

`hidden_states[0]` is what enters the first block (behind positions and norm), the others are the blocks' outputs, and
`last_hidden_state` is the last of them. Theirs adds a third embedding, of the kind of segment: one row, which we write
as zeros. Its pooler is the first layer of a classifier, which data2vec does not train: transformers starts a new one.
The regression head has no place there and stays behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.modalities.keys import Example, KeyMap
from megad2v.modalities.text.codecs import BOS, EOS, PAD, UNK
from megad2v.modalities.text.export import hugging_face_files
from megad2v.modalities.text.tokenizer import Tokenizer

MODEL_CLASS = "Data2VecTextModel"
PIPELINE = "feature-extraction"
CARD_SECTIONS = ("text",)
NEW_THERE = ("pooler.",)
"""Beginnings of parameters that AutoModel starts anew, since they belong to a task."""
USAGE = """\
```python
import torch
from transformers import AutoModel, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
inputs = tokenizer(["A sentence.", "And another, longer one."], padding=True, return_tensors="pt")
with torch.no_grad():
    tokens = model(**inputs).last_hidden_state  # one vector for each token
real = inputs["attention_mask"].unsqueeze(-1)
features = (tokens * real).sum(1) / real.sum(1)  # one for each text: the mean of its tokens
```

`pooler_output` is no use: pretraining has no pooler, and transformers puts a random one there unless told not to. To
fine-tune, `AutoModelForSequenceClassification.from_pretrained(folder, num_labels=N)` or
`AutoModelForTokenClassification` put new layers on top. There is no language-model head: data2vec predicts the hidden
states of a teacher, not words.
"""
"""Of the model card: how to load and fine-tune it."""

LONGEST_EXAMPLE = 512

_LAYER = "encoder.layer.*"
_TOKENS, POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
SEGMENTS = "embeddings.token_type_embeddings.weight"
_MAP = KeyMap(
    MODEL_CLASS,
    plain={
        "front_end.tokens.weight": _TOKENS,
        "front_end.positions.weight": POSITIONS,
        "encoder.norm.weight": "embeddings.LayerNorm.weight",
        "encoder.norm.bias": "embeddings.LayerNorm.bias",
        "encoder.blocks.*.attention.output.bias": f"{_LAYER}.attention.output.dense.bias",
        "encoder.blocks.*.attention_norm.weight": f"{_LAYER}.attention.output.LayerNorm.weight",
        "encoder.blocks.*.attention_norm.bias": f"{_LAYER}.attention.output.LayerNorm.bias",
        "encoder.blocks.*.mlp.input.weight": f"{_LAYER}.intermediate.dense.weight",
        "encoder.blocks.*.mlp.input.bias": f"{_LAYER}.intermediate.dense.bias",
        "encoder.blocks.*.mlp.output.bias": f"{_LAYER}.output.dense.bias",
        "encoder.blocks.*.mlp_norm.weight": f"{_LAYER}.output.LayerNorm.weight",
        "encoder.blocks.*.mlp_norm.bias": f"{_LAYER}.output.LayerNorm.bias",
    },
    transposed={
        "encoder.blocks.*.attention.output.weight": f"{_LAYER}.attention.output.dense.weight",
        "encoder.blocks.*.mlp.output.weight": f"{_LAYER}.output.dense.weight",
    },
    projections=tuple(f"{_LAYER}.attention.self.{part}" for part in ("query", "key", "value")),
)


def check(config: Config) -> None:
    """Raises UserError when Data2VecTextModel cannot compute what this configuration describes."""
    model = config.model
    for key, wrong, words in (
        ("model.norm", model.norm != "post", "is post-norm; a pre-norm encoder"),
        ("model.deep_norm", model.deep_norm, "does not scale residuals; DeepNorm"),
        ("model.layer_scale", model.layer_scale is not None, "has no layer scale; one"),
    ):
        if wrong:
            raise UserError(f"{key}: Hugging Face's Data2VecTextModel {words} has no place")


def model_config(config: Config) -> dict[str, Any]:
    """The content of config.json (Data2VecTextConfig). Values that matter are all written: HF's defaults differ."""
    model, text = config.model, config.text
    return {
        "architectures": [MODEL_CLASS],
        "model_type": "data2vec-text",
        "vocab_size": text.vocabulary,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": float(model.dropout),
        "attention_probs_dropout_prob": float(model.attention_dropout),
        # Rows of the table: those up to PAD's, and one for each token of the longest row.
        "max_position_embeddings": text.max_tokens + PAD + 1,
        "position_embedding_type": "absolute",
        "type_vocab_size": 1,
        "initializer_range": 0.02,
        "layer_norm_eps": float(model.norm_eps),
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }


def processor_files(config: Config, tokenizer: Tokenizer | None) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json. Raises UserError without a tokenizer, for one of another size, and for
    one that cannot be exported (see `hugging_face_files`)."""
    if tokenizer is None:
        raise UserError(
            "the checkpoint holds no tokenizer, so that nobody could use the model on text; resume the run for a step "
            "with this version, which stores it"
        )
    if tokenizer.vocabulary != config.text.vocabulary:
        raise UserError(
            f"text.vocabulary: {config.text.vocabulary}, but the checkpoint's tokenizer has {tokenizer.vocabulary} ids"
        )
    return hugging_face_files(tokenizer, config.text.max_tokens)


def example(config: Config, generator: torch.Generator) -> Example:
    """Two rows of ids, int64 (2, 1, T), at most 512 long, `<s>` first and `</s>` last, the second row a third shorter
    and `<pad>` behind; `<mask>` is in both.

    Together they make every parameter count but the rows of what they do not contain, and show a wrong treatment of
    padding.
    """
    vocabulary = config.text.vocabulary
    assert vocabulary is not None  # of a checkpoint
    longest = min(config.text.max_tokens, LONGEST_EXAMPLE)
    lengths = torch.tensor([longest, longest - longest // 3])
    # No id twice while there are others: so more rows of the table are seen.
    ordinary = vocabulary - UNK - 1
    shuffles = [torch.randperm(ordinary, generator=generator) for _ in range(-(-2 * longest // ordinary))]
    ids_bt = torch.cat(shuffles)[: 2 * longest].view(2, longest) + UNK + 1
    ids_bt[:, 0] = BOS
    ids_bt[:, 2] = vocabulary - 1
    ids_bt[torch.arange(2), lengths - 1] = EOS
    padding_bt = torch.arange(longest)[None] >= lengths[:, None]
    ids_bt[padding_bt] = PAD
    arguments = {"input_ids": ids_bt, "attention_mask": (~padding_bt).long()}
    words = f"{longest} random ids, and {int(lengths[1])} with padding behind"
    return Example(ids_bt[:, None], None, padding_bt, arguments, words)


def to_hugging_face(parameters: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """State dict of Data2VecTextModel, without its pooler, from a student's parameters by name; contiguous, dtype kept.

    Raises KeyError for a parameter that has no counterpart.
    """
    state = _MAP.to_theirs({n: p for n, p in parameters.items() if not n.startswith("head.")}, config)
    if POSITIONS in state:
        state[SEGMENTS] = state[POSITIONS].new_zeros(1, config.model.width)
    return state


def from_hugging_face(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our parameters, without the head, from a state dict of theirs. What they add for the one kind of segment goes
    into the positions, `<pad>`'s left out; the pooler is left behind. Raises UserError for a tensor that has no place
    in ours, such as another model's."""
    kept = {n: t for n, t in state.items() if n != SEGMENTS and not n.startswith(NEW_THERE)}
    ours = _MAP.to_ours(kept, config)
    if SEGMENTS in state:
        segments = state[SEGMENTS]
        if len(segments) != 1:
            raise UserError(f"{SEGMENTS}: {len(segments)} kinds of segments; our text model knows one")
        table = ours["front_end.positions.weight"].clone()
        table[PAD + 1 :] += segments
        ours["front_end.positions.weight"] = table
    return ours

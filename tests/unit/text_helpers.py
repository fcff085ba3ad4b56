"""Documents of random ids, shards of them, and configurations for the tests of text batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megad2v.config.modalities import MaskConfig, TextConfig
from megad2v.config.schema import Config, DataConfig, MicroBatchConfig, TrainConfig
from megad2v.data.writer import DatasetWriter
from megad2v.modalities.text.decode import write_tokens
from megad2v.modalities.text.tokenizer import Tokens

VOCABULARY = 300
MASK = VOCABULARY - 1


def document(sentences: Sequence[int], seed: int = 0, dtype: str = "<u2") -> Tokens:
    """Sentences of these lengths, `</s>` included, of ordinary ids."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, MASK, sum(sentences)).astype(dtype)
    tokens[np.cumsum(sentences) - 1] = 2
    return tokens


def story(length: int, seed: int) -> Tokens:
    """A document of `length` tokens in sentences of 1 to 30."""
    rng, sentences = np.random.default_rng(seed + 1000), []
    while (left := length - sum(sentences)) > 0:
        sentences.append(min(left, int(rng.integers(1, 31))))
    return document(sentences, seed)


def write_text(folder: Path, documents: Sequence[Tokens | bytes], *, max_bytes: int = 20_000, **about: Any) -> Path:
    """Small shards of labelled documents 0000, 0001, ...; bytes are taken for the .npy as they are."""
    with DatasetWriter(folder, "text", "text", max_bytes) as writer:
        for number, tokens in enumerate(documents):
            data = tokens if isinstance(tokens, bytes) else write_tokens(tokens)
            writer.write(f"{number:04d}", {"tokens.npy": data, "cls": str(number % 3).encode(), "json": b"{}"})
        writer.finish(classes=("a", "b", "c"), class_counts=(0, 0, 0), **about)
    return folder


def text_config(shards: Path | None = None, *, text: dict[str, Any] | None = None, **data: Any) -> Config:
    """Rows of up to 64 tokens, 256 a micro-batch, four of them a step; masks as fairseq's program has them."""
    base = Config(
        modality="text",
        text=replace(TextConfig(vocabulary=VOCABULARY, max_tokens=64), **(text or {})),
        mask=MaskConfig(ratio=0.35, span=4),
        data=DataConfig(
            shards=None if shards is None else str(shards),
            micro_batch=MicroBatchConfig(samples=None, tokens=256),
            workers=0,
            window=2,
            bucket_ratio=1.3,
        ),
        train=TrainConfig(micro_batches_per_step=4, seed=3),
    )
    return replace(base, data=replace(base.data, **data))

"""The certificate of an exported tokenizer: AutoTokenizer gives the ids that the model was trained on."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megad2v.convert.certificate import SEED, CertificateError, require_transformers
from megad2v.modalities.text.tokenizer import Tokenizer

RANDOM_TEXTS = 2_000

WRITTEN = (
    "",
    " ",
    "  two  spaces  ",
    "It was the best of times, it was the worst of times.",
    "don't you'll I'VE 3.1415 1,000,000 e-mail@example.org https://example.org/?q=a%20b#c",
    "....... ------- !!!!!!! ????? ((([[[{{{",
    "<s> <pad> </s> <unk> <mask> <mask>word<mask> [MASK] <0x0A>",
    "line one\nline two\r\n\ttabbed\u000bform\u000c\u0085next\u2028separators\u2029",
    "\u2581 a word with sentencepiece's own sign \u2581\u2581 in it",
    "caf\u00e9 cafe\u0301 \ufb01ne \uff26\uff55\uff4c\uff4c \u00bd \u2460 \u1e9b\u0323 \u212b",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u200f\u202eright to left\u202c\u200e",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \uc548\ub155 \u0e2a\u0e27\u0e31\u0e2a",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f44d\U0001f3fd\U0001f1e9\U0001f1ea \u2764\ufe0f",
    "nul\x00nul \x01\x02\x1b[31m\x7f \ufeffbom \u200b\u200c\u200d\u2060 \u00ad \u00a0 \u3000 \u2003",
    "a\u0300\u0301\u0302\u0303\u0304\u0305\u0306\u0307\u0308 Z\u0351\u036b\u0343 \ufffd \ufffe \U0010ffff \U000e0041",
)
"""What goes wrong in tokenizers: spaces, specials spelled out, line ends, marks, scripts, emoji, controls."""


def certify_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Compare the ids of what AutoTokenizer loads from `folder`, without a network, with `tokenizer`'s, text by text:
    `WRITTEN`, every piece of the vocabulary, and random Unicode. Returns what parity.json says of it.

    Raises CertificateError for the first text whose ids differ.
    """
    transformers = require_transformers()
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if len(theirs) != tokenizer.vocabulary or theirs.mask_token_id != tokenizer.mask:
        raise CertificateError(
            f"the exported tokenizer has {len(theirs)} ids and <mask> {theirs.mask_token_id}, the model was trained "
            f"with {tokenizer.vocabulary} and {tokenizer.mask}"
        )
    pieces = [piece.replace("\u2581", " ") for piece in tokenizer.pieces]
    texts = [*WRITTEN, *pieces, *random_texts(RANDOM_TEXTS, pieces)]
    tokens = 0
    for text, row in zip(texts, theirs(texts)["input_ids"], strict=True):
        expected = [tokenizer.bos, *tokenizer.encode(text).tolist(), tokenizer.eos]
        if row != expected:
            raise CertificateError(f"the exported tokenizer gives {row} for {text!r}, ours {expected}")
        tokens += len(row)
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocabulary": tokenizer.vocabulary,
        "texts": len(texts),
        "tokens": tokens,
        "input": f"{len(WRITTEN)} written texts, every piece, {RANDOM_TEXTS} random texts; seed {SEED}",
    }


def random_texts(count: int, pieces: list[str]) -> Iterator[str]:
    """Characters of all of Unicode but surrogates, of its first 256 and 12,288, and pieces, in mixture."""
    rng = np.random.default_rng(SEED)
    for _ in range(count):
        parts = []
        for _ in range(int(rng.integers(1, 24))):
            kind = rng.integers(5)
            if kind == 0:
                parts.append(pieces[rng.integers(len(pieces))])
            elif kind == 1:
                parts.append(" " * int(rng.integers(1, 3)))
            else:
                character = chr(rng.integers((0x100, 0x3000, 0x110000)[kind - 2]))
                parts.append("" if unicodedata.category(character) == "Cs" else character)
        yield "".join(parts)

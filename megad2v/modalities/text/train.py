"""Trains a vocabulary with sentencepiece, so that texts come back as they were: nothing is normalised, and what the
vocabulary lacks is spelled in bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from megad2v.errors import UserError
from megad2v.modalities.text.codecs import BOS, EOS, PAD, SPECIALS, UNK, text_library
from megad2v.modalities.text.tokenizer import Tokenizer

MODELS = ("bpe", "unigram", "char", "byte")
LONGEST = 4_000
"""Bytes of a training sentence; sentencepiece leaves out longer ones (over 4,192) without a word."""
THREADS = 16
"""sentencepiece writes the number into its model: the same everywhere, for equal files."""
BYTES = 256


@dataclass(frozen=True)
class TrainingOptions:
    """How a vocabulary is trained."""

    vocabulary: int
    """Ids, specials and `<mask>` included."""
    model: str = "bpe"
    byte_fallback: bool = True
    """Spell what the vocabulary lacks in bytes, instead of `<unk>`."""
    coverage: float = 0.9995
    """Share of the characters of the text that get pieces of their own: sentencepiece's default."""
    max_sentences: int = 1_000_000
    """Lines that are drawn at random from larger corpora: sentencepiece holds them in memory."""
    seed: int = 0


def train_tokenizer(lines: Iterable[str], options: TrainingOptions) -> Tokenizer:
    """A vocabulary for texts like `lines`, which are gone through once.

    Equal lines and options give equal files. Raises UserError for options that cannot be met with these lines.
    """
    if options.model not in MODELS:
        raise UserError(f"--model {options.model}: expected one of {', '.join(MODELS)}")
    if options.model == "byte":
        return Tokenizer("bytes", len(SPECIALS) + BYTES + 1, b"", "bytes")
    least = len(SPECIALS) + (BYTES if options.byte_fallback else 0) + 2
    if options.vocabulary < least:
        raise UserError(f"--vocab-size: expected {least} or more (specials, bytes), got {options.vocabulary}")
    sentencepiece = text_library("sentencepiece")
    model = io.BytesIO()
    sample = draw(sentences(lines), options.max_sentences, options.seed)
    if not sample:
        raise UserError("--input: no line of text to train on")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=options.model,
            vocab_size=options.vocabulary - 1,  # `<mask>` is ours: sentencepiece would put it among the first
            hard_vocab_limit=options.model != "char",
            byte_fallback=options.byte_fallback,
            character_coverage=options.coverage,
            bos_id=BOS,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,  # a word is the same piece at the beginning of a line
            shuffle_input_sentence=False,  # its draw does not depend on its seed (0.2.3): `draw` is ours
            num_threads=THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        said = " ".join(str(error).split())
        if most := re.search(r"too high .* <= (\d+)", said):
            raise UserError(
                f"--vocab-size {options.vocabulary}: this text gives at most {int(most[1]) + 1} ids; lower it, or "
                "train on more text"
            ) from error
        raise UserError(f"--vocab-size {options.vocabulary}: sentencepiece refuses ({said})") from error
    data = model.getvalue()
    size = sentencepiece.SentencePieceProcessor(model_proto=data).piece_size() + 1
    return Tokenizer("sentencepiece", size, data, options.model)


def sentences(lines: Iterable[str]) -> Iterator[str]:
    """Lines as sentencepiece takes them."""
    for line in lines:
        # Tabs and NUL are reserved in sentencepiece's training data; bytes spell them afterwards.
        for part in line.replace("\0", "\t").split("\t"):
            yield from pieces_of(part)


def draw(lines: Iterable[str], count: int, seed: int) -> list[str]:
    """All lines, or `count` of them, each as likely; one pass, no more than `count` in memory.

    Algorithm L of Li, "Reservoir-sampling algorithms of time complexity O(n(1 + log(N/n)))", ACM TOMS 20 (1994).
    """
    source = iter(lines)
    kept = list(islice(source, count))
    rng = np.random.default_rng(seed)
    weight = 1.0
    while True:
        weight *= (1 - rng.random()) ** (1 / count)
        passed = math.floor(math.log(1 - rng.random()) / math.log1p(-weight)) if weight < 1 else 0
        line = next(islice(source, passed, None), None)
        if line is None:
            return kept
        kept[rng.integers(count)] = line


def pieces_of(line: str) -> Iterator[str]:
    """A line in pieces of at most LONGEST bytes, cut at spaces where there are any; blank pieces are left out."""
    while len(line) * 4 > LONGEST and len(line.encode()) > LONGEST:
        head = line[: LONGEST // 4]
        cut = head.rfind(" ") + 1 or len(head)
        if line[:cut].strip():
            yield line[:cut].rstrip(" ")
        line = line[cut:]
    if line.strip():
        yield line

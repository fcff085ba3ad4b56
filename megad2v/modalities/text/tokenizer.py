"""A vocabulary in a folder: text -> token ids and back, the same for training, make_shards and export.

Ids are RoBERTa's, as fairseq numbers them (spec 2.1): `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, pieces, `<mask>`
last. No text encodes to one of the specials, also where it reads "<s>" or "<mask>".

The folder holds megad2v.json (kind, size, checksum), the model where the kind has one, and vocab.tsv for people.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megad2v.errors import UserError
from megad2v.files import write_file
from megad2v.modalities.text.codecs import (
    BOS,
    EOS,
    MASK_PIECE,
    PAD,
    SPECIALS,
    UNK,
    ByteLevelCodec,
    BytesCodec,
    Codec,
    SentencePieceCodec,
)

ABOUT_FILE = "megad2v.json"
VOCABULARY_FILE = "vocab.tsv"
MODEL_FILES = {"sentencepiece": "tokenizer.model", "byte_level": "tokenizer.json", "bytes": None}
"""Kind -> the file with its model; plain bytes need none."""
FORMAT_VERSION = 1
SMALL = 2**16
"""Vocabularies up to this many ids are stored as uint16."""

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


CODECS = {"sentencepiece": SentencePieceCodec, "byte_level": ByteLevelCodec}


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. `load` it from a folder; its library is imported when it first has to encode."""

    kind: str
    """sentencepiece, byte_level or bytes."""
    vocabulary: int
    """Number of ids, `<mask>` included."""
    model: bytes = b""
    """The content of the model's file."""
    name: str = ""
    """For people: bpe, unigram, char, bytes or byte_level."""

    bos, pad, eos, unk = BOS, PAD, EOS, UNK

    @property
    def mask(self) -> int:
        """The id of `<mask>`, the last one."""
        return self.vocabulary - 1

    @property
    def dtype(self) -> np.dtype:
        """What ids are stored as: uint16 or uint32."""
        return np.dtype(np.uint16 if self.vocabulary <= SMALL else np.uint32)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits: equal where texts give equal ids."""
        return sha256(f"{self.kind}\x1f{self.vocabulary}\x1f".encode() + self.model).hexdigest()[:16]

    @cached_property
    def codec(self) -> Codec:
        """What does the work. Raises UserError where its library is missing."""
        codec = BytesCodec() if self.kind == "bytes" else CODECS[self.kind](self.model)
        assert len(codec.pieces) in (self.vocabulary - 1, self.vocabulary), "vocabulary and model differ"
        return codec

    @property
    def pieces(self) -> list[str]:
        """What each id stands for, in the model's own spelling."""
        return [*self.codec.pieces[: self.vocabulary - 1], MASK_PIECE]

    def encode(self, text: str) -> Tokens:
        """(tokens,) without specials. Raises UserError for what is no Unicode text (lone surrogates)."""
        check_text(text)
        return np.asarray(self.codec.encode(text), dtype=self.dtype)

    def encode_document(self, sentences: Iterable[str]) -> Tokens:
        """(tokens,) of all sentences, each ended by `</s>`: what KEY.tokens.npy holds. Raises UserError as `encode`."""
        ids: list[int] = []
        for sentence in sentences:
            check_text(sentence)
            ids += self.codec.encode(sentence)
            ids.append(EOS)
        return np.asarray(ids, dtype=self.dtype)

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of `ids`; `<s>`, `<pad>`, `</s>` and `<mask>` are passed over. Raises ValueError for unknown ids."""
        found = np.asarray(ids, dtype=np.int64)
        if found.size and not 0 <= found.min() <= found.max() < self.vocabulary:
            raise ValueError(f"ids from {found.min()} to {found.max()}; this vocabulary has {self.vocabulary}")
        return self.codec.decode(found[(found == UNK) | ((found > UNK) & (found != self.mask))].tolist())

    @property
    def about(self) -> dict[str, Any]:
        """What dataset.json and checkpoints say of it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "vocabulary": self.vocabulary,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype.name,
        }

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        """Name -> content of what `save` writes."""
        about = {
            "format": FORMAT_VERSION,
            **self.about,
            "specials": {**{piece: i for i, piece in enumerate(SPECIALS)}, MASK_PIECE: self.mask},
        }
        rows = (f"{i}\t{json.dumps(piece, ensure_ascii=False)}\n" for i, piece in enumerate(self.pieces))
        files = {
            ABOUT_FILE: (json.dumps(about, indent=2) + "\n").encode(),
            VOCABULARY_FILE: "".join(rows).encode(),
        }
        model_file = MODEL_FILES[self.kind]
        return {**files, model_file: self.model} if model_file else files

    def save(self, folder: Path) -> None:
        """Write the folder; megad2v.json, without which nothing is there, comes last. Raises UserError."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in self.files.items():
                if name != ABOUT_FILE:
                    (folder / name).write_bytes(content)
            write_file(folder / ABOUT_FILE, self.files[ABOUT_FILE].decode())
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --output") from error

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read what `save` wrote. Raises UserError where it is not there, damaged, or of a newer version."""
        return cls.of_files(lambda name: (Path(folder) / name).read_bytes(), str(folder))

    @classmethod
    def of_files(cls, read: Callable[[str], bytes], where: str) -> Tokenizer:
        """From `files`, of which `read` gives one by its name, from a folder or a checkpoint; `where` names that in
        errors. Raises UserError as `load`, and what `read` raises besides OSError."""
        place = f"{where}/{ABOUT_FILE}"
        try:
            about = json.loads(read(ABOUT_FILE).decode())
            if about["format"] > FORMAT_VERSION:
                raise UserError(f"{place}: format {about['format']}, newer than {FORMAT_VERSION}; update megad2v")
            name = MODEL_FILES[about["kind"]]
            model = read(name) if name else b""
            tokenizer = cls(about["kind"], int(about["vocabulary"]), model, about["name"])
            fits = tokenizer.fingerprint == about["fingerprint"]
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename}: no such file; a tokenizer is a folder that tools/train_tokenizer.py wrote"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{place}: not a tokenizer of megad2v ({error!r}); make it again") from error
        if not fits:
            raise UserError(f"{place}: {name} is not the file that was written with it; copy the folder again")
        return tokenizer


def check_text(text: str) -> None:
    """Raises UserError for a str that is no Unicode text, as JSON's \\ud800 alone makes one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of a text is half of a surrogate pair (U+{ord(text[error.start]):04X}): "
            "no Unicode text; correct the file, or how it was decoded"
        ) from error

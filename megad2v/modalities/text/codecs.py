"""What encodes: sentencepiece, the tokenizers library, or plain bytes. None gives a special's id, whatever the text."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

from megad2v.errors import UserError

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MASK_PIECE = "<mask>"
LIBRARIES = {"sentencepiece": "text", "tokenizers": "hf"}
"""Library -> the extra that brings it."""


class Codec(Protocol):
    """What a kind of tokenizer has to do. `encode` never gives a special's id; `decode` gets none but `<unk>`."""

    pieces: Sequence[str]
    """By id, without `<mask>` where the model does not know it."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def text_library(name: str) -> ModuleType:
    """An optional library. Raises UserError where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = LIBRARIES[name]
        raise UserError(
            f"this tokenizer needs {name}, which does not import here ({error}); "
            f"`pip install 'megad2v[{extra}]'` or `pip install {name}`"
        ) from error


class SentencePieceCodec:
    """A sentencepiece model, whatever its algorithm."""

    def __init__(self, model: bytes) -> None:
        self.processor = text_library("sentencepiece").SentencePieceProcessor(model_proto=model)
        self.pieces: Sequence[str] = [self.processor.id_to_piece(i) for i in range(self.processor.piece_size())]

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


class BytesCodec:
    """One id for each byte of UTF-8."""

    pieces: Sequence[str] = (*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)))

    def encode(self, text: str) -> list[int]:
        return [byte + len(SPECIALS) for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - len(SPECIALS) for i in ids if i >= len(SPECIALS)).decode(errors="replace")


class ByteLevelCodec:
    """A `tokenizer.json` of the tokenizers library; texts never give a special's id."""

    def __init__(self, model: bytes) -> None:
        self.tokenizer = text_library("tokenizers").Tokenizer.from_str(model.decode())
        # As text: "<s>" in a corpus is three characters. The file's own padding and truncation are not for us.
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        by_id = {i: piece for piece, i in self.tokenizer.get_vocab(with_added_tokens=True).items()}
        self.pieces: Sequence[str] = [by_id.get(i, "") for i in range(max(by_id) + 1)]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

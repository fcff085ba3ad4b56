"""A vocabulary as files that `AutoTokenizer.from_pretrained(folder, local_files_only=True)` loads, with equal ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megad2v.errors import UserError
from megad2v.modalities.text.codecs import BOS, EOS, MASK_PIECE, PAD, SPECIALS, UNK, text_library
from megad2v.modalities.text.tokenizer import Tokenizer

SPACE = "▁"
"""sentencepiece's sign for a space."""
LONGEST = 512
"""Tokens that the model has positions for, `<s>` and `</s>` included."""


def export_hugging_face(tokenizer: Tokenizer, folder: Path, longest: int = LONGEST) -> None:
    """Write `hugging_face_files` into `folder`. Raises UserError when they cannot be written, and as that does."""
    files = hugging_face_files(tokenizer, longest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


def hugging_face_files(tokenizer: Tokenizer, longest: int = LONGEST) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json by name; they add `<s> ... </s>` to what `encode` gives.

    "<mask>" in a text stays text there too (`split_special_tokens`); who wants the token inserts its id.
    Raises UserError for a unigram vocabulary, whose ids would differ.
    """
    theirs = hugging_face_tokenizer(tokenizer)
    bos, pad, eos, unk = SPECIALS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": piece for name, piece in (("bos", bos), ("cls", bos), ("eos", eos), ("sep", eos))},
        **{f"{name}_token": piece for name, piece in (("pad", pad), ("unk", unk), ("mask", MASK_PIECE))},
    }
    return {
        "tokenizer.json": theirs.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def check_exportable(name: str) -> None:
    """Raises UserError for a vocabulary of this name (`Tokenizer.name`) that has no equal there."""
    if name == "unigram":
        # Measured: its Unigram finds "<s>" in texts, and breaks ties ("....") otherwise than sentencepiece.
        raise UserError(
            "a unigram vocabulary cannot be exported: the tokenizers library gives other ids for some texts; "
            "train with --model bpe (char and byte can be exported too)"
        )


def hugging_face_tokenizer(tokenizer: Tokenizer) -> Any:
    """The same vocabulary as an object of the tokenizers library, with specials and template."""
    library = text_library("tokenizers")
    if tokenizer.kind == "byte_level":
        theirs = library.Tokenizer.from_str(tokenizer.model.decode())
    else:
        theirs = _of_pieces(tokenizer)
    theirs.add_special_tokens(
        [library.AddedToken(piece, special=True, normalized=False) for piece in (*SPECIALS, MASK_PIECE)]
    )
    bos, _, eos, _ = SPECIALS
    theirs.post_processor = library.processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, BOS), (eos, EOS)],
    )
    found = [theirs.token_to_id(piece) for piece in (*SPECIALS, MASK_PIECE)]
    assert found == [BOS, PAD, EOS, UNK, tokenizer.mask], f"specials came out as {found}"
    return theirs


def _of_pieces(tokenizer: Tokenizer) -> Any:
    library = text_library("tokenizers")
    decoders, normalizers, models = library.decoders, library.normalizers, library.models
    pieces = tokenizer.pieces[: tokenizer.mask]
    spelled = any(piece == "<0x00>" for piece in pieces)
    check_exportable(tokenizer.name)
    merges = _merges(pieces) if tokenizer.name == "bpe" else []
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token=SPECIALS[UNK], fuse_unk=True, byte_fallback=spelled)
    theirs = library.Tokenizer(model)
    if tokenizer.kind == "bytes":
        theirs.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        return theirs
    # Metaspace would leave out the first space of a text that begins with one.
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    theirs.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return theirs


def _merges(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """The merges that sentencepiece's BPE does: any two pieces that together are one, in the order of its id.

    sentencepiece keeps no merges: it scores pieces by their order and merges the best pair, the leftmost of equals.
    """
    first = len(SPECIALS) + (256 if pieces[len(SPECIALS)] == "<0x00>" else 0)
    known = set(pieces[first:])
    merges: list[tuple[str, str]] = []
    for piece in pieces[first:]:
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [pair for pair in halves if pair[0] in known and pair[1] in known]
    return merges

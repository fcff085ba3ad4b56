"""GPT-2's and RoBERTa's byte-level BPE, from their files, so that released text checkpoints can be continued.

Ids stay as they are in the files; specials have to lie where fairseq and RoBERTa have them (spec 2.1), because the rest
of megad2v counts on it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megad2v.errors import UserError
from megad2v.modalities.text.codecs import MASK_PIECE, SPECIALS, ByteLevelCodec, text_library
from megad2v.modalities.text.tokenizer import Tokenizer

PROBE = " a\n\x00é 😀 日本語\t  <s>x</s><mask><pad><unk>"
"""What has to come back as it was, without a special's id."""


def import_byte_level(path: Path) -> Tokenizer:
    """A tokenizer from tokenizer.json, from vocab.json with merges.txt beside it, or from a folder with either.

    Raises UserError for files that cannot be read, that are of another kind, or whose specials lie elsewhere.
    """
    if path.is_dir():
        names = ("tokenizer.json", "vocab.json")
        path = next((path / name for name in names if (path / name).exists()), path / names[0])
    theirs = _from_vocab(path) if path.name == "vocab.json" else _from_json(path)
    vocabulary = _check_specials(path, theirs)
    library = text_library("tokenizers")
    known = {token.content for token in theirs.get_added_tokens_decoder().values() if token.special}
    missing = [piece for piece in (*SPECIALS, MASK_PIECE) if piece not in known]
    # Where it is only an entry of the vocabulary, or an added token that texts may name.
    theirs.add_special_tokens([library.AddedToken(piece, special=True, normalized=False) for piece in missing])
    model = theirs.to_str().encode()
    _check_codec(path, ByteLevelCodec(model), vocabulary)
    return Tokenizer("byte_level", vocabulary, model, "byte_level")


def _from_json(path: Path) -> Any:
    try:
        theirs = text_library("tokenizers").Tokenizer.from_str(_read(path))
    except UserError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from error
    theirs.no_padding()
    theirs.no_truncation()
    return theirs


def _from_vocab(path: Path) -> Any:
    """As `RobertaTokenizer` reads these files."""
    library = text_library("tokenizers")
    merges_file = path.with_name("merges.txt")
    try:
        vocabulary = {str(piece): int(i) for piece, i in json.loads(_read(path)).items()}
        lines = _read(merges_file).split("\n")
        rows = [line for line in lines if line and not line.startswith("#version")]
        merges = [(left, right) for left, right in (line.split(" ") for line in rows)]
        theirs = library.Tokenizer(library.models.BPE(vocabulary, merges))
    except UserError:
        raise
    except Exception as error:  # ValueError, AttributeError, and the library's own Exception
        raise UserError(f"{path}, {merges_file}: not a byte-level BPE ({error})") from error
    theirs.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = library.decoders.ByteLevel()
    return theirs


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; --from takes tokenizer.json, or vocab.json with merges.txt beside it"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8") from error


def _check_specials(path: Path, theirs: Any) -> int:
    """The number of ids. Raises UserError where specials lie elsewhere."""
    ids = theirs.get_vocab(with_added_tokens=True)
    vocabulary = max(ids.values()) + 1
    for piece, wanted in {**{piece: i for i, piece in enumerate(SPECIALS)}, MASK_PIECE: vocabulary - 1}.items():
        found = ids.get(piece)
        if found != wanted:
            has = "is not there" if found is None else f"has id {found}"
            raise UserError(
                f"{path}: {piece} {has}, expected {wanted} (of {vocabulary} ids); RoBERTa's numbering is needed: "
                "<s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last"
            )
    return vocabulary


def _check_codec(path: Path, codec: ByteLevelCodec, vocabulary: int) -> None:
    ids = codec.encode(PROBE)
    if any(i < len(SPECIALS) or i == vocabulary - 1 for i in ids):
        raise UserError(f"{path}: text such as '<s>' encodes to a special's id; not a byte-level BPE of RoBERTa's kind")
    if codec.decode(ids) != PROBE:
        raise UserError(f"{path}: does not give back a text as it was; expected a byte-level BPE that covers all bytes")

"""What is inside a shard and beside it: the sample keys and `dataset.json`, shared by whoever writes and reads.

A shard is a plain tar in webdataset's convention: files with the same key (the path up to the first dot of its last
part) are one sample. Image: KEY.jpg|png|webp, optional KEY.cls (class id as ASCII digits). Speech: KEY.flac|wav,
optional KEY.txt. Text: KEY.tokens.npy, one document as token ids (uint16 where the vocabulary has at most 65,536 ids,
else uint32), each sentence ended by `</s>`; `<s>`, padding and masks are the loader's; optional KEY.cls. A sample may
hold several modalities; every sample we write has KEY.json. Text shards have their tokenizer beside them (tokenizer/).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megad2v.errors import UserError

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
INDEX_FOLDER = "index"
TOKENIZER_FOLDER = "tokenizer"
WORKING_FOLDER = ".making"
"""Where make_shards writes until everything is complete; its presence means an unfinished or interrupted run."""

LABEL_EXTENSION = "cls"

KINDS: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "flac", "wav", "tokens.npy")
"""Data extensions; the position is the code stored in an index, so new ones go at the end."""

MODALITY_KINDS: dict[str, tuple[str, ...]] = {
    "vision": ("jpg", "jpeg", "png", "webp"),
    "speech": ("flac", "wav"),
    "text": ("tokens.npy",),
}
"""Which extensions hold a modality, in order of preference where one sample has two."""


def split_key(path: str) -> tuple[str, str] | None:
    """(key, lower-case extension) of a tar member's path by webdataset's rule, or None when it belongs to no sample.

    The extension begins at the FIRST dot of the last path part. Files without a dot, hidden ones (`.x`) and
    webdataset's `__meta__` entries belong to no sample; but `a/.x` has the key `a/`, where `a` has no dot.
    """
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    if not dot or (not stem and (not slash or "." in folder.rpartition("/")[2])):
        return None
    first_part = path.split("/", 1)[0]
    if len(first_part) >= 4 and first_part.startswith("__") and first_part.endswith("__"):
        return None
    return folder + slash + stem, extension.lower()


@dataclass(frozen=True)
class ShardInfo:
    """One tar as `dataset.json` lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`: what a folder of shards holds and how it was made."""

    modalities: tuple[str, ...]
    samples: int
    shards: tuple[ShardInfo, ...]
    classes: tuple[str, ...] = ()
    """Class names; the position is the id in KEY.cls. Empty: no labels."""
    class_counts: tuple[int, ...] = ()
    totals: dict[str, float] = field(default_factory=dict)
    """What the samples add up to, where that is no count: hours of speech, tokens."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Text: name, kind, vocabulary, fingerprint, and the dtype of KEY.tokens.npy."""
    tool: str = ""
    """Program and version that wrote the shards."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Options that shaped the bytes (seed, resize, ...)."""
    format: int = FORMAT_VERSION


def write_dataset(folder: Path, info: DatasetInfo) -> None:
    """Write `folder`/dataset.json whole or not at all. Raises OSError."""
    target = folder / DATASET_FILE
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, target)


def read_dataset(folder: Path) -> DatasetInfo | None:
    """What `folder`/dataset.json says, or None when there is none (somebody else's shards).

    Raises UserError when the file is there but is not one that this version can read.
    """
    path = folder / DATASET_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); make the shards again or delete this file") from error
    try:
        raw = json.loads(text)
        if raw["format"] > FORMAT_VERSION:
            raise UserError(
                f"{path}: format {raw['format']} is newer than {FORMAT_VERSION}, the newest this version reads; "
                "update megad2v"
            )
        shards = tuple(
            ShardInfo(str(s["name"]), int(s["samples"]), int(s["bytes"]), str(s["sha256"])) for s in raw["shards"]
        )
        return DatasetInfo(
            modalities=_strings(raw["modalities"]),
            samples=int(raw["samples"]),
            shards=shards,
            classes=_strings(raw["classes"]),
            class_counts=tuple(int(count) for count in raw["class_counts"]),
            totals={str(name): float(amount) for name, amount in raw.get("totals", {}).items()},
            tokenizer=dict(raw.get("tokenizer", {})),
            tool=str(raw["tool"]),
            settings=dict(raw["settings"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a dataset.json of megad2v ({error!r}); make the shards again or delete this file"
        ) from error


def _strings(values: Sequence[object]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)

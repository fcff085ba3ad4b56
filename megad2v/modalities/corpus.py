"""Raw corpora, whatever their modality: files below a folder, classes from folders, order, and what became of a file.

Everything here is a pure function of the files and the options, so shards come out byte for byte the same for any
number of processes. Writing tars is `data.make`'s business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TypeVar

from megad2v.errors import UserError

SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})

Action = Literal["copied", "converted", "skipped"]


@dataclass(frozen=True)
class SourceFile:
    """One file to be turned into samples, or a part of one."""

    path: str
    """Relative to the input folder, with forward slashes."""
    label: int
    """Class id, -1 without classes."""

    @property
    def name(self) -> str:
        """What is unique in the corpus; the order in shards depends on it."""
        return self.path

    @property
    def sources(self) -> tuple[str, ...]:
        """What has to be read to make samples of it: whoever goes on with a run looks whether they are as they were."""
        return (self.path,)


@dataclass(frozen=True)
class Outcome:
    """What became of one file, or of one document where a file holds many."""

    file: SourceFile
    action: Action
    reason: str
    """What a person should know: why it was converted or skipped. Empty: nothing."""
    samples: tuple[Mapping[str, bytes], ...] = ()
    """For each sample: extension -> bytes of its files. Empty when skipped."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """What is summed over the data set, such as hours."""
    line: int = 0
    """Where in the file it begins, from 1; 0: it is the whole file."""
    fingerprint: bytes = b""
    """Of several outcomes with the same one only the first gets into shards. Empty: it is not compared."""


@dataclass(frozen=True)
class Corpus:
    """A raw corpus as `data.make` takes it. It is sent to processes: functions of modules, plain data."""

    name: str
    """What shards are called: NAME-000000.tar."""
    modality: str
    noun: str
    """Its files in the plural, for messages."""
    folder: Path
    files: Sequence[SourceFile]
    classes: Sequence[str]
    """Class names by id; empty without labels."""
    others: Sequence[str]
    """Files that are not taken at all."""
    why_not: str
    """The reason that is reported for `others`."""
    make_samples: Callable[[Path, Any, Any], Outcome | Iterator[Outcome]]
    """(folder, one of `files`, `options`) -> what became of it; an iterator where it may not fit into memory."""
    options: Any
    """A dataclass; dataset.json names its fields."""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """What dataset.json says of the tokenizer."""
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)
    """Its files, which go beside the shards: name -> content."""

    def outcomes(self, file: SourceFile) -> Iterator[Outcome]:
        """What became of one of `files`, in order."""
        made = self.make_samples(self.folder, file, self.options)
        yield from (made,) if isinstance(made, Outcome) else made


def find_files(folder: Path, extensions: Collection[str], what: str) -> tuple[list[str], list[str]]:
    """(files with one of `extensions`, other or hidden files) below `folder`, as sorted relative paths.

    Raises UserError when the folder is missing or holds none of the former.
    """
    if not folder.exists():
        raise UserError(f"{folder}: no such file or folder; check --input")
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; --input takes a folder of {what}s or of class folders")
    wanted: list[str] = []
    others: list[str] = []
    for path in _walk(folder):
        hidden = any(part.startswith(".") for part in path.split("/"))
        (wanted if not hidden and os.path.splitext(path)[1].lower() in extensions else others).append(path)
    if not wanted:
        known = ", ".join(sorted(extensions))
        raise UserError(f"{folder}: no {what} ({known}) among {len(others)} files; check --input")
    return wanted, others


def _walk(folder: Path) -> list[str]:
    """Relative paths of all files below a folder, sorted; symbolic links are followed, once per folder."""
    seen: set[tuple[int, int]] = set()
    paths: list[str] = []
    for root, folders, files in os.walk(folder, followlinks=True):
        stat = os.stat(root)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders.sort()  # so that it does not depend on the disk which of two links to a folder counts
        relative = Path(root).relative_to(folder)
        paths += [(relative / name).as_posix() for name in files]
    return sorted(paths)


def class_folders(folder: Path, paths: Sequence[str]) -> list[str]:
    """Names of the first-level folders that `paths` lie in. Raises UserError when they are splits, not classes."""
    found = sorted({path.split("/", 1)[0] for path in paths if "/" in path})
    # "train-clean-100" and "train-other-500" together are one split, and may well be meant.
    splits = {re.split(r"[-_. ]", name.lower())[0] for name in found}
    named = splits <= SPLIT_NAMES and (len(splits) > 1 or all(name.lower() in SPLIT_NAMES for name in found))
    if found and named:
        raise UserError(
            f"{folder}: {', '.join(found)} look like splits, not classes; give one: --input {folder}/{found[0]}"
        )
    return found


def label_ids(folder: Path, found: Sequence[str], classes: Sequence[str] | None) -> dict[str, int]:
    """Class name -> id; `classes` fixes both (those of another data set). Raises UserError for a class it lacks."""
    names = found if classes is None else classes
    unknown = [name for name in found if name not in names]
    if unknown:
        raise UserError(f"{folder}: class folder {unknown[0]} is not among the {len(names)} classes of --classes")
    return {name: label for label, name in enumerate(names)}


File = TypeVar("File", bound=SourceFile)


def shuffled(files: Sequence[File], seed: int) -> list[File]:
    """The files in an order that mixes classes and depends on names and seed alone."""
    return sorted(files, key=lambda file: blake2b(f"{seed}\x1f{file.name}".encode("utf-8", "surrogateescape")).digest())


def printable(path: str) -> str:
    """A path as JSON can hold it, also where the name is not UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()

"""A set of shards as one long list of samples: the pattern a user gives, resolved, and random access by index."""

from __future__ import annotations

import glob
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from braceexpand import UnbalancedBracesError, braceexpand

from megad2v.data.format import KINDS, MODALITY_KINDS, WORKING_FOLDER, read_dataset
from megad2v.data.index import load_or_build, unknown_extensions
from megad2v.errors import UserError

OPEN_FILES = 64
"""Descriptors kept per process: several windows' worth, far below the usual limit of 1,024."""


Made = TypeVar("Made")


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in its shard."""

    id: str
    """"<shard file name>/<key>": the same wherever the folder lies."""
    data: bytes
    kind: str
    """Extension of the data, one of format.KINDS."""
    label: int
    """Class id, -1 when there is none."""


class Samples(Protocol):
    """One long list of samples: a ShardSet, or a view on one whose samples are parts of its own."""

    paths: list[Path]
    shard_sizes: tuple[int, ...]
    """Samples of each shard."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Hex hash of what the order of samples depends on."""
        ...

    def sample_id(self, index: int) -> str: ...

    def lengths(self) -> npt.NDArray[np.int64]:
        """(len,), 0 where unknown."""
        ...

    def read(self, index: int) -> RawSample: ...

    def close(self) -> None: ...


class ShardSet:
    """Samples of one modality in the tars that a pattern names.

    `pattern` is a path, a folder, a glob or a brace pattern of uncompressed local tars. Shards are sorted by file name
    (which must differ, since it is part of the sample ids), so moving the folder changes nothing. Missing indexes are
    built; processes that start together share that work and may all write (each file is replaced whole).
    Can be pickled and used after a fork; one instance must not be read by two threads.
    Raises UserError for a pattern that names nothing, a broken tar, or shards without samples of the modality.
    """

    def __init__(self, pattern: str, modality: str) -> None:
        self.pattern = pattern
        self.modality = modality
        self.paths = resolve(pattern)
        self.indexes = in_own_order(lambda path: load_or_build(path, modality), self.paths)
        """Of each shard."""
        self.shard_sizes = tuple(len(index) for index in self.indexes)
        self._ends = np.cumsum(self.shard_sizes)
        if not len(self):
            found = ", ".join(unknown_extensions(self.paths[0])) or "nothing"
            raise UserError(
                f"{pattern}: no {modality} samples; expected files KEY.{'|'.join(MODALITY_KINDS[modality])} "
                f"(the extension begins at the first dot of the name), found extensions: {found}"
            )
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def fingerprint(self) -> str:
        """Hex hash of shard names and counts, and of lengths where they decide too: differs when the order of samples
        would differ."""
        return order_fingerprint(self.paths, self.shard_sizes, None if self.modality == "vision" else self.lengths())

    def sample_id(self, index: int) -> str:
        """The id of sample `index` (0..len-1) without reading it."""
        shard, row = self._locate(index)
        return f"{self.paths[shard].name}/{self.indexes[shard].key(row)}"

    def labels(self) -> npt.NDArray[np.int32]:
        """(len,) class ids; index.NO_LABEL or index.UNREADABLE_LABEL where there is none."""
        return np.concatenate([index.records["label"] for index in self.indexes])

    def lengths(self) -> npt.NDArray[np.int64]:
        """(len,) lengths as indexed (speech: samples at 16 kHz); 0 where the file's header does not say."""
        return np.concatenate([index.records["length"] for index in self.indexes]).astype(np.int64)

    def read(self, index: int) -> RawSample:
        """Sample `index` (0..len-1). Raises UserError when its shard has changed, vanished or cannot be read."""
        shard, row = self._locate(index)
        record, name = self.indexes[shard].records[row], self.sample_id(index)
        data = self.read_bytes(shard, int(record["offset"]), int(record["size"]), name)
        return RawSample(name, data, KINDS[record["kind"]], max(int(record["label"]), -1))

    def read_bytes(self, shard: int, offset: int, size: int, sample_id: str) -> bytes:
        """Bytes of the tar `paths[shard]`, which belong to that sample. Raises UserError as `read`."""
        path = self.paths[shard]
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error}); check the disk, or copy the shard again") from error
        if len(data) != size:
            raise UserError(f"{path}: ended in the middle of sample {sample_id}; copy the shard again")
        return data

    def close(self) -> None:
        """Close the tars; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        # File descriptors mean nothing in another process that was not forked from this one.
        return {**self.__dict__, "_files": OrderedDict()}

    def _locate(self, index: int) -> tuple[int, int]:
        return locate(self._ends, index)

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        path = self.paths[shard]
        descriptor = os.open(path, os.O_RDONLY)
        if not self.indexes[shard].fits(os.fstat(descriptor)):
            os.close(descriptor)
            raise UserError(f"{path}: has changed since this run indexed it; leave shards alone and start again")
        self._files[shard] = descriptor
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor


def pattern_of(value: str | Mapping[str, str] | None, key: str, modality: str) -> str:
    """The pattern of a modality from `data.shards` or `data.valid`. Raises UserError where it has none."""
    if isinstance(value, Mapping):
        if modality not in value:
            raise UserError(f"{key}: has no entry for modality {modality}, only for {', '.join(value) or 'none'}")
        value = value[modality]
    if not value:
        raise UserError(f"{key}: not set; give a path, folder, glob or brace pattern of WebDataset tars")
    return value


@contextmanager
def about_key(key: str) -> Iterator[None]:
    """What is wrong inside is said of configuration key `key`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(key) else f"{key}: {error}") from None


def resolve(pattern: str) -> list[Path]:
    """The tars that a pattern names, sorted by file name. Raises UserError when there are none or names repeat."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise UserError(f"{pattern}: only local files can be read so far; copy the shards and give their path")
    expanded = Path(pattern).expanduser()
    if expanded.is_dir():
        paths = _in_folder(expanded)
    elif expanded.exists():
        paths = [expanded]
    else:
        paths = _expand(pattern)
    by_name: dict[str, Path] = {}
    for path in paths:
        other = by_name.setdefault(path.name, path)
        if other != path:
            raise UserError(f"{other} and {path} have the same file name, which sample ids are made of; rename one")
    return [by_name[name] for name in sorted(by_name)]


def _in_folder(folder: Path) -> list[Path]:
    """All tars of a folder, which must be the ones that its dataset.json lists, if it has one."""
    if (folder / WORKING_FOLDER).exists():
        raise UserError(f"{folder}: make_shards has not finished there ({WORKING_FOLDER} exists); run it again")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: no .tar file in this folder; give the folder that holds the shards, or a pattern")
    info = read_dataset(folder)
    if info is not None:
        here = {path.name for path in paths}
        missing = [shard.name for shard in info.shards if shard.name not in here]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(info.shards)} shards listed in dataset.json are missing "
                f"(first: {missing[0]}); copy them too, or name the ones you want with a pattern"
            )
    return paths


def _expand(pattern: str) -> list[Path]:
    try:
        words = list(braceexpand(pattern)) if "{" in pattern else [pattern]
    except UnbalancedBracesError as error:
        raise UserError(f"{pattern}: braces are not balanced; write for instance shard-{{000..011}}.tar") from error
    paths: list[Path] = []
    for word in words:
        word = os.path.expanduser(word)
        matches = [word] if os.path.exists(word) else sorted(glob.glob(word, recursive=True))
        if not matches:
            several = f" (one of {len(words)} that {pattern} stands for)" if len(words) > 1 else ""
            raise UserError(f"{word}: no such file{several}; give a path, folder, glob or brace pattern of tars")
        if folder := next((match for match in matches if os.path.isdir(match)), None):
            raise UserError(f"{pattern}: matches the folder {folder}; let the pattern end in .tar")
        paths += [Path(match) for match in matches]
    return paths


def locate(ends: npt.NDArray[np.int64], index: int) -> tuple[int, int]:
    """(shard, row in it) of a sample, by the running totals of the shards' sizes. Raises IndexError."""
    if not 0 <= index < int(ends[-1]):
        raise IndexError(f"sample {index} of {int(ends[-1])}")
    shard = int(np.searchsorted(ends, index, side="right"))
    return shard, index - (int(ends[shard - 1]) if shard else 0)


def order_fingerprint(paths: Sequence[Path], sizes: Sequence[int], lengths: npt.NDArray[np.int64] | None) -> str:
    """Hex hash of what the order of samples depends on."""
    names = "\n".join(f"{path.name} {size}" for path, size in zip(paths, sizes, strict=True))
    print_ = blake2b(names.encode(), digest_size=8)
    if lengths is not None:
        print_.update(lengths.astype("<i8", copy=False))
    return print_.hexdigest()


def in_own_order(build: Callable[[Path], Made], paths: Sequence[Path]) -> list[Made]:
    """What `build` makes of each of `paths`, made in an order of this process's own.

    Ranks that start together on shards without an index then mostly build different ones and find the others' stored.
    """
    order = list(paths)
    random.Random(os.getpid()).shuffle(order)
    made = {path: build(path) for path in order}
    return [made[path] for path in paths]

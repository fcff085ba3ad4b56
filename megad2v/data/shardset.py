"""A set of shards as one long list of samples: the pattern a user gives, resolved, and random access by index."""

from __future__ import annotations

import glob
import logging
import os
import random
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from braceexpand import UnbalancedBracesError, braceexpand

from megad2v.data.archive import LARGEST_MEMBER
from megad2v.data.format import KINDS, MODALITY_KINDS, WORKING_FOLDER, read_dataset
from megad2v.data.index import (
    ShardIndex,
    Stamp,
    build,
    keep,
    load_or_build,
    stored_lengths,
    stored_stamp,
    unknown_extensions,
)
from megad2v.errors import UserError
from megad2v.modalities.sample import BadSample

log = logging.getLogger(__name__)

Made = TypeVar("Made")

OPEN_FILES = 64
"""Tars, and as many indexes, that a process keeps open: several windows' worth, far below the usual limit of 1,024."""
THREADS = 16
"""That look at indexes when a set is opened: on a network's file system each look takes a millisecond of waiting."""


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


class Readable(Protocol):
    """Samples by number, as workers read them."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Hex hash of what the order of samples depends on."""
        ...

    def sample_id(self, index: int) -> str: ...

    def read(self, index: int) -> RawSample:
        """Raises UserError where the run has to end, BadSample where it can do without."""
        ...

    def close(self) -> None: ...


class Samples(Readable, Protocol):
    """One long list of samples: a ShardSet, or a view on one whose samples are parts of its own."""

    paths: list[Path]
    shard_sizes: tuple[int, ...]
    """Samples of each shard."""

    def lengths(self) -> npt.NDArray[np.int64]:
        """(len,), 0 where unknown."""
        ...

    def shard_lengths(self, shard: int) -> npt.NDArray[np.uint32]:
        """(shard_sizes[shard],) the same of one shard."""
        ...


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
        self.names = [path.name for path in self.paths]
        self._stamps, self._in_memory = _look_at(self.paths, modality)
        self.shard_sizes = tuple(stamp.samples for stamp in self._stamps)
        self._ends = list(accumulate(self.shard_sizes))
        if not len(self):
            found = ", ".join(unknown_extensions(self.paths[0])) or "nothing"
            raise UserError(
                f"{pattern}: no {modality} samples; expected files KEY.{'|'.join(MODALITY_KINDS[modality])} "
                f"(the extension begins at the first dot of the name), found extensions: {found}"
            )
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """Hex hash of shard names and counts, and of lengths where they decide too: differs when the order of samples
        would differ."""
        lengths = None if self.modality == "vision" else [stamp.lengths_crc for stamp in self._stamps]
        return order_fingerprint(self.paths, self.shard_sizes, lengths)

    def sample_id(self, index: int) -> str:
        """The id of sample `index` (0..len-1) without reading it."""
        shard, row = self._locate(index)
        return f"{self.names[shard]}/{self.index(shard).key(row)}"

    def labels(self) -> npt.NDArray[np.int32]:
        """(len,) class ids; index.NO_LABEL or index.UNREADABLE_LABEL where there is none."""
        return np.concatenate([self.index(shard).records["label"] for shard in range(len(self.paths))])

    def lengths(self) -> npt.NDArray[np.int64]:
        """(len,) lengths as indexed (speech: samples at 16 kHz); 0 where the file's header does not say. For large sets
        `shard_lengths` needs no memory."""
        return np.concatenate([self.shard_lengths(shard) for shard in range(len(self.paths))]).astype(np.int64)

    def shard_lengths(self, shard: int) -> npt.NDArray[np.uint32]:
        """(shard_sizes[shard],) the lengths of one shard's samples."""
        if shard not in self._in_memory:
            lengths = stored_lengths(self.paths[shard], self.modality, self._stamps[shard])
            if lengths is not None:
                return lengths
        return self.index(shard).lengths

    def read(self, index: int) -> RawSample:
        """Sample `index` (0..len-1). Raises UserError when its shard has changed, vanished or cannot be read, BadSample
        for one that is too large to be read."""
        shard, row = self._locate(index)
        self._descriptor(shard)  # says that a shard has changed before its index is read
        entry = self.index(shard).entry(row)
        name = f"{self.names[shard]}/{entry.key}"
        data = self.read_bytes(shard, entry.offset, entry.size, name)
        return RawSample(name, data, KINDS[entry.kind], max(entry.label, -1))

    def read_bytes(self, shard: int, offset: int, size: int, sample_id: str) -> bytes:
        """Bytes of the tar `paths[shard]`, which belong to that sample. Raises UserError as `read`."""
        descriptor, path = self._descriptor(shard), self.paths[shard]
        if size > LARGEST_MEMBER:
            raise BadSample(f"{size} bytes are more than the {LARGEST_MEMBER} allowed")
        try:
            data = os.pread(descriptor, size, offset)
            while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
                data += more  # some network file systems give less than is there
        except OSError as error:
            raise _unreadable(path, error) from error
        if len(data) != size:
            raise UserError(f"{path}: ended in the middle of sample {sample_id}; copy the shard again")
        return data

    def close(self) -> None:
        """Close tars and indexes; reading opens them again."""
        self._indexes.clear()
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        # File descriptors mean nothing in another process that was not forked from this one, and maps would be copied.
        return {**self.__dict__, "_files": OrderedDict(), "_indexes": OrderedDict()}

    def _locate(self, index: int) -> tuple[int, int]:
        return locate(self._ends, index)

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        try:
            descriptor = os.open(self.paths[shard], os.O_RDONLY)
        except OSError as error:
            raise _unreadable(self.paths[shard], error) from error
        if not self._stamps[shard].fits(os.fstat(descriptor)):
            os.close(descriptor)
            raise self._changed(shard)
        self._files[shard] = descriptor
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def stamp(self, shard: int) -> Stamp:
        """What the index of a shard said of itself and its tar when the set was opened."""
        return self._stamps[shard]

    def index(self, shard: int) -> ShardIndex:
        """The whole index of a shard, mapped. Raises UserError where it is not the one that was there at first."""
        if shard in self._in_memory:
            return self._in_memory[shard]
        if shard in self._indexes:
            self._indexes.move_to_end(shard)
            return self._indexes[shard]
        index, stamp = load_or_build(self.paths[shard], self.modality), self._stamps[shard]
        now = index.stamp
        if (now.samples, now.lengths_crc, now.tar_size) != (stamp.samples, stamp.lengths_crc, stamp.tar_size):
            raise self._changed(shard)
        self._indexes[shard] = index
        if len(self._indexes) > OPEN_FILES:
            self._indexes.popitem(last=False)
        return index

    def _changed(self, shard: int) -> UserError:
        return UserError(
            f"{self.paths[shard]}: has changed since this run indexed it; leave shards alone and start again"
        )


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


def locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """(shard, row in it) of a sample, by the running totals of the shards' sizes. Raises IndexError."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"sample {index} of {ends[-1]}")
    shard = bisect_right(ends, index)
    return shard, index - (ends[shard - 1] if shard else 0)


def order_fingerprint(paths: Sequence[Path], sizes: Sequence[int], lengths: Sequence[int] | None) -> str:
    """Hex hash of what the order of samples depends on: names, sizes, and a sum over each shard's lengths (None: they
    do not matter)."""
    rows = [f"{path.name} {size}" for path, size in zip(paths, sizes, strict=True)]
    if lengths is not None:
        rows = [f"{row} {total:08x}" for row, total in zip(rows, lengths, strict=True)]
    return blake2b("\n".join(rows).encode(), digest_size=8).hexdigest()


def in_own_order(build: Callable[[int], Made], numbers: Sequence[int]) -> list[Made]:
    """What `build` makes for each shard number, made in an order of this process's own.

    Ranks that start together on shards without an index then mostly build different ones and find the others' stored.
    """
    order = list(numbers)
    random.Random(os.getpid()).shuffle(order)
    made = {number: build(number) for number in order}
    return [made[number] for number in numbers]


def _look_at(paths: list[Path], modality: str) -> tuple[list[Stamp], dict[int, ShardIndex]]:
    """Stamps in the order of `paths`, and the indexes that cannot be stored anywhere. Missing indexes are built."""
    in_memory: dict[int, ShardIndex] = {}

    def built(number: int) -> Stamp:
        stamp = stored_stamp(paths[number], modality)  # another rank may have made it by now
        if stamp is not None:
            return stamp
        log.info("indexing %s", paths[number])
        index = build(paths[number], modality)
        if keep(index, paths[number], modality) is None:
            in_memory[number] = index
        return index.stamp

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda path: stored_stamp(path, modality), paths, chunksize=64))
    missing = [number for number, stamp in enumerate(found) if stamp is None]
    stamps = dict(zip(missing, in_own_order(built, missing), strict=True))
    return [stamps[number] if stamp is None else stamp for number, stamp in enumerate(found)], in_memory


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error}); check the disk, or copy the shard again")

"""An index of a shard: where in the tar each sample of a modality lies, so that any sample is one `pread` away.

Stored beside the tars as `index/<tar>.<modality>.npy`, one file, so that one rename replaces all of it and ranks that
build the same index at the same time cannot mix: a stamp as `numpy.load` reads it, then lengths, records and key bytes,
as many as the stamp says. Opening a data set reads stamps alone, planning reads lengths alone; records and keys are
mapped when a sample of theirs is wanted. An index that does not fit its tar is built again. Where the folder of the
tars cannot be written indexes go to the user's cache, and where that cannot be written either they stay in memory.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megad2v.data.archive import BLOCK, LARGEST_MEMBER, NO_LABEL, UNREADABLE_LABEL, Contents, Parts, contents
from megad2v.data.format import INDEX_FOLDER, KINDS, MODALITY_KINDS
from megad2v.errors import UserError
from megad2v.modalities.speech import decode as speech
from megad2v.modalities.text import decode as text
from megad2v.modalities.vision import decode as vision

__all__ = ["NO_LABEL", "UNREADABLE_LABEL"]  # of records["label"]

VERSION = 5
"""Raised whenever a field gets another meaning, so that older indexes are built again."""
CACHE_VARIABLE = "MEGAD2V_INDEX"
"""Environment variable: the folder for indexes of tars whose own folder cannot be written."""

MEASURES: dict[str, tuple[int, Callable[[bytes, int], int]]] = {
    "vision": (vision.HEADER_BYTES, lambda head, size: vision.pixel_count(head)),
    "speech": (speech.HEADER_BYTES, speech.header_length),
    "text": (text.HEADER_BYTES, text.token_count),
}
"""Modality -> (how many first bytes of a file are looked at, its length from them and its size). Headers that promise
more than there can be are not believed: they would crop others, or plan blocks of nothing."""

WHOLE: dict[str, Callable[[bytes], int]] = {"speech": speech.decoded_length}
"""Modality -> the length of a whole file, for those whose first bytes do not say: decoded once, as the index is built,
since samples of unknown length would share micro-batches with the longest, and all be cropped to the shortest."""

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the data in the tar, bytes
        ("size", "<u8"),  # bytes
        ("key_start", "<u8"),  # in the key bytes
        ("label", "<i4"),  # class id, NO_LABEL or UNREADABLE_LABEL
        ("key_size", "<u2"),
        ("kind", "u1"),  # position in format.KINDS
    ]
)
_RECORD = struct.Struct("<QQQiHB")
"""The same: one record is read in a microsecond, where numpy's fields take five."""
LENGTH = np.dtype("<u4")
STAMP = np.dtype(
    [
        ("version", "<u4"),
        ("crc", "<u4"),  # of lengths, records and keys
        ("lengths_crc", "<u4"),
        ("probe", "<u4"),  # of some bytes of the tar, see `probe`
        ("samples", "<u8"),
        ("key_bytes", "<u8"),
        ("tar_size", "<u8"),
        ("tar_mtime_ns", "<i8"),
    ]
)

log = logging.getLogger(__name__)


def _npy_header() -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.zeros(1, dtype=STAMP), allow_pickle=False)
    return stream.getvalue()[: -STAMP.itemsize]


HEADER = _npy_header()
START = len(HEADER) + STAMP.itemsize
"""Where the lengths begin."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What an index says of itself and of its tar."""

    crc: int
    lengths_crc: int
    probe: int
    samples: int
    key_bytes: int
    tar_size: int
    tar_mtime_ns: int

    def fits(self, stat: os.stat_result) -> bool:
        """Whether the tar with this `stat` is the one that was indexed."""
        return (self.tar_size, self.tar_mtime_ns) == (stat.st_size, stat.st_mtime_ns)

    @property
    def file_bytes(self) -> int:
        """Size of the index's file."""
        return START + self.samples * (LENGTH.itemsize + RECORD.itemsize) + self.key_bytes


class Entry(NamedTuple):
    """One sample of an index."""

    key: str
    offset: int
    """Of the data in the tar, bytes."""
    size: int
    label: int
    kind: int
    """Position in format.KINDS."""


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one modality in one tar, in the order of the tar. Memory-mapped when it comes from a file."""

    stamp: Stamp
    lengths: npt.NDArray[np.uint32]
    """(samples,) images: width x height; speech: samples at 16 kHz; text: tokens; 0 unknown."""
    records: npt.NDArray[np.void]
    """(samples,) of RECORD."""
    keys: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.records)

    def key(self, i: int) -> str:
        """The key of sample i."""
        return self.entry(i).key

    def entry(self, i: int) -> Entry:
        """Sample i."""
        offset, size, start, label, key_size, kind = _RECORD.unpack_from(self._bytes, i * _RECORD.size)
        key = self.keys[start : start + key_size].tobytes().decode("utf-8", "replace")
        return Entry(key, offset, size, label, kind)

    @cached_property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        return self.records.view(np.uint8)


def made_index(
    records: npt.NDArray[np.void], lengths: npt.NDArray[np.uint32], keys: bytes, descriptor: int, stat: os.stat_result
) -> ShardIndex:
    """The index of these samples of the open tar with this `stat`."""
    lengths_crc = zlib.crc32(lengths.tobytes())
    crc = zlib.crc32(keys, zlib.crc32(records.tobytes(), lengths_crc))
    seen = probe(descriptor, records)
    stamp = Stamp(crc, lengths_crc, seen, len(records), len(keys), stat.st_size, stat.st_mtime_ns)
    return ShardIndex(stamp, lengths, records, np.frombuffer(keys, dtype=np.uint8))


def probe(descriptor: int, records: npt.NDArray[np.void]) -> int:
    """A sum over some bytes of the first, the middle and the last sample of an open tar: one that was made again or
    copied over need not differ in size and time. The samples' headers, and what lies in the middle of their data: files
    of one program begin alike."""
    total = 0
    for row in sorted({0, len(records) // 2, len(records) - 1}) if len(records) else ():
        start, size = int(records["offset"][row]), int(records["size"][row])
        for place in (start - BLOCK, start + size // 2):
            # Chained: by exclusive or, samples of one size could change places.
            total = zlib.crc32(os.pread(descriptor, min(BLOCK, start + size - place), place), total)
    return total


def index_path(tar: Path, modality: str) -> Path:
    """Where the index of a tar is kept."""
    return tar.parent / INDEX_FOLDER / _file_name(tar, modality)


def cached_path(tar: Path, modality: str) -> Path:
    """Where it is kept if that folder cannot be written."""
    return _cache_of(tar.parent) / _file_name(tar, modality)


def _file_name(tar: Path, modality: str) -> str:
    # Not the stem: `data.000` and `data.001` would share one, and each make the other's index useless.
    return f"{tar.name.removesuffix('.tar')}.{modality}.npy"


@lru_cache(maxsize=64)
def _cache_of(folder: Path) -> Path:
    chosen = os.environ.get(CACHE_VARIABLE)
    root = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "megad2v/index")
    return root / blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()


def load_or_build(tar: Path, modality: str) -> ShardIndex:
    """The index of a tar: the stored one when it fits, else built from the tar and stored where that is allowed.

    Raises UserError when the tar is missing, cut short, corrupt or compressed.
    """
    stored = stored_index(tar, modality)
    if stored is not None:
        return stored
    log.info("indexing %s", tar)
    index = build(tar, modality)
    keep(index, tar, modality)
    return index


def keep(index: ShardIndex, tar: Path, modality: str) -> Path | None:
    """Store an index beside its tar, or else in the cache; None where neither can be written."""
    return write_beside(tar, modality, partial(store, index))


def write_beside(tar: Path, name: str, write: Callable[[Path], None]) -> Path | None:
    """Where `write` could write what is kept of a tar under `name`: the first of `places`, or None."""
    for path in places(tar, name):
        try:
            write(path)
            return path
        except OSError as error:
            log.info("%s of %s cannot be kept there: %s", name, tar, error)
    return None


def tar_stat(tar: Path) -> os.stat_result:
    """Raises UserError when the tar cannot be seen."""
    try:
        return os.stat(tar)
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error.strerror}); correct data.shards or data.valid") from error


def stored_stamp(tar: Path, modality: str) -> Stamp | None:
    """The stamp of the stored index, if that has the size that it should have and fits the tar by size and time.

    One `stat` and one small read. Raises UserError when the tar cannot be seen.
    """
    stat = tar_stat(tar)
    return next((stamp for _, stamp in _stored(tar, modality, stat)), None)


def stored_index(tar: Path, modality: str) -> ShardIndex | None:
    """The stored index if it is whole and fits the tar, else None. Raises UserError when the tar cannot be seen."""
    stat = tar_stat(tar)
    for path, stamp in _stored(tar, modality, stat):
        try:
            index = _mapped(path, stamp)
        except (OSError, ValueError) as error:
            log.info("%s is not usable (%s)", path, error)
            continue
        if fits_bytes(index, tar):
            return index
        log.info("%s has other content than when %s was made", tar, path)
    return None


def stored_lengths(tar: Path, modality: str, stamp: Stamp) -> npt.NDArray[np.uint32] | None:
    """(samples,) lengths from the stored index with this stamp, read and not mapped; None where it is gone."""
    for path in places(tar, modality):
        try:
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), stamp.samples * LENGTH.itemsize, START)
        except OSError:
            continue
        if zlib.crc32(data) == stamp.lengths_crc:
            return np.frombuffer(data, dtype=LENGTH)
    return None


def fits_bytes(index: ShardIndex, tar: Path) -> bool:
    """Whether the tar's bytes are the ones that were indexed, at the places that `probe` looks at."""
    try:
        descriptor = os.open(tar, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error.strerror}); correct data.shards or data.valid") from error
    try:
        return probe(descriptor, index.records) == index.stamp.probe
    finally:
        os.close(descriptor)


def store(index: ShardIndex, path: Path) -> None:
    """Write an index whole or not at all; safe while others write the same one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    about = index.stamp
    stamp = np.zeros(1, dtype=STAMP)
    stamp[0] = (VERSION, about.crc, about.lengths_crc, about.probe, about.samples, about.key_bytes, about.tar_size,
                about.tar_mtime_ns)  # fmt: skip
    try:
        with aside.open("wb") as file:
            file.write(HEADER)
            for array in (stamp, index.lengths, index.records, index.keys):
                file.write(array.tobytes())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def places(tar: Path, modality: str) -> Iterator[Path]:
    """Where the index of a tar may be, best first."""
    yield index_path(tar, modality)
    try:
        yield cached_path(tar, modality)
    except RuntimeError:  # nobody knows where home is
        return


def _stored(tar: Path, modality: str, stat: os.stat_result) -> Iterator[tuple[Path, Stamp]]:
    """Files that are an index of the tar with this `stat`, by their stamps."""
    for path in places(tar, modality):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            size, head = os.fstat(descriptor).st_size, os.pread(descriptor, START, 0)
        finally:
            os.close(descriptor)
        if not head.startswith(HEADER) or len(head) < START:
            continue
        version, *fields = np.frombuffer(head, dtype=STAMP, offset=len(HEADER))[0].item()
        stamp = Stamp(*fields)
        if version == VERSION and size == stamp.file_bytes and stamp.fits(stat):
            yield path, stamp


def _mapped(path: Path, stamp: Stamp) -> ShardIndex:
    """Map the file once: each mapping costs a descriptor. Raises ValueError when the content is damaged."""
    whole = np.memmap(path, dtype=np.uint8, mode="r")
    if len(whole) != stamp.file_bytes or zlib.crc32(whole[START:]) != stamp.crc:
        raise ValueError("checksum does not fit")
    records_start = START + stamp.samples * LENGTH.itemsize
    keys_start = records_start + stamp.samples * RECORD.itemsize
    lengths, records, keys = whole[START:records_start], whole[records_start:keys_start], whole[keys_start:]
    return ShardIndex(stamp, np.asarray(lengths.view(LENGTH)), np.asarray(records.view(RECORD)), np.asarray(keys))


def build(tar: Path, modality: str) -> ShardIndex:
    """Index a tar (ustar, GNU or PAX) by walking its headers. Raises UserError as `build_all`."""
    return build_all(tar, (modality,))[0][modality]


def build_all(tar: Path, modalities: Sequence[str]) -> tuple[dict[str, ShardIndex], Contents]:
    """The indexes of several modalities from one walk, and what else the walk found.

    Raises UserError when the tar is cut short, corrupt, compressed, has the same file of a sample twice, or is being
    written.
    """
    wanted = {kind for modality in modalities for kind in MODALITY_KINDS[modality]}
    try:
        with tar.open("rb") as file:
            stat = os.fstat(file.fileno())
            found = contents(file, tar, wanted)
            indexes = {modality: _assembled(found, modality, file.fileno(), stat) for modality in modalities}
            after = os.fstat(file.fileno())
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error}); check the disk, or copy the shard again") from error
    if (stat.st_size, stat.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{tar}: changed while it was indexed; wait until whoever writes it has finished")
    return indexes, found


def _assembled(found: Contents, modality: str, descriptor: int, stat: os.stat_result) -> ShardIndex:
    kinds = MODALITY_KINDS[modality]
    own: list[tuple[str, str, Parts]] = []
    for key, parts in found.samples.items():
        kind = next((kind for kind in kinds if kind in parts.data), None)
        if kind is not None:
            own.append((key, kind, parts))
    records, lengths = np.zeros(len(own), dtype=RECORD), np.zeros(len(own), dtype=LENGTH)
    keys = bytearray()
    for i, (key, kind, parts) in enumerate(own):
        offset, size = parts.data[kind]
        # Names that are not UTF-8 must still give ids that a JSON file can hold.
        name = key.encode("utf-8", "backslashreplace")[: np.iinfo(np.uint16).max]
        records[i] = (offset, size, len(keys), parts.label, len(name), KINDS.index(kind))
        lengths[i] = min(_length(modality, descriptor, offset, size), np.iinfo(LENGTH).max)
        keys += name
    return made_index(records, lengths, bytes(keys), descriptor, stat)


def _length(modality: str, descriptor: int, offset: int, size: int) -> int:
    head, measure = MEASURES[modality]
    length = measure(os.pread(descriptor, min(size, head), offset), size)
    if length == 0 and modality in WHOLE and size <= LARGEST_MEMBER:
        return WHOLE[modality](os.pread(descriptor, size, offset))
    return length


def unknown_extensions(tar: Path, limit: int = 5) -> list[str]:
    """The commonest extensions in a tar, for an error that says what was found instead."""
    with tar.open("rb") as file:
        return [extension for extension, _ in contents(file, tar, ()).extensions.most_common(limit)]

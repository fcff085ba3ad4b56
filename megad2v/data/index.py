"""An index of a shard: where in the tar each sample of a modality lies, so that any sample is one `pread` away.

Stored beside the tars as `index/<tar stem>.<modality>.npy`: one file that holds four arrays after each other (records,
key bytes, stamp, end mark), so one rename replaces all of it and ranks that build the same index at the same time
cannot mix. `numpy.load(path, mmap_mode="r")` shows the records. The stamp has the tar's size and modification time; an
index that does not fit its tar is built again, and kept in memory where the folder is read-only.
"""

from __future__ import annotations

import logging
import os
import tarfile
import uuid
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megad2v.data.format import INDEX_FOLDER, KINDS, LABEL_EXTENSION, MODALITY_KINDS, split_key
from megad2v.errors import UserError
from megad2v.modalities.speech import decode as speech
from megad2v.modalities.text import decode as text
from megad2v.modalities.vision import decode as vision

VERSION = 3
"""Raised whenever a field gets another meaning, so that older indexes are built again."""
END_MARK = 0x6D643276
BLOCK = 512

MEASURES: dict[str, tuple[int, Callable[[bytes], int]]] = {
    "vision": (vision.HEADER_BYTES, vision.pixel_count),
    "speech": (speech.HEADER_BYTES, speech.header_length),
    "text": (text.HEADER_BYTES, text.token_count),
}
"""Modality -> (how many first bytes of a file are looked at, its length from them)."""

WHOLE: dict[str, Callable[[bytes], int]] = {"speech": speech.decoded_length}
"""Modality -> the length of a whole file, for those whose first bytes do not say: decoded once, as the index is built,
since samples of unknown length would share micro-batches with the longest, and all be cropped to the shortest."""

NO_LABEL = -1
UNREADABLE_LABEL = -2
"""A KEY.cls that is not a whole number: nothing for training, an error for a probe."""

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the data in the tar, bytes
        ("size", "<u8"),  # bytes
        ("key_start", "<u8"),  # in the key bytes
        ("length", "<u4"),  # images: width x height; speech: samples at 16 kHz; text: tokens; 0 unknown or not measured
        ("label", "<i4"),  # class id, NO_LABEL or UNREADABLE_LABEL
        ("key_size", "<u2"),
        ("kind", "u1"),  # position in format.KINDS
    ]
)
STAMP = np.dtype([("version", "<u4"), ("crc", "<u4"), ("tar_size", "<u8"), ("tar_mtime_ns", "<u8")])

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one modality in one tar, in the order of the tar."""

    records: npt.NDArray[np.void]
    """(samples,) of RECORD; memory-mapped when it comes from a file."""
    keys: npt.NDArray[np.uint8]
    tar_size: int
    tar_mtime_ns: int

    def __len__(self) -> int:
        return len(self.records)

    def key(self, i: int) -> str:
        """The key of sample i."""
        start, size = int(self.records["key_start"][i]), int(self.records["key_size"][i])
        return self.keys[start : start + size].tobytes().decode("utf-8")

    def fits(self, stat: os.stat_result) -> bool:
        """Whether the tar with this `stat` is the one that was indexed."""
        return (self.tar_size, self.tar_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


@dataclass
class _Parts:
    """What the tar holds for one key."""

    data: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Data extension -> (offset, size)."""
    label: int = NO_LABEL


def index_path(tar: Path, modality: str) -> Path:
    """Where the index of a tar is kept."""
    return tar.parent / INDEX_FOLDER / f"{tar.stem}.{modality}.npy"


def load_or_build(tar: Path, modality: str) -> ShardIndex:
    """The index of a tar: the stored one when it fits, else built from the tar and stored where that is allowed.

    Raises UserError when the tar is missing, cut short, corrupt or compressed.
    """
    stored = stored_index(tar, modality)
    if stored is not None:
        return stored
    log.info("indexing %s", tar)
    index = build(tar, modality)
    try:
        store(index, index_path(tar, modality))
    except OSError as error:
        log.info("index of %s is kept in memory: its folder cannot be written (%s)", tar, error)
    return index


def stored_index(tar: Path, modality: str) -> ShardIndex | None:
    """The stored index if it is whole and fits the tar, else None. Raises UserError when the tar cannot be seen."""
    try:
        stat = os.stat(tar)
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error.strerror}); correct data.shards or data.valid") from error
    path = index_path(tar, modality)
    try:
        index = _read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, SyntaxError) as error:
        log.info("%s is not usable (%s): building it again", path, error)
        return None
    if not index.fits(stat):
        log.info("%s has changed since %s was made: building it again", tar, path)
        return None
    return index


def store(index: ShardIndex, path: Path) -> None:
    """Write an index whole or not at all; safe while others write the same one. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    stamp = np.zeros(1, dtype=STAMP)
    stamp[0] = (VERSION, _crc(index), index.tar_size, index.tar_mtime_ns)
    try:
        with aside.open("wb") as file:
            for array in (index.records, index.keys, stamp, np.array([END_MARK], dtype="<u4")):
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _read(path: Path) -> ShardIndex:
    """Raises ValueError when the file is damaged, of another version, or cut short."""
    with path.open("rb") as file:
        records = _map_array(file, path, RECORD)
        keys = _map_array(file, path, np.dtype("u1"))
        stamp = np.lib.format.read_array(file, allow_pickle=False)
        mark = np.lib.format.read_array(file, allow_pickle=False)
    if stamp.dtype != STAMP or mark.tolist() != [END_MARK] or int(stamp["version"][0]) != VERSION:
        raise ValueError("another version, or cut short")
    index = ShardIndex(records, keys, int(stamp["tar_size"][0]), int(stamp["tar_mtime_ns"][0]))
    if _crc(index) != int(stamp["crc"][0]):
        raise ValueError("checksum does not fit")
    return index


def _map_array(file: BinaryIO, path: Path, dtype: np.dtype) -> np.ndarray:
    """Memory-map the next array of an open file and move past it."""
    np.lib.format.read_magic(file)
    shape, _, found = np.lib.format.read_array_header_1_0(file)
    if found != dtype or len(shape) != 1:
        raise ValueError(f"fields are {found}, expected {dtype}")
    start, size = file.tell(), shape[0] * dtype.itemsize
    file.seek(size, os.SEEK_CUR)
    if file.tell() > os.fstat(file.fileno()).st_size:
        raise ValueError("cut short")
    if not size:
        return np.zeros(shape, dtype)  # an empty range cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)


def _crc(index: ShardIndex) -> int:
    return zlib.crc32(index.keys.tobytes(), zlib.crc32(index.records.tobytes()))


def build(tar: Path, modality: str) -> ShardIndex:
    """Index a tar (ustar, GNU or PAX) by walking its headers.

    Files are grouped by key over the whole tar, so tars whose parts of a sample do not follow each other work too.
    Raises UserError when the tar is cut short, corrupt, compressed, or has the same file of a sample twice.
    """
    wanted = MODALITY_KINDS[modality]
    parts: dict[str, _Parts] = {}
    try:
        with tar.open("rb") as file:
            stat = os.fstat(file.fileno())
            for member in _members(file, tar):
                split = split_key(member.name)
                if split is None:
                    continue
                key, extension = split
                if extension in wanted:
                    data = parts.setdefault(key, _Parts()).data
                    if extension in data:
                        raise UserError(f"{tar}: {key}.{extension} is there twice; give every sample a key of its own")
                    data[extension] = (member.offset_data, member.size)
                elif extension == LABEL_EXTENSION:
                    digits = os.pread(file.fileno(), min(member.size, 32), member.offset_data)
                    parts.setdefault(key, _Parts()).label = _parse_label(digits)
            found = [(key, part) for key, part in parts.items() if part.data]
            return _assemble(found, modality, file.fileno(), stat)
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error}); check the disk, or copy the shard again") from error


def _members(file: BinaryIO, tar: Path) -> list[tarfile.TarInfo]:
    """All regular files of a tar. Raises UserError when anything but a proper end comes after the last one."""
    members: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                # tarfile remembers every member; a big shard would hold them twice.
                archive.members.clear()
                if member.issparse():
                    raise UserError(f"{tar}: {member.name} is stored as a sparse file; write it without --sparse")
                if member.isreg():
                    members.append(member)
            end = archive.offset
    except (tarfile.TarError, ValueError) as error:
        raise UserError(
            f"{tar}: not a whole tar ({error}); shards must be uncompressed tars, copy or make it again"
        ) from error
    # tarfile stops silently at a damaged header and at a cut between two files: only the zero block shows the end.
    if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):
        raise UserError(f"{tar}: cut short or damaged at byte {end} (no end of archive); copy or make it again")
    return members


def _parse_label(text: bytes) -> int:
    try:
        label = int(text)
    except ValueError:
        return UNREADABLE_LABEL
    return label if 0 <= label <= np.iinfo(np.int32).max else UNREADABLE_LABEL


def _assemble(found: list[tuple[str, _Parts]], modality: str, descriptor: int, stat: os.stat_result) -> ShardIndex:
    records = np.zeros(len(found), dtype=RECORD)
    head, measure = MEASURES.get(modality, (0, None))
    keys = bytearray()
    for i, (key, part) in enumerate(found):
        kind = min(part.data, key=MODALITY_KINDS[modality].index)
        offset, size = part.data[kind]
        # Names that are not UTF-8 must still give ids that a JSON file can hold.
        name = key.encode("utf-8", "backslashreplace")[: np.iinfo(np.uint16).max]
        length = measure(os.pread(descriptor, min(size, head), offset)) if measure is not None else 0
        if length == 0 and modality in WHOLE:
            length = WHOLE[modality](os.pread(descriptor, size, offset))
        length = min(length, np.iinfo(np.uint32).max)
        records[i] = (offset, size, len(keys), length, part.label, len(name), KINDS.index(kind))
        keys += name
    blob = np.frombuffer(bytes(keys), dtype=np.uint8)
    return ShardIndex(records, blob, stat.st_size, stat.st_mtime_ns)


def unknown_extensions(tar: Path, limit: int = 5) -> list[str]:
    """The commonest extensions in a tar, for an error that says what was found instead."""
    with tar.open("rb") as file:
        splits = (split_key(member.name) for member in _members(file, tar))
        return [extension for extension, _ in Counter(s[1] for s in splits if s).most_common(limit)]

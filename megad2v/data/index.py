"""An index of a shard: where in the tar each sample of a modality lies, so that any sample is one `pread` away.

Stored beside the tars as `index/<tar stem>.<modality>.npy` (data/stored.py): records and key bytes. An index that does
not fit its tar is built again, and kept in memory where the folder is read-only.
"""

from __future__ import annotations

import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megad2v.data import stored
from megad2v.data.format import INDEX_FOLDER, KINDS, LABEL_EXTENSION, MODALITY_KINDS, split_key
from megad2v.data.stored import Origin
from megad2v.errors import UserError
from megad2v.modalities.speech import decode as speech
from megad2v.modalities.text import decode as text
from megad2v.modalities.vision import decode as vision

VERSION = 3
"""Raised whenever a field gets another meaning, so that older indexes are built again."""
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

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one modality in one tar, in the order of the tar."""

    records: npt.NDArray[np.void]
    """(samples,) of RECORD; memory-mapped when it comes from a file."""
    keys: npt.NDArray[np.uint8]
    origin: Origin

    def __len__(self) -> int:
        return len(self.records)

    def key(self, i: int) -> str:
        """The key of sample i."""
        start, size = int(self.records["key_start"][i]), int(self.records["key_size"][i])
        return self.keys[start : start + size].tobytes().decode("utf-8")

    def fits(self, stat: os.stat_result) -> bool:
        """Whether the tar with this `stat` is the one that was indexed."""
        return self.origin == Origin.of(stat)


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
    found = stored_index(tar, modality)
    if found is not None:
        return found
    log.info("indexing %s", tar)
    index = build(tar, modality)
    try:
        store(index, index_path(tar, modality))
    except OSError as error:
        log.info("index of %s is kept in memory: its folder cannot be written (%s)", tar, error)
    return index


def stored_index(tar: Path, modality: str) -> ShardIndex | None:
    """The stored index if it is whole and fits the tar, else None. Raises UserError when the tar cannot be seen."""
    found = stored.load(tar, index_path(tar, modality), (RECORD, np.dtype("u1")), VERSION)
    if found is None:
        return None
    (records, keys), origin = found
    return ShardIndex(records, keys, origin)


def store(index: ShardIndex, path: Path) -> None:
    """Write an index whole or not at all; safe while others write the same one. Raises OSError."""
    stored.store(path, (index.records, index.keys), VERSION, index.origin)


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
    return ShardIndex(records, blob, Origin.of(stat))


def unknown_extensions(tar: Path, limit: int = 5) -> list[str]:
    """The commonest extensions in a tar, for an error that says what was found instead."""
    with tar.open("rb") as file:
        splits = (split_key(member.name) for member in _members(file, tar))
        return [extension for extension, _ in Counter(s[1] for s in splits if s).most_common(limit)]

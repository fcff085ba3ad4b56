"""What a tar holds, by walking its headers: samples by webdataset's rule, and what is odd about it.

Reads ustar, GNU and PAX; nothing is ever unpacked, and names are keys, never paths.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megad2v.data.format import LABEL_EXTENSION, split_key
from megad2v.errors import UserError

BLOCK = 512

LARGEST_MEMBER = 2**30
"""Bytes of a file that is still read as a sample: more than a picture, recording or document takes that is not refused
for its own size, and what memory is spent on before its decoder could refuse it."""
LONGEST_HEADER = 2**20
"""Bytes of a long name or of PAX records; tarfile would read as many as a damaged header states."""
HEADER_TYPES = frozenset(
    {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
)
PIECE = 2**20

NO_LABEL = -1
UNREADABLE_LABEL = -2
"""A KEY.cls that is not a whole number: nothing for training, an error for a probe."""


@dataclass
class Parts:
    """What the tar holds for one key."""

    data: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Data extension -> (offset, size)."""
    label: int = NO_LABEL


@dataclass
class Contents:
    """The samples of a tar, and what people should know of it."""

    samples: dict[str, Parts] = field(default_factory=dict)
    """Key -> its parts, in the order in which keys begin; keys without any of the wanted extensions are not here."""
    extensions: Counter[str] = field(default_factory=Counter)
    """Of all files."""
    apart: list[str] = field(default_factory=list)
    """Keys whose files do not follow each other: one sample for us, several for webdataset."""
    skipped: Counter[str] = field(default_factory=Counter)
    """What was left out (sparse, linked, ...) -> how many."""


def contents(file: BinaryIO, tar: Path, wanted: Collection[str]) -> Contents:
    """Walk an open tar; `wanted` are the extensions whose places are kept.

    Files are grouped by key over the whole tar, so tars whose parts of a sample do not follow each other work too.
    Raises UserError when the tar is cut short, corrupt, compressed, or has the same wanted file of a sample twice.
    """
    found = Contents()
    met: set[str] = set()
    apart: dict[str, None] = {}
    current = None
    for member in members(file, tar, found.skipped):
        split = split_key(member.name)
        if split is None:
            continue
        key, extension = split
        if key != current and key in met:
            apart[key] = None
        met.add(key)
        current = key
        found.extensions[extension] += 1
        if extension in wanted:
            data = found.samples.setdefault(key, Parts()).data
            if extension in data:
                raise UserError(f"{tar}: {key}.{extension} is there twice; give every sample a key of its own")
            data[extension] = (member.offset_data, member.size)
        elif extension == LABEL_EXTENSION:
            digits = os.pread(file.fileno(), min(member.size, 32), member.offset_data)
            found.samples.setdefault(key, Parts()).label = _label(digits)
    found.samples = {key: parts for key, parts in found.samples.items() if parts.data}
    found.apart = list(apart)
    return found


class _Member(tarfile.TarInfo):
    """A header with a size that can be: tarfile takes a negative one too, and goes round in circles."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        """Raises tarfile.HeaderError, which for tarfile is where the archive ends."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in HEADER_TYPES and header.size > LONGEST_HEADER):
            raise tarfile.InvalidHeaderError(f"a size of {header.size} bytes")
        return header


def members(file: BinaryIO, tar: Path, skipped: Counter[str]) -> Iterator[tarfile.TarInfo]:
    """All plain files of a tar; what else holds data is counted in `skipped`, by kind.

    Raises UserError when anything but a proper end comes after the last one, or anything after that.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
            while (member := archive.next()) is not None:
                # tarfile remembers every member; a big shard would hold them twice.
                archive.members.clear()
                if member.size < 0:  # PAX records state sizes as well
                    raise ValueError(f"{member.name!r} states {member.size} bytes")
                if member.issparse():
                    skipped["stored sparse (write it without --sparse)"] += 1
                elif member.isreg():
                    yield member
                elif not member.isdir():
                    skipped["links or devices, which have no bytes of their own"] += 1
            end = archive.offset
    except (tarfile.TarError, ValueError, RecursionError) as error:  # headers before headers before ...
        raise UserError(
            f"{tar}: not a whole tar ({error}); shards must be uncompressed tars, copy or make it again"
        ) from error
    # tarfile stops silently at a damaged header and at a cut between two files: only the zero block shows the end.
    if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):
        raise UserError(f"{tar}: cut short or damaged at byte {end} (no end of archive); copy or make it again")
    if (more := _first_content(file, end)) is not None:
        raise UserError(
            f"{tar}: ends at byte {end}, and there is more at byte {more}, which no reader would see: zeros where data "
            "were, or tars laid behind each other; copy or make it again (tar --concatenate joins tars)"
        )


def _first_content(file: BinaryIO, start: int) -> int | None:
    """Where the first byte that is not zero lies, from `start` on."""
    while piece := os.pread(file.fileno(), PIECE, start):
        if rest := len(piece.lstrip(b"\0")):
            return start + len(piece) - rest
        start += len(piece)
    return None


def _label(text: bytes) -> int:
    try:
        label = int(text)
    except ValueError:
        return UNREADABLE_LABEL
    return label if 0 <= label <= np.iinfo(np.int32).max else UNREADABLE_LABEL

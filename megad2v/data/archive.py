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


def members(file: BinaryIO, tar: Path, skipped: Counter[str]) -> Iterator[tarfile.TarInfo]:
    """All plain files of a tar; what else holds data is counted in `skipped`, by kind.

    Raises UserError when anything but a proper end comes after the last one.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                # tarfile remembers every member; a big shard would hold them twice.
                archive.members.clear()
                if member.issparse():
                    skipped["stored sparse (write it without --sparse)"] += 1
                elif member.isreg():
                    yield member
                elif not member.isdir():
                    skipped["links or devices, which have no bytes of their own"] += 1
            end = archive.offset
    except (tarfile.TarError, ValueError) as error:
        raise UserError(
            f"{tar}: not a whole tar ({error}); shards must be uncompressed tars, copy or make it again"
        ) from error
    # tarfile stops silently at a damaged header and at a cut between two files: only the zero block shows the end.
    if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):
        raise UserError(f"{tar}: cut short or damaged at byte {end} (no end of archive); copy or make it again")


def _label(text: bytes) -> int:
    try:
        label = int(text)
    except ValueError:
        return UNREADABLE_LABEL
    return label if 0 <= label <= np.iinfo(np.int32).max else UNREADABLE_LABEL

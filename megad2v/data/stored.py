"""What is worked out from a tar once and kept beside it: arrays in one file that fits that tar or is not used.

The file holds .npy arrays after each other, then a stamp and an end mark, so one rename replaces all of it and
processes that write the same one at the same time cannot mix. `numpy.load(path, mmap_mode="r")` shows the first array.
The stamp has the tar's size and modification time.
"""

from __future__ import annotations

import logging
import os
import uuid
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from megad2v.errors import UserError

END_MARK = 0x6D643276
STAMP = np.dtype([("version", "<u4"), ("crc", "<u4"), ("tar_size", "<u8"), ("tar_mtime_ns", "<u8")])

log = logging.getLogger(__name__)

Found = TypeVar("Found")


class Origin(NamedTuple):
    """Which state of a tar something was made from."""

    tar_size: int
    tar_mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Origin:
        """That of the tar with this `stat`."""
        return cls(stat.st_size, stat.st_mtime_ns)


def load(tar: Path, path: Path, dtypes: Sequence[np.dtype], version: int) -> tuple[list[np.ndarray], Origin] | None:
    """The arrays in `path`, memory-mapped, if the file is whole, of this version and fits the tar, else None.

    Raises UserError when the tar cannot be seen.
    """
    return _fitting(tar, path, partial(_read, path, dtypes, version))


def counts(tar: Path, path: Path, dtypes: Sequence[np.dtype], version: int) -> list[int] | None:
    """How many each array in `path` holds, if the file is of this version and fits the tar, else None; nothing else of
    it is read, so it may still be damaged. Raises UserError when the tar cannot be seen."""

    def heads() -> tuple[list[int], Origin]:
        with path.open("rb") as file:
            found = [_pass_over(file, dtype)[1] for dtype in dtypes]
            return found, _read_stamp(file, version)[1]

    found = _fitting(tar, path, heads)
    return found[0] if found is not None else None


def _fitting(tar: Path, path: Path, read: Callable[[], tuple[Found, Origin]]) -> tuple[Found, Origin] | None:
    """What `read` finds in `path`, where that can be read and is of the tar as it is now."""
    try:
        now = Origin.of(os.stat(tar))
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error.strerror}); correct data.shards or data.valid") from error
    try:
        found, origin = read()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, SyntaxError) as error:
        log.info("%s is not usable (%s): building it again", path, error)
        return None
    if origin != now:
        log.info("%s has changed since %s was made: building it again", tar, path)
        return None
    return found, origin


def store(path: Path, arrays: Sequence[np.ndarray], version: int, origin: Origin) -> None:
    """Write the file whole or not at all; safe while others write the same one. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    stamp = np.zeros(1, dtype=STAMP)
    stamp[0] = (version, _crc(arrays), *origin)
    try:
        with aside.open("wb") as file:
            for array in (*arrays, stamp, np.array([END_MARK], dtype="<u4")):
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _read(path: Path, dtypes: Sequence[np.dtype], version: int) -> tuple[list[np.ndarray], Origin]:
    """Raises ValueError when the file is damaged, of another version, or cut short."""
    with path.open("rb") as file:
        arrays = [_map_array(file, path, dtype) for dtype in dtypes]
        crc, origin = _read_stamp(file, version)
    if _crc(arrays) != crc:
        raise ValueError("checksum does not fit")
    return arrays, origin


def _read_stamp(file: BinaryIO, version: int) -> tuple[int, Origin]:
    """(checksum of the arrays, origin), which follow the arrays. Raises ValueError for another version."""
    stamp = np.lib.format.read_array(file, allow_pickle=False)
    mark = np.lib.format.read_array(file, allow_pickle=False)
    if stamp.dtype != STAMP or mark.tolist() != [END_MARK] or int(stamp["version"][0]) != version:
        raise ValueError("another version, or cut short")
    return int(stamp["crc"][0]), Origin(int(stamp["tar_size"][0]), int(stamp["tar_mtime_ns"][0]))


def _pass_over(file: BinaryIO, dtype: np.dtype) -> tuple[int, int]:
    """(offset, count) of the next array of an open file; moves past it. Raises ValueError when that is not there."""
    np.lib.format.read_magic(file)
    shape, _, found = np.lib.format.read_array_header_1_0(file)
    if found != dtype or len(shape) != 1:
        raise ValueError(f"fields are {found}, expected {dtype}")
    start = file.tell()
    file.seek(shape[0] * dtype.itemsize, os.SEEK_CUR)
    if file.tell() > os.fstat(file.fileno()).st_size:
        raise ValueError("cut short")
    return start, shape[0]


def _map_array(file: BinaryIO, path: Path, dtype: np.dtype) -> np.ndarray:
    """Memory-map the next array of an open file and move past it."""
    start, count = _pass_over(file, dtype)
    if not count:
        return np.zeros(0, dtype)  # an empty range cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(count,))


def _crc(arrays: Sequence[np.ndarray]) -> int:
    total = 0
    for array in arrays:
        total = zlib.crc32(array.tobytes(), total)
    return total

"""What is worked out from a tar once and kept beside its index: arrays in one file that fits both or is not used.

The file holds .npy arrays after each other, then a stamp and an end mark, so one rename replaces all of it and
processes that write the same one at the same time cannot mix. `numpy.load(path, mmap_mode="r")` shows the first array.
The stamp says which index the arrays were made with: that has looked at the tar's size, time and bytes.
"""

from __future__ import annotations

import logging
import os
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from megad2v.data.index import Stamp

END_MARK = 0x6D643276
STAMP = np.dtype(
    [
        ("version", "<u4"),
        ("crc", "<u4"),  # of the arrays
        ("tar_size", "<u8"),
        ("tar_mtime_ns", "<i8"),
        ("index_crc", "<u4"),
        ("index_probe", "<u4"),
    ]
)

log = logging.getLogger(__name__)

Found = TypeVar("Found")


class Origin(NamedTuple):
    """Which state of a tar something was made from."""

    tar_size: int
    tar_mtime_ns: int
    index_crc: int
    """A tar that was replaced can have its size and time, but its index then differs in one of these."""
    index_probe: int

    @classmethod
    def of(cls, stamp: Stamp) -> Origin:
        """The state that an index was made from."""
        return cls(stamp.tar_size, stamp.tar_mtime_ns, stamp.crc, stamp.probe)


def load(path: Path, dtypes: Sequence[np.dtype], version: int, origin: Origin) -> list[np.ndarray] | None:
    """The arrays in `path`, memory-mapped, if the file is whole, of this version and of `origin`, else None."""

    def arrays() -> list[np.ndarray]:
        with path.open("rb") as file:
            found = [_map_array(file, path, dtype) for dtype in dtypes]
            crc = _read_stamp(file, version, origin)
        if _crc(found) != crc:
            raise ValueError("checksum does not fit")
        return found

    return _if_usable(path, arrays)


def counts(path: Path, dtypes: Sequence[np.dtype], version: int, origin: Origin) -> list[int] | None:
    """How many each array in `path` holds, if the file is of this version and of `origin`, else None; nothing else of
    it is read, so it may still be damaged."""

    def heads() -> list[int]:
        with path.open("rb") as file:
            found = [_pass_over(file, dtype)[1] for dtype in dtypes]
            _read_stamp(file, version, origin)
            return found

    return _if_usable(path, heads)


def _if_usable(path: Path, read: Callable[[], Found]) -> Found | None:
    try:
        return read()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, SyntaxError) as error:
        log.info("%s is not usable (%s)", path, error)
        return None


def store(path: Path, arrays: Sequence[np.ndarray], version: int, origin: Origin) -> None:
    """Write the file whole or not at all; safe while others write the same one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
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


def _read_stamp(file: BinaryIO, version: int, expected: Origin) -> int:
    """The checksum of the arrays, from what follows them. Raises ValueError for another version or origin."""
    stamp = np.lib.format.read_array(file, allow_pickle=False)
    mark = np.lib.format.read_array(file, allow_pickle=False)
    if stamp.dtype != STAMP or mark.tolist() != [END_MARK]:
        raise ValueError("another version, or cut short")
    found, crc, *origin = stamp[0].item()
    if found != version:
        raise ValueError("another version")
    if Origin(*origin) != expected:
        raise ValueError("its tar has changed since")
    return crc


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

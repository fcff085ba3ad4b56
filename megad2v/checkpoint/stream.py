"""One pass over a file: safetensors written front to back with its checksum taken on the way; ranges of its tensors
read; checksums of files.

safetensors' own `save_file` wants all tensors in host memory as copies of their own (fragments are views of shared
buffers), and a checksum of what it wrote another pass over the file. Here a GPU's tensors pass through one buffer of
DEVICE_CHUNK bytes, those in host memory through none. The result is plain safetensors (github.com/huggingface/
safetensors, README, "Format"): eight bytes of length, that many bytes of JSON, then the values.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from megad2v.errors import UserError

if TYPE_CHECKING:
    from megad2v.checkpoint.layout import Piece

CHUNK = 1 << 20
"""Bytes that are hashed and written at once: few enough to be in the processor's cache for the second of these."""
SMALL = 1 << 16
"""Fragments up to that many bytes are collected before they are written; larger ones are not copied once more."""
DEVICE_CHUNK = 64 << 20
"""Bytes that are copied from a GPU at once: all that a save in the foreground needs of extra host memory."""
AHEAD = 8 << 20
"""Bytes after which the kernel is asked to begin writing."""
ALGORITHM = "xxh3_128"
"""128 bits against accidents, at memory speed. SHA-256 costs as much time as writing (benchmarks/checkpoint.py)."""
HASHES: dict[str, Callable[[], Any]] = {ALGORITHM: xxhash.xxh3_128, "sha256": hashlib.sha256}


def write_tensors(path: Path, pieces: Sequence[Piece]) -> tuple[int, str]:
    """Write `pieces` but the empty ones to `path`, and fsync it; (size in bytes, "ALGORITHM:HEX").

    Raises OSError, and ValueError for a tensor that is not float32 or is there twice.
    """
    pieces = [piece for piece in pieces if piece.values.numel()]
    wrong = [piece for piece in pieces if piece.values.dtype != torch.float32]
    if wrong or len({piece.key for piece in pieces}) < len(pieces):
        which = f"{wrong[0].key}: {wrong[0].values.dtype}" if wrong else "a tensor is there twice"
        raise ValueError(f"{which}; checkpoints hold float32, once")
    header = _header((piece.key, (piece.values.numel(),)) for piece in pieces)
    return _write(path, header, (piece.values for piece in pieces), ALGORITHM)


def write_whole(
    path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> str:
    """Write a safetensors file of float32 tensors in their shapes, one at a time as `tensors` makes them, and fsync it;
    its SHA-256. Raises OSError, and ValueError where `tensors` are not those of `shapes`, in their order."""

    def checked() -> Iterator[Tensor]:
        for (name, shape), (given, values) in zip(shapes.items(), tensors, strict=True):
            if name != given or tuple(values.shape) != tuple(shape) or values.dtype != torch.float32:
                raise ValueError(f"{given}: {values.dtype} {tuple(values.shape)}, expected {name}: {tuple(shape)}")
            yield values

    return _write(path, _header(shapes.items(), metadata), checked(), "sha256")[1].partition(":")[2]


def _write(path: Path, header: bytes, tensors: Iterable[Tensor], algorithm: str) -> tuple[int, str]:
    size, digest, begun = 0, HASHES[algorithm](), 0
    with path.open("wb", buffering=SMALL) as file:
        for block in _blocks(header, tensors):
            digest.update(block)
            size += file.write(block)
            if size - begun >= AHEAD:
                _begin_writing(file.fileno(), begun, size - begun)
                begun = size
        file.flush()
        os.fsync(file.fileno())
    return size, f"{algorithm}:{digest.hexdigest()}"


def _begin_writing(descriptor: int, start: int, length: int) -> None:
    """Let the kernel write what it has, so that the disk works while we go on and fsync finds little left. It also
    drops what is written from its cache, where samples are of more use."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a hint: what matters is the fsync at the end
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def _blocks(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        values = tensor.detach().reshape(-1)
        for start in range(0, len(values), DEVICE_CHUNK // 4):
            block = as_bytes(values[start : start + DEVICE_CHUNK // 4].cpu())
            yield from (block[at : at + CHUNK] for at in range(0, len(block), CHUNK))


def as_bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return memoryview(values.numpy()).cast("B")


def _header(shapes: Iterable[tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, shape in shapes:
        end = at + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values are aligned
    return len(text).to_bytes(8, "little") + text


class TensorFile:
    """The float32 tensors of a safetensors file, read range by range into memory of their own.

    The library's reader maps files instead: pages that were looked at stay this process's memory until it closes them.
    """

    def __init__(self, path: Path) -> None:
        """Read the header. Raises OSError, and ValueError where it is none, or claims what the file does not hold."""
        self._path = path
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("no header of a safetensors file")
            header = json.loads(file.read(length))
        self._places: dict[str, tuple[int, int]] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                self._places[name] = self._place(name, entry, 8 + length, size)

    @staticmethod
    def _place(name: str, entry: Any, base: int, size: int) -> tuple[int, int]:
        try:
            (start, end), count = entry["data_offsets"], math.prod(entry["shape"])
            fits = entry["dtype"] == "F32" and end - start == 4 * count and 0 <= start <= end <= size - base
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"{name}: no float32 tensor within the file: {entry}")
        return base + start, count

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened tensor. Raises OSError, KeyError for a name that is not
        there, ValueError for elements that are not."""
        at, count = self._places[name]
        out = torch.empty(length)
        if not 0 <= start <= start + length <= count:
            raise ValueError(f"{name}: elements [{start}, {start + length}) of {count}")
        if not length:
            return out
        buffer, done = as_bytes(out), 0
        with self._path.open("rb", buffering=0) as file:
            file.seek(at + 4 * start)
            while done < len(buffer):
                got = file.readinto(buffer[done:])
                if not got:
                    raise OSError(f"{self._path}: ends within {name}")
                done += got
        return out


def checksum_of(path: Path, algorithm: str = ALGORITHM) -> str:
    """ "ALGORITHM:HEX" of a file's content. Raises UserError for an algorithm that is none of HASHES."""
    if algorithm not in HASHES:
        raise UserError(f"{path}: its checksum is of kind {algorithm!r}, this version knows {', '.join(HASHES)}")
    digest, buffer = HASHES[algorithm](), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return f"{algorithm}:{digest.hexdigest()}"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal: what other programs compare files by."""
    return checksum_of(path, "sha256").partition(":")[2]


def checksum_of_bytes(content: bytes, algorithm: str = ALGORITHM) -> str:
    """The same of `content`."""
    digest = HASHES[algorithm]()
    digest.update(content)
    return f"{algorithm}:{digest.hexdigest()}"

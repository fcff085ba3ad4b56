"""One pass over a file: safetensors written front to back with its checksum taken on the way, and checksums of files.

safetensors' own `save_file` wants all tensors in host memory as copies of their own (fragments are views of shared
buffers), and a checksum of what it wrote another pass over the file. Here a GPU's tensors pass through one buffer of
DEVICE_CHUNK bytes, those in host memory through none. The result is plain safetensors (github.com/huggingface/
safetensors, README, "Format"): eight bytes of length, that many bytes of JSON, then the values.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
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
    size, digest, begun = 0, HASHES[ALGORITHM](), 0
    with path.open("wb", buffering=SMALL) as file:
        for block in _blocks(pieces):
            digest.update(block)
            size += file.write(block)
            if size - begun >= AHEAD:
                _begin_writing(file.fileno(), begun, size - begun)
                begun = size
        file.flush()
        os.fsync(file.fileno())
    return size, f"{ALGORITHM}:{digest.hexdigest()}"


def _begin_writing(descriptor: int, start: int, length: int) -> None:
    """Let the kernel write what it has, so that the disk works while we go on and fsync finds little left. It also
    drops what is written from its cache, where samples are of more use."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a hint: what matters is the fsync at the end
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def _blocks(pieces: Sequence[Piece]) -> Iterator[bytes | memoryview]:
    yield _header(pieces)
    for piece in pieces:
        values = piece.values.detach().reshape(-1)
        for start in range(0, len(values), DEVICE_CHUNK // 4):
            block = as_bytes(values[start : start + DEVICE_CHUNK // 4].cpu())
            yield from (block[at : at + CHUNK] for at in range(0, len(block), CHUNK))


def as_bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return memoryview(values.numpy()).cast("B")


def _header(pieces: Sequence[Piece]) -> bytes:
    entries, at = {}, 0
    for piece in pieces:
        if piece.values.dtype != torch.float32 or piece.key in entries:
            raise ValueError(f"{piece.key}: {piece.values.dtype}, or there twice; checkpoints hold float32, once")
        end = at + 4 * piece.values.numel()
        entries[piece.key] = {"dtype": "F32", "shape": [piece.values.numel()], "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values are aligned
    return len(text).to_bytes(8, "little") + text


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

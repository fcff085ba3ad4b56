"""KEY.tokens.npy: token ids of one document, each sentence ended by `</s>`."""

from __future__ import annotations

import io
import re
from functools import lru_cache

import numpy as np

from megad2v.modalities.sample import BadSample
from megad2v.modalities.text.tokenizer import Tokens

HEADER_BYTES = 1024
"""More than any header of a one-dimensional array."""
SHAPE = re.compile(rb"'shape': \((\d+),\)")
DTYPES = frozenset({np.dtype("<u2"), np.dtype("<u4")})


def write_tokens(tokens: Tokens) -> bytes:
    """(tokens,) uint16 or uint32 -> the bytes of a .npy."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, tokens, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


@lru_cache(maxsize=4096)  # rows of one length have one header
def token_header(count: int, width: int) -> bytes:
    """What comes before the bytes of so many tokens of `width` bytes in `write_tokens`."""
    tokens = np.zeros(count, dtype=f"<u{width}")
    return write_tokens(tokens)[: -tokens.nbytes or None]


def read_tokens(data: bytes) -> Tokens:
    """(tokens,) uint16 or uint32, read-only. Raises BadSample for anything else."""
    return np.frombuffer(data, dtype=data_type(data), offset=data_start(data))


def data_start(data: bytes) -> int:
    """How many bytes the header of a .npy takes, by its first bytes."""
    wide = data[6:7] != b"\x01"  # version 1 of the format
    return 12 + int.from_bytes(data[8:12], "little") if wide else 10 + int.from_bytes(data[8:10], "little")


def data_type(data: bytes) -> np.dtype:
    """uint16 or uint32, by the header of a whole .npy. Raises BadSample where it is none of ours, or cut short."""
    start = data_start(data)
    try:
        shape, dtype = _header(data[:start])
    except (ValueError, SyntaxError, TypeError) as error:
        raise BadSample(f"no .npy: {error}") from error
    if len(shape) != 1 or dtype not in DTYPES:
        raise BadSample(f"tokens are {dtype} of shape {shape}; expected one dimension of uint16 or uint32")
    count, rest = divmod(len(data) - start, dtype.itemsize)
    if shape[0] != count or rest:
        raise BadSample(f"cut short: {count} of {shape[0]} tokens")
    return dtype


def token_count(head: bytes, size: int | None = None) -> int:
    """Tokens by the header in the first bytes of a file of `size` bytes; 0 where it is none or states too many."""
    # Not numpy's parser, which takes 30 microseconds: the index of a billion documents is made with this.
    shape = SHAPE.search(head) if head.startswith(np.lib.format.MAGIC_PREFIX) else None
    count = int(shape[1]) if shape else 0
    return 0 if size is not None and count * min(dtype.itemsize for dtype in DTYPES) > size else count


@lru_cache(maxsize=4096)  # numpy's parser takes 30 microseconds, and documents of one length have one header
def _header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype

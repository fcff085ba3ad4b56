"""Which blocks of the student run in an update."""

from __future__ import annotations

import hashlib


def kept_blocks(seed: int, step: int, *, depth: int, rate: float) -> tuple[int, ...] | None:
    """Blocks (from 0) that update `step` runs; None for all, where nothing is ever dropped.

    Every block stays with probability 1 - rate, independently of the others, as fairseq's encoder_layerdrop has it (so
    now and then none stays). A pure function, so all ranks, all micro-batches of the step and every layout agree.
    """
    if rate == 0.0:
        return None
    return tuple(block for block in range(depth) if _uniform(f"layer_drop/{seed}/{step}/{block}") >= rate)


def _uniform(key: str) -> float:
    """A number in [0, 1) from 53 bits of a hash: the same on every platform and version."""
    return (int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 11) / 2**53

"""The order in which samples are met: a pure function of (seed, epoch, position), computed and never stored.

Shards are shuffled whole; `window` shards that follow each other in that shuffle are then mixed sample by sample
with a keyed permutation. So reading touches `window` files at a time, and any position can be computed on its own:
that is what makes the state of the data one integer. Only hashes and integer arithmetic are used, so the order does
not depend on the version of numpy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

ROUNDS = 6
SMALLEST_HALF_BITS = 3
"""Halves of one or two bits mix badly; a domain of 64 costs tiny windows a few more walks instead."""
CACHED = 8


def digest(*parts: object) -> bytes:
    """32 bytes that depend on every part and on nothing else."""
    return blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=32).digest()


@lru_cache(maxsize=CACHED)
def shard_sequence(seed: int, epoch: int, count: int) -> Int64s:
    """Numbers 0..count-1 of shards in the order in which an epoch meets them; kept, as length buckets share it."""
    keys = [digest(seed, epoch, "shard", number) for number in range(count)]
    sequence = np.array(sorted(range(count), key=keys.__getitem__), dtype=np.int64)
    sequence.flags.writeable = False
    return sequence


class KeyedPermutation:
    """A bijection of 0..size-1 in O(1) memory: a Feistel network on the next power of four, walked back into range."""

    def __init__(self, size: int, *key: object) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got {size}")
        self.size = size
        half = max(SMALLEST_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._low = np.uint64((1 << half) - 1)
        self._top = np.uint64(64 - half)
        # Three words per round; multipliers are odd so that multiplying modulo 2^64 loses nothing.
        words = np.frombuffer(b"".join(digest(*key, i)[:24] for i in range(ROUNDS)), dtype="<u8").astype(np.uint64)
        self._rounds = words.reshape(ROUNDS, 3) | np.array([0, 1, 1], dtype=np.uint64)

    def __call__(self, positions: Int64s) -> Int64s:
        """The image of each position; positions must lie in 0..size-1."""
        values = self._scramble(positions.astype(np.uint64))
        # The network permutes the power of four; following its cycle until it is back in range permutes 0..size-1.
        outside = values >= self.size
        while outside.any():
            values[outside] = self._scramble(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _scramble(self, values: UInt64s) -> UInt64s:
        left, right = values >> self._half, values & self._low
        for add, first, second in self._rounds:
            mixed = (right + add) * first
            mixed = (mixed ^ (mixed >> np.uint64(31))) * second
            left, right = right, left ^ (mixed >> self._top)
        return (left << self._half) | right


@dataclass(frozen=True)
class _Epoch:
    shards: Int64s
    """Shard numbers in shuffled order."""
    ends: Int64s
    """(shards + 1,) running total of their sizes, from 0."""
    windows: Int64s
    """(windows + 1,) the totals at window borders."""


class SampleOrder:
    """Position k of an epoch -> sample index, for shards of given sizes. Sample indices count through the shards.

    Orders of the same seed and epoch meet the shards in the same sequence, whatever their sizes; `salt` makes them mix
    the samples of a window differently.
    """

    def __init__(
        self, shard_sizes: Sequence[int] | Int64s, *, seed: int, window: int, salt: tuple[object, ...] = ()
    ) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self.size = int(self._starts[-1])
        if window < 1 or self.size < 1:
            raise ValueError(f"window ({window}) and number of samples ({self.size}) must be at least 1")
        self._seed = seed
        self._window = window
        self._salt = salt
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._permutations: OrderedDict[tuple[int, int], KeyedPermutation] = OrderedDict()

    def indices(self, epoch: int, positions: Int64s) -> Int64s:
        """The sample index at each position (0..size-1) of an epoch; over all positions each index comes once."""
        plan = self._epoch(epoch)
        window_of = np.searchsorted(plan.windows, positions, side="right") - 1
        mixed = np.empty_like(positions)
        for window in np.unique(window_of):
            here = window_of == window
            start = plan.windows[window]
            mixed[here] = start + self._permutation(epoch, int(window), plan)(positions[here] - start)
        slot = np.searchsorted(plan.ends, mixed, side="right") - 1
        return self._starts[plan.shards[slot]] + mixed - plan.ends[slot]

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = shard_sequence(self._seed, epoch, len(self._sizes))
            ends = np.concatenate([[0], np.cumsum(self._sizes[shards])])
            borders = np.append(ends[: -1 : self._window], ends[-1])
            self._epochs[epoch] = _Epoch(shards, ends, borders)
            if len(self._epochs) > CACHED:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _permutation(self, epoch: int, window: int, plan: _Epoch) -> KeyedPermutation:
        if (epoch, window) not in self._permutations:
            size = int(plan.windows[window + 1] - plan.windows[window])
            self._permutations[epoch, window] = KeyedPermutation(size, self._seed, epoch, "window", window, *self._salt)
            if len(self._permutations) > CACHED:
                self._permutations.popitem(last=False)
        return self._permutations[epoch, window]


def sample_index(seed: int, epoch: int, k: int, shard_sizes: Sequence[int], window: int) -> int:
    """Which sample is met at position k (0..n-1) of an epoch. `SampleOrder` is the same, kept for many positions."""
    order = SampleOrder(shard_sizes, seed=seed, window=window)
    return int(order.indices(epoch, np.array([k], dtype=np.int64))[0])

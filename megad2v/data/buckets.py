"""Micro-batches of samples that differ in length: a pure function of their running number, as for samples of one size.

Samples lie in length buckets. A bucket has its own order (order.py) and a fixed number of rows, so its micro-batches of
an epoch are numbered; the epoch is all buckets' micro-batches, merged so that each bucket is spread evenly over it.
Whatever the position in the epoch, bucket and number follow from a few dozen sums over the buckets: nothing is listed,
and the state of the data stays the step number. A micro-batch never mixes epochs, and an epoch has every sample once.

A plan keeps how many samples of a shard lie in each bucket, and which ones for the few shards that it met last: what it
takes does not grow with the samples.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from megad2v.data.order import Int64s, SampleOrder, digest

Lengths = npt.NDArray[np.uint32] | Int64s

UNIT = 2**32
"""An epoch in the units in which buckets are merged; more than any bucket has micro-batches."""
CACHED = 8
CACHED_SHARDS = 64
"""Whose sorted samples are kept: several windows."""


@dataclass(frozen=True)
class LengthBudget:
    """How samples of different lengths share micro-batches; lengths in waveform samples (or whatever is counted)."""

    shortest: int
    """Shorter samples are left out."""
    longest: int
    """Longer ones are cropped to it; so are samples of unknown length (0), for all that is known."""
    samples: int | None = None
    """Rows of every micro-batch, or None: as many as `total` holds."""
    total: int = 0
    """Summed length of a micro-batch, each row taken for as long as the longest."""

    def rows(self, length: int) -> int:
        """Rows of a micro-batch whose longest sample has this length; one at least."""
        return self.samples if self.samples is not None else max(1, self.total // length)

    def cropped(self, lengths: Lengths) -> Int64s:
        """The lengths that count, 0 for samples that are left out."""
        known = np.where(lengths == 0, self.longest, np.minimum(lengths, self.longest)).astype(np.int64)
        return np.where(known < self.shortest, 0, known)


def bucket_ends(shortest: int, longest: int, ratio: float) -> Int64s:
    """The largest length of each bucket, ascending: the fewest buckets whose ends grow geometrically by at most `ratio`
    from `shortest` to `longest`."""
    count = max(1, math.ceil(math.log(longest / shortest) / math.log(ratio) - 1e-9))
    ends = shortest * (longest / shortest) ** (np.arange(1, count + 1) / count)
    return np.unique(np.rint(ends).astype(np.int64))  # short lengths and ratios near 1 can round to one


@dataclass(frozen=True)
class _Bucket:
    number: int
    """Among all, also those without samples."""
    starts: Int64s
    """(shards + 1,) how many samples of the bucket lie in earlier shards."""
    order: SampleOrder
    micro_batches: int
    """Of an epoch."""


class BucketPlan:
    """Running number of a micro-batch -> its samples."""

    def __init__(
        self,
        lengths: Lengths | Callable[[int], Lengths],
        shard_sizes: Sequence[int],
        budget: LengthBudget,
        *,
        ratio: float,
        seed: int,
        window: int,
    ) -> None:
        """`lengths` of all samples in the order of the shards, or a function that reads those of one shard; samples
        that are left out are none of the plan's."""
        self._seed = seed
        self._longest = budget.longest
        self._ends = bucket_ends(budget.shortest, budget.longest, ratio)
        # A table: bisecting a hundred million lengths takes ten times as long.
        cropped = budget.cropped(np.arange(budget.longest + 1))
        numbers = np.where(cropped > 0, np.searchsorted(self._ends, cropped), len(self._ends))
        self._bucket_at = numbers.astype(np.min_scalar_type(len(self._ends)))
        self._starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
        self._read = lengths if callable(lengths) else self._part_of(lengths)
        self._sorted: OrderedDict[int, tuple[Int64s, npt.NDArray[np.uint32]]] = OrderedDict()
        counts_sb = np.zeros((len(shard_sizes), len(self._ends) + 1), dtype=np.int64)
        self.unknown = 0
        """Samples of unknown length."""
        self.total = self.longer = 0
        """Lengths of an epoch, summed as they count; samples that are longer than the longest that counts."""
        for shard in range(len(shard_sizes)):
            of_shard = self._read(shard)
            self.total += int(budget.cropped(of_shard).sum())
            self.longer += int(np.count_nonzero(of_shard > budget.longest))
            self.unknown += int(np.count_nonzero(of_shard == 0))
            counts_sb[shard] = np.bincount(self._bucket_of(of_shard), minlength=len(self._ends) + 1)
        self.left_out = int(counts_sb[:, -1].sum())
        """Samples that are too short."""
        self._buckets: list[_Bucket] = []
        for number, end in enumerate(self._ends.tolist()):
            sizes = counts_sb[:, number]
            total = int(sizes.sum())
            if total:
                starts = np.concatenate([[0], np.cumsum(sizes)])
                order = SampleOrder(sizes, seed=seed, window=window, salt=("bucket", number))
                self._buckets.append(_Bucket(number, starts, order, -(-total // budget.rows(end))))
        self._counts = np.array([bucket.micro_batches for bucket in self._buckets], dtype=np.int64)
        self.epoch_size = sum(bucket.order.size for bucket in self._buckets)
        """Samples of an epoch."""
        self.epoch_micro_batches = int(self._counts.sum())
        self.buckets = len(self._buckets)
        """Those that hold samples."""
        self._phases: OrderedDict[int, Int64s] = OrderedDict()

    def numbered(self, number: int) -> list[tuple[int, int]]:
        """(epoch, sample index) of each row of micro-batch `number` (0, 1, ..., over all epochs)."""
        epoch, position = divmod(number, self.epoch_micro_batches)
        which, j = self.place(epoch, position)
        bucket = self._buckets[which]
        # Shared out evenly: a bucket's micro-batches differ by one row at most, so none is left with a single one.
        size, parts = bucket.order.size, bucket.micro_batches
        positions = np.arange(j * size // parts, (j + 1) * size // parts, dtype=np.int64)
        members = self._members(bucket, bucket.order.indices(epoch, positions))
        return [(epoch, member) for member in members.tolist()]

    def _members(self, bucket: _Bucket, places: Int64s) -> Int64s:
        """Sample indices of a bucket's members with these numbers; members ascend."""
        shards = np.searchsorted(bucket.starts, places, side="right") - 1
        within, members = places - bucket.starts[shards], np.empty_like(places)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            borders, rows = self._sorted_rows(shard)
            members[here] = self._starts[shard] + rows[borders[bucket.number] + within[here]]
        return members

    def _sorted_rows(self, shard: int) -> tuple[Int64s, npt.NDArray[np.uint32]]:
        """(where each bucket begins, the shard's rows by bucket and ascending within)."""
        if shard in self._sorted:
            self._sorted.move_to_end(shard)
            return self._sorted[shard]
        bucket_of = self._bucket_of(self._read(shard))
        rows = np.argsort(bucket_of, kind="stable")
        borders = np.searchsorted(bucket_of[rows], np.arange(len(self._ends) + 1))
        self._sorted[shard] = borders, rows.astype(np.uint32)
        if len(self._sorted) > CACHED_SHARDS:
            self._sorted.popitem(last=False)
        return self._sorted[shard]

    def _bucket_of(self, lengths: Lengths) -> npt.NDArray[np.unsignedinteger]:
        """Number of each sample's bucket; one beyond the last for those that are left out."""
        return self._bucket_at[np.minimum(lengths, self._longest)]

    def _part_of(self, lengths: Lengths) -> Callable[[int], Lengths]:
        return partial(_part, lengths, self._starts)

    def epochs(self, micro_batches: int) -> dict[str, float]:
        """As plan.Plan.epochs."""
        return {"": micro_batches / self.epoch_micro_batches}

    def place(self, epoch: int, position: int) -> tuple[int, int]:
        """(bucket, number of its micro-batch in the epoch) at a position (0..epoch_micro_batches-1) of an epoch.

        Micro-batch j of the m of a bucket has its time at (j + phase) / m of the epoch, and the position is its rank
        among all. Times are compared on a grid that is fine enough for a bucket to be in a cell but once; within
        a cell the order is that of the buckets.
        """
        phases, total = self._phases_of(epoch), self.epoch_micro_batches

        def earlier(time: int) -> Int64s:
            """Micro-batches of each bucket before a time in units: ceil((time m - phase) / UNIT)."""
            return -((phases - time * self._counts) // UNIT)

        # A bucket has had its share to less than one micro-batch at any time: only those within this span can be meant.
        before = earlier(max(0, UNIT * (position - self.buckets) // total))
        ahead = earlier(min(UNIT, UNIT * (position + self.buckets + 1) // total + 1)) - before
        buckets = np.repeat(np.arange(self.buckets), ahead)
        numbers = np.arange(len(buckets)) + np.repeat(before + ahead - np.cumsum(ahead), ahead)
        cells = (numbers * UNIT + phases[buckets]) // self._counts[buckets]
        here = np.argsort(cells, kind="stable")[position - int(before.sum())]
        return int(buckets[here]), int(numbers[here])

    def _phases_of(self, epoch: int) -> Int64s:
        """For each bucket when its first micro-batch comes, in 0..UNIT-1 of the time between two of them."""
        if epoch not in self._phases:
            words = [digest(self._seed, epoch, "phase", number)[:4] for number in range(self.buckets)]
            self._phases[epoch] = np.array([int.from_bytes(word, "little") for word in words], dtype=np.int64)
            if len(self._phases) > CACHED:
                self._phases.popitem(last=False)
        return self._phases[epoch]


def _part(lengths: Lengths, starts: Int64s, shard: int) -> Lengths:
    return lengths[starts[shard] : starts[shard + 1]]


def grouped_in_order(lengths: Int64s, budget: LengthBudget) -> list[list[int]]:
    """Sample indices in their order, as many to a micro-batch as `budget` holds at the length of its longest."""
    cropped = budget.cropped(lengths)
    groups: list[list[int]] = []
    longest = 0
    for index in np.flatnonzero(cropped).tolist():
        longest = max(longest, int(cropped[index]))
        if groups and len(groups[-1]) < budget.rows(longest):
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = int(cropped[index])
    return groups

"""Micro-batches of samples that differ in length: once an epoch, within the budget, spread, and near in the shards."""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from megad2v.data.buckets import UNIT, BucketPlan, LengthBudget, bucket_ends, grouped_in_order
from megad2v.data.order import Int64s
from megad2v.data.plan import rank_share

SECOND = 16_000
SHORTEST, LONGEST = 2 * SECOND, 20 * SECOND


def speechlike(count: int, seed: int = 0) -> Int64s:
    """Lengths with LibriSpeech's shape: most of 11 to 16 s, a long tail of short ones; some too short, some unknown."""
    rng = np.random.default_rng(seed)
    seconds = np.where(rng.random(count) < 0.65, rng.normal(14, 1.5, count), rng.uniform(1.2, 28, count))
    lengths = (np.clip(seconds, 1.2, None) * SECOND).astype(np.int64)
    lengths[rng.random(count) < 0.01] = 0
    return lengths


def plan(lengths: Int64s, *, seconds: float = 60, shards: int = 7, ratio: float = 1.1, **options: int) -> BucketPlan:
    sizes = [len(part) for part in np.array_split(lengths, shards)]
    budget = LengthBudget(SHORTEST, LONGEST, total=round(seconds * SECOND))
    return BucketPlan(lengths, sizes, budget, ratio=ratio, **{"seed": 1, "window": 2, **options})


@pytest.mark.parametrize("count", [1, 5, 40, 300])
@pytest.mark.parametrize("seconds", [20, 237.5])
def test_every_sample_once_an_epoch(count: int, seconds: float) -> None:
    lengths = speechlike(count, seed=count)
    lengths[0] = LONGEST
    planned = plan(lengths, seconds=seconds, shards=min(7, count))
    kept = np.flatnonzero((lengths == 0) | (lengths >= SHORTEST)).tolist()
    assert planned.epoch_size == len(kept)
    for epoch in range(3):
        numbers = range(epoch * planned.epoch_micro_batches, (epoch + 1) * planned.epoch_micro_batches)
        rows = [row for number in numbers for row in planned.numbered(number)]
        assert {e for e, _ in rows} == {epoch}, "a micro-batch never mixes epochs"
        assert Counter(index for _, index in rows) == Counter(kept)
        assert all(planned.numbered(number) for number in numbers), "none is empty"


@pytest.mark.parametrize("seconds", [20, 45, 237.5])
def test_budget_and_bucket_hold(seconds: float) -> None:
    lengths, ratio = speechlike(1500), 1.1
    planned = plan(lengths, seconds=seconds, ratio=ratio)
    fill = []
    for number in range(planned.epoch_micro_batches):
        rows = [index for _, index in planned.numbered(number)]
        longest = [min(LONGEST, length or LONGEST) for length in lengths[rows].tolist()]
        assert len(rows) * max(longest) <= seconds * SECOND
        assert max(longest) <= ratio * min(longest) + 2, "edges are rounded to samples"
        fill.append(len(rows) * min(longest) / (seconds * SECOND))
    assert np.median(fill) > (0.85 if seconds > 100 else 0.7)


def test_row_that_outgrows_the_budget_is_alone() -> None:
    """config.validate refuses such a budget; the plan must not come to nothing with it."""
    planned = plan(np.full(5, LONGEST), seconds=3, shards=1)
    assert sorted(planned.numbered(number)[0][1] for number in range(5)) == [0, 1, 2, 3, 4]
    assert all(len(planned.numbered(number)) == 1 for number in range(5))


def test_rows_are_shared_out_evenly() -> None:
    """13 samples of which 12 fit: 6 and 7, and not 12 and a micro-batch of one."""
    planned = plan(np.full(13, LONGEST), seconds=240, shards=1)
    assert sorted(len(planned.numbered(number)) for number in range(2)) == [6, 7]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_ranks_compute_the_same_steps(world: int) -> None:
    lengths = speechlike(200)
    micro_batches, steps = 4, 50
    running = plan(lengths)
    alone = [running.numbered(number) for number in range(micro_batches * steps)]
    met: dict[int, list[tuple[int, int]]] = {}
    for rank in range(world):
        own = plan(lengths)
        for step in range(steps):
            for m in rank_share(micro_batches, rank, world):
                met[step * micro_batches + m] = own.numbered(step * micro_batches + m)
    assert [met[number] for number in sorted(met)] == alone
    assert alone[-1][0][0] >= 2, "over the ends of epochs"


def test_any_position_is_computed_alone() -> None:
    lengths = speechlike(600)
    running = plan(lengths)
    whole = [running.numbered(number) for number in range(2 * running.epoch_micro_batches)]
    for number in np.random.default_rng(0).permutation(len(whole))[:40].tolist():
        assert plan(lengths).numbered(number) == whole[number]


def test_merge_is_that_of_the_times() -> None:
    """Against the definition, in exact fractions: micro-batch j of m has its time at (j + phase) / m. Times within one
    2^32nd of the epoch may change places."""
    planned = plan(speechlike(900), seconds=30)
    for epoch in range(3):
        phases = planned._phases_of(epoch).tolist()
        times: list[tuple[Fraction, int, int]] = []
        for bucket, (phase, count) in enumerate(zip(phases, planned._counts.tolist(), strict=True)):
            for j in range(count):
                insort(times, (Fraction(j * UNIT + phase, count * UNIT), bucket, j))
        found = [planned.place(epoch, position) for position in range(planned.epoch_micro_batches)]
        assert len(set(found)) == len(times) == planned.epoch_micro_batches
        at = {(bucket, j): time for time, bucket, j in times}
        for (time, _, _), place in zip(times, found, strict=True):
            assert abs(at[place] - time) < Fraction(1, UNIT // 2)


def test_buckets_are_spread_over_the_epoch() -> None:
    """Any stretch has of each bucket what its share is, to one or two; and the length changes all the time."""
    lengths = speechlike(20_000)
    planned = plan(lengths)
    met = [lengths[[index for _, index in planned.numbered(number)]].max() for number in range(20)]
    assert np.std(met) > 0.5 * np.std(np.minimum(lengths, LONGEST)), "as different as the recordings themselves"
    total, stretch = planned.epoch_micro_batches, 200
    buckets = np.array([planned.place(0, position)[0] for position in range(total)])
    shares = np.bincount(buckets) / total
    assert planned.buckets > 20
    for start in range(0, total - stretch, 77):
        counts = np.bincount(buckets[start : start + stretch], minlength=len(shares))
        assert np.abs(counts - stretch * shares).max() < 3
    longest_run = max(len(run) for run in np.split(buckets, np.flatnonzero(np.diff(buckets)) + 1))
    assert longest_run <= 1 + math.ceil(shares.max() / (1 - shares.max()))


def test_each_bucket_keeps_its_order_and_epochs_differ() -> None:
    planned = plan(speechlike(3000))
    epochs = []
    for epoch in range(2):
        places = [planned.place(epoch, position) for position in range(planned.epoch_micro_batches)]
        for bucket in range(planned.buckets):
            own = [j for which, j in places if which == bucket]
            assert own == list(range(len(own)))
        epochs.append(places)
    assert epochs[0] != epochs[1]
    first = [planned.numbered(number) for number in range(2 * planned.epoch_micro_batches)]
    assert {i for _, i in first[0]} not in [{i for _, i in rows} for rows in first[planned.epoch_micro_batches :]]


def test_reading_stays_near_in_the_shards() -> None:
    """100 shards of 2,000 samples, window 4: a hundred micro-batches read from one or two windows, three at most, since
    all buckets meet the shards in the same sequence and at the same pace."""
    planned = plan(speechlike(200_000), shards=100, window=4, seconds=150)
    touched = []
    for start in range(0, planned.epoch_micro_batches - 100, 2500):
        rows = [index for k in range(100) for _, index in planned.numbered(start + k)]
        assert len(rows) > 800
        touched.append(len({index // 2000 for index in rows}))
    assert max(touched) <= 12


def test_buckets_mix_the_same_window_differently() -> None:
    """Two buckets of equally many samples in the same places of the shards do not meet them in step."""
    lengths = np.tile(np.array([3, 15], dtype=np.int64) * SECOND, 400)
    planned = plan(lengths, shards=2, seconds=300)
    order = {bucket: [] for bucket in range(planned.buckets)}
    for position in range(planned.epoch_micro_batches):
        order[planned.place(0, position)[0]] += [index // 2 for _, index in planned.numbered(position)]
    one, other = order.values()
    assert sorted(one) == sorted(other) and one != other
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 20


def test_ends_grow_by_the_ratio_at_most() -> None:
    for shortest, longest, ratio in [(32_000, 320_000, 1.1), (32_000, 320_000, 3.0), (100, 1000, 1.001), (5, 5, 2.0)]:
        ends = bucket_ends(shortest, longest, ratio)
        assert ends[-1] == longest and (np.diff(ends) > 0).all()
        grown = ends / np.concatenate([[shortest], ends[:-1]])
        assert (grown <= ratio * (1 + 1 / shortest)).all()
        assert len(ends) <= max(1, math.ceil(math.log(longest / shortest) / math.log(ratio)))
    assert len(bucket_ends(32_000, 320_000, 1.1)) == 25


def test_fixed_number_of_rows() -> None:
    """`data.micro_batch.samples`: still of one bucket."""
    lengths = speechlike(1000)
    planned = BucketPlan(lengths, [1000], LengthBudget(SHORTEST, LONGEST, samples=8), ratio=1.1, seed=1, window=1)
    counts = Counter(len(planned.numbered(number)) for number in range(planned.epoch_micro_batches))
    assert max(counts) == 8 and counts[8] + counts[7] > 0.8 * counts.total()


def test_validation_groups_are_in_order_and_within_the_budget() -> None:
    lengths = speechlike(300)
    groups = grouped_in_order(lengths, LengthBudget(SHORTEST, LONGEST, total=60 * SECOND))
    met = [index for group in groups for index in group]
    assert met == np.flatnonzero((lengths == 0) | (lengths >= SHORTEST)).tolist()
    padded = [len(group) * max(min(LONGEST, lengths[index] or LONGEST) for index in group) for group in groups]
    assert max(padded) <= 60 * SECOND
    for group, following in pairwise(groups):
        grown = [*group, following[0]]
        assert len(grown) * max(min(LONGEST, lengths[index] or LONGEST) for index in grown) > 60 * SECOND, "room left"

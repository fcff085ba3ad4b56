"""Micro-batches of samples of one size: nothing lost or repeated at the ends of epochs, equal for all ranks."""

from __future__ import annotations

from collections import Counter

import pytest

from megad2v.data.order import SampleOrder
from megad2v.data.plan import SamplePlan, rank_share, shuffled
from megad2v.errors import UserError


def plan(total: int, samples: int) -> SamplePlan:
    return SamplePlan(SampleOrder([total], seed=1, window=1), samples)


@pytest.mark.parametrize("total,samples", [(21, 2), (24, 2), (3, 2), (3, 8), (1, 3), (100, 1)])
def test_stream_runs_on_over_epochs(total: int, samples: int) -> None:
    """Also where a micro-batch holds more than the whole set."""
    planned = plan(total, samples)
    assert planned.epoch_size == total
    numbers = 4 * (3 * total + 1)
    rows = [row for number in range(numbers) for row in planned.numbered(number)]
    assert len(rows) == numbers * samples
    assert [epoch for epoch, _ in rows] == [k // total for k in range(len(rows))]
    for epoch in range(len(rows) // total):
        met = Counter(index for e, index in rows if e == epoch)
        assert met == Counter(range(total)), f"epoch {epoch}"


def test_epochs_differ() -> None:
    planned = plan(50, 50)
    first, second = planned.numbered(0), planned.numbered(1)
    assert [index for _, index in first] != [index for _, index in second]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_a_step(world: int) -> None:
    shares = [list(rank_share(4, rank, world)) for rank in range(world)]
    assert sorted(m for share in shares for m in share) == [0, 1, 2, 3]
    assert all(m % world == rank for rank, share in enumerate(shares) for m in share)
    assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("micro_batches,world", [(4, 3), (1, 2), (0, 1)])
def test_micro_batches_that_cannot_be_shared(micro_batches: int, world: int) -> None:
    with pytest.raises(UserError, match=r"train\.micro_batches_per_step.*multiple of"):
        rank_share(micro_batches, 0, world)


def test_shuffled_epochs() -> None:
    """Every sample once an epoch, in another order each time and for another seed."""
    plan = shuffled(10, 4, epochs=3, seed=1)
    assert [len(rows) for rows in plan] == [4, 4, 2] * 3
    by_epoch = [[row for rows in plan[start : start + 3] for row in rows] for start in (0, 3, 6)]
    assert [{epoch for epoch, _ in rows} for rows in by_epoch] == [{0}, {1}, {2}]
    orders = [[index for _, index in rows] for rows in by_epoch]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in [*orders, list(range(10))]}) == 4
    assert plan == shuffled(10, 4, epochs=3, seed=1) != shuffled(10, 4, epochs=3, seed=2)

"""Micro-batches from step numbers: nothing lost or repeated at the ends of epochs, equal for all ranks."""

from __future__ import annotations

from collections import Counter

import pytest

from megad2v.config.schema import DataConfig, MicroBatchConfig
from megad2v.data.order import SampleOrder
from megad2v.data.plan import Plan, micro_batch_samples, rank_share
from megad2v.errors import UserError


def plan(total: int, *, samples: int, micro_batches: int) -> Plan:
    return Plan(SampleOrder([total], seed=1, window=1), samples=samples, micro_batches=micro_batches)


@pytest.mark.parametrize("total,samples,micro_batches", [(21, 2, 4), (24, 2, 4), (3, 2, 4), (1, 3, 2), (100, 1, 1)])
def test_stream_runs_on_over_epochs(total: int, samples: int, micro_batches: int) -> None:
    """Also where a step holds more than the whole set (3 and 1 samples)."""
    planned = plan(total, samples=samples, micro_batches=micro_batches)
    assert planned.samples_per_step == samples * micro_batches
    steps = 3 * total + 1
    rows = [row for s in range(steps) for m in range(micro_batches) for row in planned.micro_batch(s, m)]
    assert len(rows) == steps * samples * micro_batches
    assert [epoch for epoch, _ in rows] == [k // total for k in range(len(rows))]
    for epoch in range(len(rows) // total):
        met = Counter(index for e, index in rows if e == epoch)
        assert met == Counter(range(total)), f"epoch {epoch}"


def test_epochs_differ() -> None:
    planned = plan(50, samples=50, micro_batches=1)
    first, second = planned.micro_batch(0, 0), planned.micro_batch(1, 0)
    assert [index for _, index in first] != [index for _, index in second]


def test_number_counts_micro_batches() -> None:
    planned = plan(21, samples=2, micro_batches=4)
    assert planned.numbered(4 * 5 + 3) == planned.micro_batch(5, 3)


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


@pytest.mark.parametrize(
    "budget,key",
    [
        (MicroBatchConfig(tokens=100), "tokens"),
        (MicroBatchConfig(samples=4, seconds=1.0), "seconds"),
        (MicroBatchConfig(), "samples"),
        (MicroBatchConfig(samples=0), "samples"),
    ],
)
def test_budgets_that_do_not_fit_images(budget: MicroBatchConfig, key: str) -> None:
    with pytest.raises(UserError, match=rf"data\.micro_batch\.{key}"):
        micro_batch_samples(DataConfig(micro_batch=budget))
    assert micro_batch_samples(DataConfig(micro_batch=MicroBatchConfig(samples=4))) == 4

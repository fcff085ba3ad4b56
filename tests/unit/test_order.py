"""The order of samples: every one once an epoch, a pure function, mixed well, fast enough."""

from __future__ import annotations

import time
from hashlib import sha256

import numpy as np
import pytest

from megad2v.data.order import KeyedPermutation, SampleOrder, sample_index


def whole_epoch(sizes: list[int], *, seed: int = 1, epoch: int = 0, window: int = 3) -> np.ndarray:
    order = SampleOrder(sizes, seed=seed, window=window)
    return order.indices(epoch, np.arange(order.size))


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_permutation_is_a_bijection(size: int) -> None:
    image = KeyedPermutation(size, "key", size)(np.arange(size))
    assert sorted(image.tolist()) == list(range(size))


def test_permutation_needs_an_element() -> None:
    with pytest.raises(ValueError, match="at least one"):
        KeyedPermutation(0, "key")


@pytest.mark.parametrize("sizes", [[1], [5], [7, 5, 9], [0, 4, 0, 0, 3], [1] * 17, [100, 1, 50, 200], [3, 0]])
@pytest.mark.parametrize("window", [1, 2, 8])
@pytest.mark.parametrize("epoch", [0, 5])
def test_every_sample_once_an_epoch(sizes: list[int], window: int, epoch: int) -> None:
    indices = whole_epoch(sizes, window=window, epoch=epoch)
    assert sorted(indices.tolist()) == list(range(sum(sizes)))


def test_depends_on_seed_and_epoch_alone() -> None:
    sizes = [40, 30, 50, 20]
    first = whole_epoch(sizes)
    assert (whole_epoch(sizes) == first).all()
    assert (whole_epoch(sizes, epoch=1) != first).mean() > 0.9
    assert (whole_epoch(sizes, seed=2) != first).mean() > 0.9
    # Asked one by one, backwards, from a fresh object each time: nothing is remembered between calls.
    assert [sample_index(1, 0, k, sizes, 3) for k in range(139, -1, -7)] == first[139::-7].tolist()


def test_order_never_changes() -> None:
    """Runs are resumed by step number, so another order in a later version would repeat and skip samples."""
    indices = np.concatenate([whole_epoch([700, 30, 500, 270, 1], epoch=e, window=2) for e in (0, 1, 1_000_000)])
    assert sha256(indices.astype("<i8").tobytes()).hexdigest()[:16] == "642f9cc88cc20866"


def test_reading_stays_within_a_window_of_shards() -> None:
    sizes, window = [50] * 12, 3
    shards = whole_epoch(sizes, window=window) // 50
    for start in range(0, 600, 50 * window):
        assert len(set(shards[start : start + 50 * window].tolist())) == window
    assert len(set(shards[:50].tolist())) == window, "shards of a window must be mixed, not read one by one"


def test_position_of_a_sample_is_uniform() -> None:
    """Over many epochs a sample is met anywhere in the epoch: chi-squared over 12 positions, 11 degrees of freedom."""
    order = SampleOrder([5, 7], seed=4, window=2)
    epochs = 600
    met = np.array([order.indices(epoch, np.arange(12)) for epoch in range(epochs)])
    for sample in (0, 4, 5, 11):
        counts = (met == sample).sum(axis=0)
        statistic = ((counts - epochs / 12) ** 2 / (epochs / 12)).sum()
        assert statistic < 31.3, (sample, counts)  # 0.1 % of uniform draws exceed it; the seed is fixed


def test_neighbours_are_independent() -> None:
    """A good shuffle leaves about one pair of samples next to each other as they were."""
    indices = whole_epoch([2000, 2000], window=2)
    assert (np.diff(indices) == 1).sum() < 8
    assert abs(np.corrcoef(np.arange(4000), indices)[0, 1]) < 0.05


def test_twenty_thousand_positions_a_second() -> None:
    order = SampleOrder([4000] * 300, seed=1, window=8)
    rates = []
    for attempt in range(4):  # the machine may be busy with something else
        begin = time.process_time()
        for k in range(0, 4096, 16):
            order.indices(attempt, np.arange(k, k + 16))
        rates.append(4096 / (time.process_time() - begin))
    assert max(rates) > 20_000, rates

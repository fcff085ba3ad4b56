"""Collapse statistics and retrieval against NumPy and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megad2v.metrics.statistics import StepStatistics, retrieval_hits
from tests.tolerances import FORMULA

WIDTH = 6


def micro_batches(*rows: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(loss sum, predictions, targets); far from zero, where a naive variance loses its digits."""
    generator = torch.Generator().manual_seed(len(rows))
    made = []
    for number, n in enumerate(rows):
        prediction, target = torch.randn(2, n, WIDTH, generator=generator).unbind()
        spread = torch.arange(1.0, WIDTH + 1)
        made.append((torch.tensor(1.5 * n + number), 100 + spread * prediction, 0.1 * target - 30 * spread))
    return made


def collected(batches: list[tuple[torch.Tensor, ...]]) -> StepStatistics:
    statistics = StepStatistics(WIDTH, torch.device("cpu"))
    for batch in batches:
        statistics.add(*batch)
    return statistics


def spread(rows: np.ndarray) -> float:
    return float(np.sqrt(rows.var(axis=0, ddof=1) + 1e-6).mean())


@pytest.mark.parametrize("rows", [(5,), (3, 1, 0, 8), (2, 2), (1, 1)])
def test_over_all_rows_of_a_step(rows: tuple[int, ...]) -> None:
    """As if the step had been one micro-batch on one rank (spec 6.3)."""
    batches = micro_batches(*rows)
    losses, predictions, targets = (
        np.concatenate([part.double().numpy().reshape(-1, *part.shape[1:]) for part in parts])
        for parts in zip(*batches, strict=True)
    )
    read = collected(batches).read()
    assert read["loss"] == pytest.approx(losses.sum() / sum(rows), rel=1e-12)
    assert read["pred_std"] == pytest.approx(spread(predictions), rel=FORMULA)
    assert read["target_std"] == pytest.approx(spread(targets), rel=FORMULA)


def test_sums_of_ranks_add_up() -> None:
    batches = micro_batches(4, 7, 2)
    whole, first, second = collected(batches), collected(batches[:1]), collected(batches[1:])
    first.sums += second.sums
    assert first.read() == pytest.approx(whole.read(), rel=1e-12)


def test_steps_with_hardly_any_rows() -> None:
    assert collected(micro_batches(0)).read() == {"loss": 0.0, "pred_std": 0.0, "target_std": 0.0}
    assert collected([]).read()["loss"] == 0.0
    # One row has no spread: what is left is the root of the guard's 1e-6.
    assert collected(micro_batches(1)).read()["target_std"] == pytest.approx(1e-3, rel=1e-3)


def test_collapse_shows() -> None:
    loss, prediction, target = micro_batches(9)[0]
    read = collected([(loss, prediction[:1].expand(9, -1), target)]).read()
    assert read["pred_std"] == pytest.approx(1e-3, rel=1e-2)
    assert read["target_std"] > 0.05


def test_nothing_of_the_graph_is_kept() -> None:
    loss, prediction, target = micro_batches(3)[0]
    statistics = collected([(loss.clone().requires_grad_() * 2, prediction, target)])
    assert not statistics.sums.requires_grad


def nearest_is_own(predictions: torch.Tensor, targets: torch.Tensor) -> int:
    hits = 0
    for row, prediction in enumerate(predictions.double()):
        distances = [math.dist(prediction.tolist(), target.tolist()) for target in targets.double()]
        hits += distances.index(min(distances)) == row
    return hits


@pytest.mark.parametrize("noise", [0.0, 0.8, 3.0])
def test_retrieval_counts_nearest_neighbours(noise: float) -> None:
    generator = torch.Generator().manual_seed(3)
    # Lengths differ: the largest product is then not the nearest neighbour.
    targets = torch.randn(60, WIDTH, generator=generator) * torch.linspace(0.5, 3, 60)[:, None]
    predictions = targets + noise * torch.randn(60, WIDTH, generator=generator)
    truth = nearest_is_own(predictions, targets)
    if noise == 0:
        assert truth == 60
    else:
        assert 1 < truth < 50
    for chunk in (1, 7, 60, 1024):
        assert retrieval_hits(predictions, targets, chunk=chunk).item() == truth


def test_chance_is_one_hit_per_micro_batch() -> None:
    generator = torch.Generator().manual_seed(4)
    trials = 100
    hits = [retrieval_hits(*torch.randn(2, 20, WIDTH, generator=generator).unbind()).item() for _ in range(trials)]
    assert abs(np.mean(hits) - 1) < 5 * np.std(hits) / math.sqrt(trials)


def test_equal_predictions_find_one_target() -> None:
    """A collapsed student must not look good."""
    targets = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(5))
    assert retrieval_hits(targets.mean(0).expand(30, -1), targets).item() == 1


def test_retrieval_of_nothing() -> None:
    assert retrieval_hits(torch.empty(0, WIDTH), torch.empty(0, WIDTH)).item() == 0
    assert retrieval_hits(torch.ones(1, WIDTH), torch.zeros(1, WIDTH)).item() == 1

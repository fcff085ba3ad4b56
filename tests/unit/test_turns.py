"""Whose turn a step of a joint run is: shares, own steps in order, and nothing to remember."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from megad2v.config.joint import JointConfig, JointPartConfig
from megad2v.config.schema import Config
from megad2v.data.turns import WINDOW, Turns, training_turns

STEPS = 10_000
WEIGHTS = [
    {"vision": 1.0, "speech": 1.0, "text": 1.0},
    {"vision": 1.0, "text": 1.0},
    {"vision": 3.0, "speech": 2.0, "text": 1.0},
    {"vision": 0.5, "speech": 0.333, "text": 0.167},
    {"vision": 100.0, "speech": 1.0},
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_at_any_time(weights: dict[str, float]) -> None:
    turns, total, counts = Turns(weights, seed=1), sum(weights.values()), Counter[str]()
    for step in range(STEPS):
        modality, own = turns.at(step)
        assert own == counts[modality], "own steps come in their order, none twice, none left out"
        counts[modality] += 1
        for name, weight in weights.items():
            share = weight / total
            # What one window can hold of a modality at its front, or lack there.
            inside = 0 if (step + 1) % WINDOW == 0 else WINDOW * min(share, 1 - share) + 1
            assert abs(counts[name] - (step + 1) * share) <= 1 + inside
    for name, weight in weights.items():
        assert counts[name] / STEPS == pytest.approx(weight / total, abs=0.01 * weight / total)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("steps", [0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 1000])
def test_counts_are_what_is_dealt_out(weights: dict[str, float], steps: int) -> None:
    turns = Turns(weights, seed=1)
    dealt = Counter(turns.at(step)[0] for step in range(steps))
    assert turns.counts(steps) == {name: dealt[name] for name in weights}


def test_far_steps_are_computed_alone() -> None:
    turns, far = Turns(WEIGHTS[2], seed=1), 10**12
    started = time.perf_counter()
    modality, own = turns.at(far)
    assert time.perf_counter() - started < 1.0, "not by way of those before"
    assert own == turns.counts(far)[modality] and sum(turns.counts(far).values()) == far
    assert turns.at(3) == Turns(WEIGHTS[2], seed=1).at(3), "in any order"


def test_seed_and_ratios_alone() -> None:
    def first(turns: Turns) -> list[tuple[str, int]]:
        return [turns.at(step) for step in range(200)]

    weights = WEIGHTS[2]
    doubled = {name: 2 * weight for name, weight in reversed(weights.items())}
    assert first(Turns(weights, seed=1)) == first(Turns(doubled, seed=1))
    assert first(Turns(weights, seed=1)) != first(Turns(weights, seed=2))


def test_no_modality_always_follows_the_same_other() -> None:
    turns = Turns(WEIGHTS[0], seed=1)
    dealt = [turns.at(step)[0] for step in range(STEPS)]
    pairs = Counter(pairwise(dealt))
    assert len(pairs) == 9
    assert all(count == pytest.approx(STEPS / 9, rel=0.15) for count in pairs.values()), pairs
    assert [turns.at(step)[0] for step in range(WINDOW)] != [turns.at(WINDOW + step)[0] for step in range(WINDOW)]


def test_one_modality_has_every_step() -> None:
    turns = Turns({"speech": 0.3}, seed=1)
    assert [turns.at(step) for step in (0, 1, 63, 64, 10**9)] == [("speech", n) for n in (0, 1, 63, 64, 10**9)]
    assert turns.counts(77) == {"speech": 77}


def test_turns_of_a_configuration() -> None:
    vision = Config()
    assert training_turns(vision).at(5) == ("vision", 5)
    parts = JointConfig(speech=JointPartConfig(weight=2.0), text=JointPartConfig(weight=1.0))
    assert training_turns(replace(vision, modality="joint", joint=parts)).weights == {"speech": 2, "text": 1}


@pytest.mark.parametrize("weights", [{}, {"vision": 0.0}, {"vision": 1.0, "text": -1.0}])
def test_weights_that_are_none(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights above 0"):
        Turns(weights, seed=0)

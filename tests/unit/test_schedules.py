"""Learning rate and decay at the points that matter, against the spec's formulas (5, 6.4)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from megad2v.config.schema import Config, OptimizerConfig, ScheduleConfig, TeacherConfig, TrainConfig
from megad2v.teacher.schedule import decay_at
from megad2v.training.loop import _rates
from megad2v.training.schedules import learning_rate

PEAK, STEPS = 2e-3, 1000


def rates(schedule: ScheduleConfig, *updates: int, steps: int = STEPS) -> list[float]:
    return [learning_rate(update, peak=PEAK, steps=steps, schedule=schedule) for update in updates]


def test_cosine() -> None:
    """init + t (lr - init) / w, then min + (lr - min)(1 + cos(pi (t - w) / (N - w))) / 2."""
    schedule = ScheduleConfig(kind="cosine", warmup_steps=200, start_lr=1e-4, min_lr=1e-5)
    assert rates(schedule, 0, 100, 199, 200) == pytest.approx([1e-4, 1.05e-3, 1e-4 + 199 * 1.9e-3 / 200, PEAK])
    quarter = 1e-5 + 0.5 * (PEAK - 1e-5) * (1 + math.cos(math.pi / 4))
    assert rates(schedule, 400, 600, 1000) == pytest.approx([quarter, (PEAK + 1e-5) / 2, 1e-5])
    # fairseq starts over at a tenth of the peak beyond the end; ours stays where it ended.
    assert rates(schedule, 1001, 5000) == pytest.approx([1e-5, 1e-5])


def test_cosine_falls_all_the_way() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=10)
    shape = rates(schedule, *range(1001))
    assert all(a < b for a, b in pairwise(shape[:11]))
    assert all(a > b for a, b in pairwise(shape[10:]))
    assert max(shape) == shape[10] == PEAK


def test_without_warm_up_the_first_update_has_the_peak() -> None:
    assert rates(ScheduleConfig(kind="cosine"), 0) == [PEAK]
    assert rates(ScheduleConfig(kind="constant"), 0) == [PEAK]


def test_warm_up_longer_than_the_run() -> None:
    """--check and short trials of a long recipe: no division by zero, and still on the ramp."""
    schedule = ScheduleConfig(kind="cosine", warmup_steps=50)
    assert rates(schedule, 0, 1, 50, steps=1) == pytest.approx([0.0, PEAK / 50, PEAK])
    assert rates(schedule, 50, steps=50) == pytest.approx([PEAK])


def test_constant() -> None:
    schedule = ScheduleConfig(kind="constant", warmup_steps=10, start_lr=1e-4, min_lr=1e-5)
    assert rates(schedule, 0, 5, 10, 500, 1000, 2000) == pytest.approx([1e-4, 1.05e-3, PEAK, PEAK, PEAK, PEAK])


def test_tri_stage() -> None:
    """0.01 lr up to lr in w, lr for h, lr exp(ln(0.01) k / d), then 0.01 lr; here w = 30, h = 900, d = 70."""
    schedule = ScheduleConfig(kind="tri_stage", warmup_steps=30, hold_fraction=0.9, final_scale=0.01)
    assert rates(schedule, 0, 15, 30, 500, 929) == pytest.approx([0.01 * PEAK, 0.505 * PEAK, PEAK, PEAK, PEAK])
    assert rates(schedule, 930, 965, 1000) == pytest.approx([PEAK, 0.1 * PEAK, 0.01 * PEAK])
    assert rates(schedule, 1001, 9999) == pytest.approx([0.01 * PEAK, 0.01 * PEAK])


def test_tri_stage_without_decay() -> None:
    schedule = ScheduleConfig(kind="tri_stage", warmup_steps=100, hold_fraction=0.9)
    assert rates(schedule, 99, 100, 1000) == pytest.approx([PEAK * (0.01 + 0.99 * 0.99), PEAK, PEAK])


def test_decay() -> None:
    """d0 + (d1 - d0) t / N for t < N, else d1."""
    decays = [decay_at(t, start=0.999, end=0.9998, steps=100) for t in (0, 1, 50, 99, 100, 101, 10**6)]
    assert decays == pytest.approx([0.999, 0.999008, 0.9994, 0.999792, 0.9998, 0.9998, 0.9998], rel=1e-12)


def test_decay_can_be_constant() -> None:
    assert [decay_at(t, start=0.99, end=0.99, steps=10) for t in (0, 3, 10, 11)] == [0.99] * 4
    assert decay_at(0, start=0.9, end=0.99, steps=0) == 0.99


def test_which_update_has_which_rate() -> None:
    """Update number t + 1 is made with lr(t), and the average then absorbs the weights after t + 1 updates with
    d(t + 1): fairseq's loop does so at the start of its next step (spec 5)."""
    config = Config(
        optimizer=OptimizerConfig(lr=PEAK),
        schedule=ScheduleConfig(kind="constant", warmup_steps=10),
        teacher=TeacherConfig(decay_start=0.9, decay_end=0.99, decay_steps=90),
        train=TrainConfig(steps=200),
    )
    assert _rates(config, 0) == pytest.approx((0.0, 0.901), rel=1e-12)
    assert _rates(config, 5) == pytest.approx((PEAK / 2, 0.906), rel=1e-12)
    by_the_run = Config(teacher=TeacherConfig(decay_start=0.9, decay_end=0.99), train=TrainConfig(steps=90))
    assert _rates(by_the_run, 0)[1] == pytest.approx(0.901, rel=1e-12)

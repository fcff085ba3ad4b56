"""Learning rate and decay: at the points that matter, and at every update of the released recipes, against the
formulas of the spec (5, 6.4) and of the programs that they come from, written down once more in numpy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from megad2v.config.load import load_config
from megad2v.config.schema import Config, OptimizerConfig, ScheduleConfig, TeacherConfig, TrainConfig
from megad2v.teacher.schedule import decay_at
from megad2v.training.schedules import learning_rate, rates_at, schedule_remarks
from tests.tolerances import DOUBLE

Values = npt.NDArray[np.float64]
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
    assert rates_at(config, 0) == pytest.approx((0.0, 0.901), rel=1e-12)
    assert rates_at(config, 5) == pytest.approx((PEAK / 2, 0.906), rel=1e-12)
    by_the_run = Config(teacher=TeacherConfig(decay_start=0.9, decay_end=0.99), train=TrainConfig(steps=90))
    assert rates_at(by_the_run, 0)[1] == pytest.approx(0.901, rel=1e-12)


def test_warm_up_can_reach_the_peak_itself() -> None:
    """BEiT's ramp has both ends: its last update has the peak, and so does the first of what follows."""
    schedule = ScheduleConfig(kind="cosine", warmup_steps=200, peak_in_warmup=True, start_lr=1e-4, min_lr=1e-5)
    assert rates(schedule, 0, 199, 200) == pytest.approx([1e-4, PEAK, PEAK], rel=1e-15)
    assert rates(schedule, 100) == pytest.approx([1e-4 + 100 * 1.9e-3 / 199])
    assert rates(schedule, 201)[0] < PEAK
    one = ScheduleConfig(warmup_steps=1, peak_in_warmup=True)  # np.linspace(0, peak, 1) is [0]
    assert rates(one, 0, 1) == [0.0, PEAK]


IMAGES = 1_281_167
"""Of ImageNet-1k's training set."""


def fork_curve(start: float, peak: float, end: float, *, epochs: int, warmup: int, per_epoch: int) -> Values:
    """One value an update, as the BEiT fork's utils.cosine_scheduler tabulates them; `warmup` in epochs."""
    falling = (epochs - warmup) * per_epoch
    shape = 0.5 * (1 + np.cos(np.pi * np.arange(falling) / falling))
    return np.concatenate([np.linspace(start, peak, warmup * per_epoch), end + (peak - end) * shape])


def fairseq_cosine(peak: float, *, updates: int, warmup: int) -> Values:
    """Of lr_scheduler/cosine_lr_scheduler.py with min_lr 0, before its first restart (which is at `updates`)."""
    t = np.arange(updates)
    falling = 0.5 * peak * (1 + np.cos(np.pi * (t - warmup) / (updates - warmup)))
    return np.where(t < warmup, peak / warmup * t, falling)


def fairseq_tri_stage(peak: float, *, updates: int, ratios: tuple[float, float, float], scale: float = 0.01) -> Values:
    """Of lr_scheduler/tri_stage_lr_scheduler.py with phase_ratio: each phase is cut to whole updates by itself."""
    warmup, hold, decay = (int(updates * ratio) for ratio in ratios)
    t = np.arange(updates)
    rising = scale * peak + (peak - scale * peak) / warmup * t
    falling = peak * np.exp(np.log(scale) / decay * (t - warmup - hold))
    phases = [t < warmup, t < warmup + hold, t <= warmup + hold + decay]
    return np.select(phases, [rising, np.full(updates, peak), falling], scale * peak)


def recipe_curve(config: Config) -> Values:
    """The learning rate of every update, from the package's own function."""
    steps, peak = config.train.steps, config.optimizer.lr
    return np.array([learning_rate(t, peak=peak, steps=steps, schedule=config.schedule) for t in range(steps)])


def assert_equal_everywhere(ours: Values, theirs: Values, peak: float) -> None:
    assert ours.shape == theirs.shape
    worst = int(np.abs(ours - theirs).argmax())
    assert abs(ours[worst] - theirs[worst]) <= DOUBLE * peak, f"update {worst}: {ours[worst]} {theirs[worst]}"


@pytest.mark.parametrize(
    ("recipe", "batch", "gpus", "peak", "warmup", "last_of_warm_up"),
    [
        ("vision_base", 128, 16, 2e-3, 10, 6_249),
        ("vision_large", 64, 64, 1e-3, 80, 24_959),
        ("vision_large_phase2", 64, 64, 1e-3, 40, 12_479),
        ("vision_huge14", 64, 64, 1e-3, 80, 24_959),
    ],
)
def test_published_learning_rate_at_every_update(
    recipe: str, batch: int, gpus: int, peak: float, warmup: int, last_of_warm_up: int
) -> None:
    """README and argument defaults of the BEiT fork; its warmup_lr of 1e-6 is never handed on, so it starts from 0."""
    curve = recipe_curve(load_config(recipe))
    theirs = fork_curve(0.0, peak, 1e-5, epochs=800, warmup=warmup, per_epoch=IMAGES // batch // gpus)
    assert_equal_everywhere(curve, theirs, peak)
    assert curve[0] == 0.0
    assert curve[last_of_warm_up] == pytest.approx(peak, rel=1e-15)
    assert curve[last_of_warm_up + 1] == peak > curve[last_of_warm_up + 2]
    assert 1e-5 < curve[-1] < 1e-5 * (1 + 1e-6)  # the end itself would be one update later


def test_fairseq_learning_rate_at_every_update() -> None:
    curve = recipe_curve(load_config("vision_base_d2v1"))
    assert_equal_everywhere(curve, fairseq_cosine(5e-4, updates=375_300, warmup=12_510), 5e-4)
    assert curve[0] == 0.0
    assert curve[12_509] < curve[12_510] == 5e-4
    assert 0 < curve[-1] < 1e-13


@pytest.mark.parametrize(
    ("updates", "ratios"),
    [
        (400_000, (0.03, 0.9, 0.07)),  # fairseq's base_librispeech.yaml
        (1_000_000, (0.05, 0.8, 0.15)),  # text, as the paper has it
    ],
)
def test_tri_stage_at_every_update(updates: int, ratios: tuple[float, float, float]) -> None:
    """Where the phases are whole numbers of updates, what warm-up and hold leave IS fairseq's decay."""
    warmup = int(updates * ratios[0])
    config = Config(
        optimizer=OptimizerConfig(lr=5e-4),
        schedule=ScheduleConfig(kind="tri_stage", warmup_steps=warmup, hold_fraction=ratios[1], final_scale=0.01),
        train=TrainConfig(steps=updates),
    )
    curve = recipe_curve(config)
    assert_equal_everywhere(curve, fairseq_tri_stage(5e-4, updates=updates, ratios=ratios), 5e-4)
    assert curve[0] == pytest.approx(5e-6)
    assert curve[warmup - 1] < curve[warmup] == 5e-4


@pytest.mark.parametrize("updates", [50, 99, 1_234, 77_777])
def test_tri_stage_of_odd_lengths(updates: int) -> None:
    """Where they are not, fairseq cuts each phase and is done up to two updates early; ours falls until the end."""
    ratios = (0.03, 0.9, 0.07)
    warmup, hold, decay = (int(updates * ratio) for ratio in ratios)
    config = Config(
        optimizer=OptimizerConfig(lr=1.0),
        schedule=ScheduleConfig(kind="tri_stage", warmup_steps=warmup, hold_fraction=ratios[1], final_scale=0.01),
        train=TrainConfig(steps=updates),
    )
    curve, theirs = recipe_curve(config), fairseq_tri_stage(1.0, updates=updates, ratios=ratios)
    early = updates - warmup - hold - decay
    assert 0 <= early <= 2
    assert_equal_everywhere(curve[: warmup + hold], theirs[: warmup + hold], 1.0)
    k = np.arange(updates - warmup - hold)
    assert_equal_everywhere(curve[warmup + hold :], np.exp(np.log(0.01) * k / (decay + early)), 1.0)


@pytest.mark.parametrize(
    ("recipe", "start", "end"),
    [
        ("vision_base", 0.9998, 0.9998),
        ("vision_large", 0.9998, 0.9998),
        ("vision_large_phase2", 0.9999, 0.9999),
        ("vision_huge14", 0.9998, 0.9998),
        ("vision_base_d2v1", 0.999, 0.9998),
    ],
)
def test_decay_of_the_teacher_at_every_update(recipe: str, start: float, end: float) -> None:
    """After update t fairseq averages with start + (end - start) t / max_update; the fork's decay does not change,
    because --ema_start_at 0 leaves no update for its ramp."""
    config = load_config(recipe)
    steps = config.train.steps
    curve = np.array([rates_at(config, t)[1] for t in range(steps)])
    t = np.arange(1, steps + 1)
    theirs = end - (end - start) * (1 - t / steps)
    assert_equal_everywhere(curve, theirs, 1.0)
    assert curve[0] == pytest.approx(start + (end - start) / steps, rel=1e-15)
    assert curve[-1] == end


@pytest.mark.parametrize(
    ("kind", "warmup", "said"),
    [
        ("cosine", 50, None),
        ("cosine", 100, "warm-up of 100 of 100 steps: the learning rate never reaches its peak"),
        ("tri_stage", 9, None),
        ("tri_stage", 10, "warm-up of 10 of 100 steps and hold of 90: the learning rate never comes down"),
        ("tri_stage", 120, "never reaches its peak"),
    ],
)
def test_runs_that_are_too_short_for_their_schedule(kind: str, warmup: int, said: str | None) -> None:
    config = Config(schedule=ScheduleConfig(kind=kind, warmup_steps=warmup), train=TrainConfig(steps=100))
    remarks = schedule_remarks(config)
    assert (remarks == []) if said is None else said in remarks[0]

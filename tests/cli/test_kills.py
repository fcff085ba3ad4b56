"""A run that is killed (kill -9) at any moment goes on from its newest checkpoint, and ends as if it never was."""

from __future__ import annotations

from pathlib import Path

import pytest

from megad2v.checkpoint.catalog import steps_present
from megad2v.checkpoint.reader import Checkpoint
from tests.cli.conftest import TINY
from tests.cli.kills import MOMENTS, RANKS, draw, killed_run
from tests.cli.live_run import LiveRun, curve, lines

STEPS, SAVE_EVERY = 40, 3


def flags(shards: Path, output: Path, steps: int, save_every: int) -> list[str]:
    """A run that saves all the time. Wide enough for writing to take a moment: one has to hit it."""
    words = ["--deepspeed", "ds_configs/zero3.json", *TINY, "--model.width", "128", "--data.shards", str(shards)]
    words += ["--train.steps", str(steps), "--train.save_every", str(save_every), "--train.log_every", "1"]
    words += ["--model.dropout", "0.1", "--train.tensorboard", "false", "--data.trace", "true"]
    return [*words, "--train.output_dir", str(output)]


def same_run(run: Path, whole: Path, steps: int) -> None:
    """Curve, what was consumed, and the last checkpoint are equal to the bit."""
    assert len(curve(run)) == steps
    assert curve(run) == curve(whole)
    for rank in range(RANKS):
        name = f"trace/rank{rank}.jsonl"
        assert lines(run / name) == lines(whole / name)
    first, second = (Checkpoint(path / "checkpoints" / f"step_{steps:08d}") for path in (run, whole))
    first.verify()
    assert first.index.state == second.index.state
    for kind in ("student", "teacher", "exp_avg", "exp_avg_sq"):
        assert all(value.equal(second.full(kind, name)) for name, value in first.tensors(kind))


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_killed_five_times(demo_shards: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    with LiveRun(flags(demo_shards / "train", whole, STEPS, SAVE_EVERY), ranks=RANKS, logs=tmp_path) as live:
        assert live.wait(100) == [0] * RANKS, live.log()
    kills = [draw(seed=1, number=number) for number in range(len(MOMENTS))]
    outcomes = list(killed_run(flags(demo_shards / "train", run, STEPS, SAVE_EVERY), kills, tmp_path / "logs"))
    assert [outcome.kill for outcome in outcomes] == kills
    for outcome in outcomes:
        assert outcome.resumed == outcome.committed, outcome
        assert outcome.logged - outcome.resumed <= SAVE_EVERY, outcome
        assert outcome.passed_over == 0, outcome
        assert outcome.seconds_to_end < 10, outcome
        print(outcome.line())
    same_run(run, whole, STEPS)
    assert steps_present(run)[-1] == STEPS

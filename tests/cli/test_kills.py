"""A run that is killed (kill -9) at any moment goes on from its newest checkpoint, and ends as if it never was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from megad2v.checkpoint.catalog import steps_present
from megad2v.checkpoint.reader import Checkpoint
from megad2v.training.setup import _alone_in
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
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_killed_five_times(background: bool, demo_shards: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    with LiveRun(flags(demo_shards / "train", whole, STEPS, SAVE_EVERY), ranks=RANKS, logs=tmp_path) as live:
        assert live.wait(100) == [0] * RANKS, live.log()
    kills = [draw(seed=1, number=number) for number in range(len(MOMENTS))]
    killed = [*flags(demo_shards / "train", run, STEPS, SAVE_EVERY), "--train.async_save", str(background).lower()]
    outcomes = list(killed_run(killed, kills, tmp_path / "logs"))
    assert [outcome.kill for outcome in outcomes] == kills
    for outcome in outcomes:
        assert outcome.resumed == outcome.committed, outcome
        # In the background a checkpoint is committed some steps after its own, at the latest when the next one begins.
        assert outcome.logged - outcome.resumed <= SAVE_EVERY * (1 + background), outcome
        assert outcome.passed_over == 0, outcome
        assert outcome.seconds_to_end < 10, outcome
        print(outcome.line())
    same_run(run, whole, STEPS)
    assert steps_present(run)[-1] == STEPS


HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
if os.fork() == 0:  # a data worker
    print("held", flush=True)
    time.sleep(1.0)  # torch's notice after up to 5 s that they are alone
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.timeout(30)
def test_data_workers_of_a_killed_run_hold_its_lock_a_little_longer(tmp_path: Path) -> None:
    """With a lock that processes inherit, as filelock's were before version 4."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.wait()
    with pytest.raises(Timeout):
        FileLock(tmp_path / ".lock").acquire(timeout=0)
    _alone_in(tmp_path).release()

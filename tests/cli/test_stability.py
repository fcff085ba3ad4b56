"""Runs that go wrong on purpose, through the command line: exit code 3, a saved state, and a line that says why."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from megad2v.checkpoint.catalog import steps_present
from megad2v.checkpoint.reader import Checkpoint
from megad2v.config.tree import config_from_dict
from megad2v.training.schedules import rates_at
from tests.cli.conftest import TINY
from tests.distributed.harness import REPOSITORY, run_command

PYTHON = [sys.executable, "launch/pretrain.py", "--deepspeed", "ds_configs/zero2.json"]
DEEPSPEED = ["deepspeed", "--num_gpus", "2", "launch/pretrain.py", "--deepspeed", "ds_configs/zero3.json"]


def _train(command: list[str], shards: Path, run: Path, *flags: str) -> CompletedProcess[str]:
    words = [*command, *TINY, "--data.shards", str(shards / "train"), "--train.output_dir", str(run)]
    words += ["--train.tensorboard", "false", "--train.keep_last", "0", *flags]
    return run_command(words, timeout=110, cwd=REPOSITORY, ranks=2 if command is DEEPSPEED else 1)


def _said(done: CompletedProcess[str]) -> str:
    """The one line for people of a run that stopped on its numbers."""
    assert done.returncode == 3, done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("pretrain: error: "))
    assert "Traceback" not in done.stderr and "done:" not in done.stdout
    return line


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _steps(run: Path) -> list[dict[str, Any]]:
    """What was logged of steps; metrics.jsonl has lines of checkpoints too."""
    return [line for line in _lines(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.timeout(150)
def test_a_run_that_collapses_stops(demo_shards: Path, tmp_path: Path) -> None:
    """Without an average (decay 0) and at 200 times the usual learning rate, the targets become easy by becoming
    alike. keep_last lets go of all but one checkpoint; stopping deletes none."""
    run = tmp_path / "run"
    flags = ["--teacher.decay_start", "0", "--teacher.decay_end", "0", "--optimizer.lr", "0.1", "--train.steps", "400"]
    # fairseq's numerics, with neither a head nor a norm per layer: the published ones are harder to break.
    flags += ["--model.head_layers", "0", "--targets.layer_norm", "none", "--loss.scale", "rsqrt_width"]
    flags += ["--teacher.scope", "encoder", "--model.layer_scale", "1", "--model.init", "fairseq"]
    flags += [
        "--model.drop_path",
        "0",
        "--verdict.std_after",
        "100",
        "--train.save_every",
        "20",
        "--train.log_every",
        "10",
    ]
    said = _said(_train(PYTHON, demo_shards, run, *flags, "--train.keep_last", "5"))
    found = re.search(r"stopped at step (\d+): collapse: (target|pred)_std (\S+), .*; since step (\d+)\.", said)
    assert found is not None, said
    step, key, value, since = int(found[1]), f"{found[2]}_std", float(found[3]), int(found[4])
    floor = {"target_std": 0.1, "pred_std": 0.01}[key]
    logged = {line["step"]: line[key] for line in _steps(run)}
    assert step > 100 and value < floor and logged[step] == pytest.approx(value, rel=1e-3)
    assert all(logged[s] < floor for s in range(since, step + 1, 10)) and logged[since - 10] >= floor
    assert f"verdict.min_{key}" in said and "teacher.decay_start" in said

    saved = run / "checkpoints" / f"step_{step:08d}"
    Checkpoint(saved).verify()
    assert f"Saved {saved};" in said
    kept = steps_present(run)
    assert len([s for s in kept if s < step]) == 5, "what is older was deleted, or step 110 was saved twice"
    older = [s for s in kept if s < since - 1]
    assert (f"step_{older[-1]:08d} (--train.resume PATH)" if older else "no checkpoint from before") in said


@pytest.mark.timeout(280)
def test_nan_for_ever_stops_and_an_older_checkpoint_goes_on(demo_shards: Path, tmp_path: Path) -> None:
    """A learning rate of 1e30, on two ranks under ZeRO-3: the second update is the end."""
    run = tmp_path / "run"
    flags = ["--train.steps", "40", "--train.save_every", "1", "--train.log_every", "4", "--data.trace", "true"]
    mad = ["--optimizer.lr", "1e30", "--verdict.max_bad_steps", "3"]
    done = _train(DEEPSPEED, demo_shards, run, *flags, *mad)
    said = _said(done)
    assert "stopped at step 5: 3 steps in a row were not taken (verdict.max_bad_steps 3)" in said
    assert "not finite: loss and gradient norm" in said and "since step 3" in said and "optimizer.lr" in said
    assert said.count("step_00000001 (--train.resume PATH)") == 1  # step 2 holds the weights that gave the NaN
    assert [line for line in done.stdout.splitlines() if line.startswith("step 4 was not taken: not finite")]

    Checkpoint(run / "checkpoints" / "step_00000005").verify()
    progress = Checkpoint(run / "checkpoints" / "step_00000005").index.state["progress"]
    assert (progress["step"], progress["updates"], progress["skipped"]) == (5, 2, 3)
    assert len(progress["taken_losses"]["vision"]) == len(progress["taken_norms"]["vision"]) == 2
    consumed = {
        (line["step"], line["micro_batch"]): line["samples"]
        for rank in range(2)
        for line in _lines(run / "trace" / f"rank{rank}.jsonl")
    }
    bad = _lines(run / "bad_steps.jsonl")
    assert sorted((line["step"], line["micro_batch"]) for line in bad) == [(s, m) for s in (3, 4, 5) for m in (0, 1)]
    for line in bad:
        assert line["samples"] == consumed[line["step"], line["micro_batch"]]
        assert line["reason"] == "not finite: loss and gradient norm"
        assert line["loss"] is line["step_loss"] is line["grad_norm"] is None
    (logged,) = _steps(run)
    config = config_from_dict(Checkpoint(run / "checkpoints" / "step_00000005").index.config)
    assert (logged["lr"], logged["ema_decay"]) == rates_at(config, updates=2), (
        "schedules follow the updates, not the steps"
    )
    assert (logged["step"], logged["skipped_steps"], logged["loss"], logged["grad_norm"]) == (4, 2, None, None)

    back = ["--train.resume", str(run / "checkpoints" / "step_00000001"), "--train.steps", "4"]
    done = _train(DEEPSPEED, demo_shards, run, *flags, *back)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "bad_steps.jsonl").read_text() == "", "cut back to the step that is resumed from"
    assert _steps(run)[-1]["skipped_steps"] == 0


@pytest.mark.timeout(120)
def test_check_does_not_pass_a_step_that_was_refused(demo_shards: Path, tmp_path: Path) -> None:
    """Pixels divided by the smallest float32 there is are infinite."""
    done = _train(PYTHON, demo_shards, tmp_path / "run", "--check", "--vision.std", "[1e-45,1e-45,1e-45]")
    assert done.returncode == 3 and "check passed" not in done.stdout, done.stdout + done.stderr
    assert "the last 1 of 1 steps were not taken" in done.stderr and "step 1 was not taken: not finite" in done.stdout
    assert list(tmp_path.iterdir()) == []

"""A run that was interrupted is the same run: weights, moments, teacher, curve, and what it consumed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megad2v.checkpoint.catalog import find_checkpoint, steps_present
from megad2v.checkpoint.reader import Checkpoint
from tests.cli.conftest import TINY
from tests.distributed.harness import REPOSITORY, run_command

STEPS = 8


def _train(shards: Path, output: Path, layout: str, *more: str) -> str:
    command = ["deepspeed", "--num_gpus", "2", "launch/pretrain.py", "--deepspeed", f"ds_configs/{layout}.json", *TINY]
    command += ["--data.shards", str(shards / "train"), "--data.valid", str(shards / "valid"), "--data.trace", "true"]
    command += ["--train.steps", str(STEPS), "--train.save_every", "4", "--train.log_every", "1"]
    # Dropout and drop path on, so that a generator that is not a pure function of the step shows.
    command += ["--model.dropout", "0.1", "--model.drop_path", "0.2", "--train.output_dir", str(output), *more]
    done = run_command(command, timeout=110, cwd=REPOSITORY, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = {"step_seconds", "data_seconds", "tokens_per_second", "mfu"}
    return [{key: value for key, value in line.items() if key not in times} for line in lines if "saved" not in line]


def _tensorboard_losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) as TensorBoard shows it: of steps that were taken twice the second."""
    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    losses = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    return losses


@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", [pytest.param("zero1", marks=pytest.mark.slow), "zero3"])
def test_resumed_after_a_damaged_checkpoint_equals_uninterrupted(
    layout: str, demo_shards: Path, tmp_path: Path
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    _train(demo_shards, whole, layout, "--train.save_every", "2", "--train.keep_last", "0")
    shutil.copytree(whole, again)
    (again / "checkpoints" / "step_00000006" / "index.json").unlink()
    last = again / "checkpoints" / f"step_{STEPS:08d}"
    damaged = last / "rank00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)

    # In the background, at every step: each is of the state before the next update, though that does not wait for it.
    background = ("--train.async_save", "true", "--train.save_every", "1", "--train.keep_last", "0")
    said = _train(demo_shards, again, layout, *background)
    assert f"passed over a checkpoint: {damaged}" in said and "checksum" in said
    assert "step_00000006: not a checkpoint" in said
    assert "(step 4)" in said

    for step in (6, STEPS):
        first, second = (Checkpoint(run / "checkpoints" / f"step_{step:08d}") for run in (whole, again))
        second.verify()
        for kind in ("student", "teacher", "exp_avg", "exp_avg_sq"):
            assert first.names(kind) == second.names(kind) != []
            for name, tensor in first.tensors(kind):
                assert torch.equal(tensor, second.full(kind, name)), f"{kind} {name}"
        assert first.index.state == second.index.state
    assert _without_times(_lines(whole / "metrics.jsonl")) == _without_times(_lines(again / "metrics.jsonl"))
    assert _tensorboard_losses(whole) == _tensorboard_losses(again)
    saves = [line for line in _lines(again / "metrics.jsonl") if "saved" in line and line["step"] > 4]
    assert [line["saved"] for line in saves] == [f"step_{step:08d}" for step in range(5, STEPS + 1)]
    assert all(0 < line["save_stall_seconds"] <= line["save_seconds"] for line in saves)
    for rank in range(2):
        assert _lines(whole / "trace" / f"rank{rank}.jsonl") == _lines(again / "trace" / f"rank{rank}.jsonl")


@pytest.mark.timeout(150)
def test_run_directory_holds_what_scripts_rely_on(demo_shards: Path, tmp_path: Path) -> None:
    """DESIGN section 4."""
    _train(demo_shards, tmp_path / "run", "zero2")
    run = tmp_path / "run"
    assert (run / "config.yaml").exists() and (run / "ds_config.json").exists()
    assert json.loads((run / "ds_config.json").read_text())["train_batch_size"] == 8
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{STEPS:08d}"
    assert list((run / "tensorboard").glob("events*"))
    steps = [line for line in _lines(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    keys = "epoch samples loss lr ema_decay grad_norm target_std pred_std step_seconds data_seconds tokens_per_second"
    for line in steps:
        assert set(keys.split()) | {"mfu", "modality"} <= set(line)
    assert steps[-1]["samples"] == STEPS * 8
    (valid,) = (line for line in _lines(run / "metrics.jsonl") if "valid_loss" in line)
    assert 0 <= valid["valid_retrieval"] <= 1
    consumed = [line for rank in range(2) for line in _lines(run / "trace" / f"rank{rank}.jsonl")]
    assert sorted((line["step"], line["micro_batch"]) for line in consumed) == [
        (step, m) for step in range(1, STEPS + 1) for m in range(2)
    ]
    assert all(len(line["samples"]) == len(line["hashes"]) == 4 for line in consumed)


@pytest.mark.timeout(200)
def test_refused_resume_leaves_the_run_as_it_was(demo_shards: Path, tmp_path: Path) -> None:
    """Another model or another stream of samples is one line, and neither configuration nor logs are touched;
    train.init takes the weights into a new run."""
    run, script = tmp_path / "run", [sys.executable, "launch/pretrain.py", "--deepspeed", "ds_configs/zero2.json"]
    command = [*script, *TINY, "--data.shards", str(demo_shards / "train"), "--train.output_dir", str(run)]
    command += ["--train.steps", "3", "--train.log_every", "1"]
    assert run_command(command, timeout=150, cwd=REPOSITORY, ranks=1).returncode == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "events" not in path.name}

    for change, word in ((["--model.mlp_ratio", "2"], "encoder.blocks.0.mlp"), (["--train.seed", "7"], "train.seed")):
        done = run_command([*command, *change, "--train.steps", "9"], timeout=150, cwd=REPOSITORY, ranks=1)
        errors = [line for line in done.stderr.splitlines() if line.startswith("pretrain: error")]
        assert done.returncode == 2 and len(errors) == 1 and word in errors[0], done.stdout + done.stderr
        assert {path: path.read_bytes() for path in before} == before

    second = [*command, "--train.init", str(run), "--train.output_dir", str(tmp_path / "second")]
    done = run_command([*second, "--model.head_layers", "2"], timeout=150, cwd=REPOSITORY, ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights from" in done.stdout and "unused: head.bias, head.weight" in done.stdout
    assert "missing: head.0.bias, head.0.weight, head.2.bias, head.2.weight" in done.stdout

    # A teacher that never moves shows what it started from.
    frozen = [*command, "--train.init", str(run), "--teacher.decay_start", "1", "--teacher.decay_end", "1"]
    first = Checkpoint(find_checkpoint(run))
    for start in ("teacher", "student"):
        output = ["--train.output_dir", str(tmp_path / start), "--train.init_teacher", start]
        done = run_command([*frozen, *output], timeout=150, cwd=REPOSITORY, ranks=1)
        assert done.returncode == 0, done.stdout + done.stderr
        after = Checkpoint(find_checkpoint(tmp_path / start))
        equal = [torch.equal(after.full("teacher", name), first.full(start, name)) for name in first.names("teacher")]
        assert all(equal) and len(equal) > 10


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_path_is_where_a_command_starts_and_not_where_it_stays(demo_shards: Path, tmp_path: Path) -> None:
    """A job that is requeued repeats its command: what it saved after the first start must not be put aside."""
    run = tmp_path / "run"
    command = [sys.executable, "launch/pretrain.py", "--deepspeed", "ds_configs/zero2.json", *TINY]
    command += ["--data.shards", str(demo_shards / "train"), "--train.output_dir", str(run)]
    command += ["--train.tensorboard", "false", "--train.save_every", "2", "--train.keep_last", "1"]

    def resumed(*flags: str) -> tuple[int, str]:
        done = run_command([*command, *flags], timeout=60, cwd=REPOSITORY, ranks=1)
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.search(r"resumed from \S+ \(step (\d+)\)", done.stdout)
        return int(found[1]) if found else 0, done.stdout

    assert resumed("--train.steps", "4", "--train.keep_last", "0")[0] == 0
    start = ["--train.resume", str(run / "checkpoints" / "step_00000002")]
    first, said = resumed(*start, "--train.steps", "5")
    assert first == 2 and "set aside" in said and "before" not in said
    assert steps_present(run) == [2, 5], "what it started from stays"
    again, said = resumed(*start, "--train.steps", "6", "--train.init", str(run))
    assert again == 5 and said.count("this command has started from") == 1 and "set aside" not in said
    assert "train.init: it has no effect" in said
    assert resumed(*start, "--train.steps", "7", "--optimizer.lr", "1e-4")[0] == 2, "another learning rate: another run"

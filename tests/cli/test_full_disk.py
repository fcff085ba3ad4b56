"""A disk that fills up under a run: one line, nothing lost, and with more room the same command goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megad2v.checkpoint.catalog import newest_valid, steps_present
from tests.cli.conftest import TINY
from tests.distributed.harness import REPOSITORY, run_command

STEPS = 6


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Room for two or three checkpoints of half a megabyte."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("background", ["false", "true"], ids=["foreground", "background"])
def test_full_disk(background: str, demo_shards: Path, disk: Path) -> None:
    run = disk / "run"
    command = [sys.executable, "launch/pretrain.py", "--deepspeed", "ds_configs/zero2.json", *TINY]
    command += ["--data.shards", str(demo_shards / "train"), "--train.output_dir", str(run)]
    command += ["--train.steps", str(STEPS), "--train.save_every", "1", "--train.keep_last", "0"]
    command += ["--train.async_save", background, "--train.tensorboard", "false"]
    done = run_command(command, timeout=110, cwd=REPOSITORY, ranks=1)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "pretrain: error" in line)
    assert "could not be written" in line and "No space left on device" in line
    assert "Traceback" not in done.stderr
    written = steps_present(run)
    assert 0 < len(written) < STEPS
    newest, reasons = newest_valid(run)
    assert newest is not None and newest.name == f"step_{written[-1]:08d}" and reasons == []
    assert not list((run / "checkpoints").glob(".writing_*"))

    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    done = run_command(command, timeout=110, cwd=REPOSITORY, ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"(step {written[-1]})" in done.stdout
    assert steps_present(run) == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("what", ["checkpoints", "logs"])
def test_two_ranks_end_with_one_line(what: str, demo_shards: Path, disk: Path, tmp_path_factory: Any) -> None:
    """All ranks hear of a checkpoint's error, and only rank 0 of one in its logs, which are on a disk of their own
    here: one page large."""
    run = disk / "run"
    if what == "logs":
        run = tmp_path_factory.mktemp("run")
        (run / "metrics.jsonl").symlink_to(disk / "metrics.jsonl")
        subprocess.run(["mount", "-o", "remount,size=4k", str(disk)], check=True)
    command = ["deepspeed", "--num_gpus", "2", "launch/pretrain.py", "--deepspeed", "ds_configs/zero2.json", *TINY]
    command += ["--data.shards", str(demo_shards / "train"), "--train.output_dir", str(run), "--train.log_every", "1"]
    command += ["--train.steps", "12", "--train.save_every", "1", "--train.keep_last", "0"]
    command += ["--train.async_save", "true", "--train.tensorboard", "false"]
    done = run_command(command, timeout=110, cwd=REPOSITORY, ranks=2)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "pretrain: error" in line)
    assert "could not be written" in line and "No space left on device" in line
    assert ("error: logs in" in line) == (what == "logs")
    assert "Traceback" not in done.stdout + done.stderr
    written = steps_present(run)
    assert newest_valid(run) == (run / "checkpoints" / f"step_{written[-1]:08d}", [])

    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    done = run_command(command, timeout=110, cwd=REPOSITORY, ranks=2)
    assert done.returncode == 0 and f"(step {written[-1]})" in done.stdout, done.stdout + done.stderr
    assert steps_present(run) == list(range(1, 13))

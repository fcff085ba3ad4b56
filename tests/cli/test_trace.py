"""What the trainer consumed (data.trace): a run that is killed (kill -9) and goes on with 3, then 2 ranks, has the
trace of one that ran through on one rank, and every sample comes once an epoch."""

from __future__ import annotations

import json
import signal
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from megad2v.checkpoint.catalog import steps_present
from tests.cli.conftest import TINY
from tests.cli.live_run import LiveRun, last_step, lines

M, SAMPLES = 6, 96
PER_EPOCH = SAMPLES // (M * 4)
STEPS = 3 * PER_EPOCH
KILLED_AFTER = (3, 7)
"""Steps, between two checkpoints, so that some are consumed again."""


def _flags(shards: Path, output: Path, layout: str, workers: int) -> list[str]:
    words = ["--deepspeed", f"ds_configs/{layout}.json", *TINY, "--data.shards", str(shards), "--data.trace", "true"]
    words += ["--train.micro_batches_per_step", str(M), "--train.steps", str(STEPS), "--train.save_every", "2"]
    words += ["--train.log_every", "1", "--train.tensorboard", "false", "--data.workers", str(workers)]
    return [*words, "--train.output_dir", str(output)]


def _consumed(run: Path) -> list[dict[str, Any]]:
    """The lines of all ranks, by step and micro-batch."""
    found = [line for path in (run / "trace").glob("rank*.jsonl") for line in lines(path)]
    return sorted(found, key=lambda line: (line["step"], line["micro_batch"]))


def _digest(consumed: list[dict[str, Any]]) -> str:
    return sha256("\n".join(json.dumps(line) for line in consumed).encode()).hexdigest()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "layout,workers",
    [
        ("zero1", (0, 1, 4)),
        pytest.param("zero3", (4, 0, 1), marks=pytest.mark.slow),
        pytest.param("zero2", (1, 4, 0), marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_on_1_3_2_ranks(
    layout: str, workers: tuple[int, ...], demo_shards: Path, tmp_path: Path
) -> None:
    whole, run, shards = tmp_path / "whole", tmp_path / "run", demo_shards / "train"
    with LiveRun(_flags(shards, whole, layout, 0), ranks=1, logs=tmp_path / "whole-log") as live:
        assert live.wait(100) == [0], live.log()
    again = 0
    for ranks, own, stop in zip((1, 3, 2), workers, (*KILLED_AFTER, None), strict=True):
        with LiveRun(_flags(shards, run, layout, own), ranks=ranks, logs=tmp_path / f"log{ranks}") as live:
            if stop is None:
                assert live.wait(150) == [0] * ranks, live.log()
                continue
            live.wait_for_step(stop, 150)
            for rank in range(ranks):
                live.signal(rank, signal.SIGKILL)
            assert live.wait(30) == [-signal.SIGKILL] * ranks
        assert stop <= last_step(run) < STEPS, "too late: it has to be killed on its way"
        again += last_step(run) - max(steps_present(run))

    expected, consumed = _consumed(whole), _consumed(run)
    places = [(line["step"], line["micro_batch"]) for line in consumed]
    assert places == [(step, m) for step in range(1, STEPS + 1) for m in range(M)]
    assert _digest(consumed) == _digest(expected)
    print(f"{_digest(consumed)}, {again} steps were taken twice")
    for epoch in range(3):
        steps = range(epoch * PER_EPOCH + 1, (epoch + 1) * PER_EPOCH + 1)
        met = Counter(sample for line in consumed if line["step"] in steps for sample in line["samples"])
        assert len(met) == SAMPLES and set(met.values()) == {1}

"""Samples that cannot be decoded: named, left out, and nobody else moves; too many of them stop the run."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import TINY
from tests.distributed.harness import REPOSITORY, run_command

STEPS, PER_STEP = 9, 8
"""72 of the demo's 96 images: not every damaged one is met."""

WHOLE = (3, 1)
"""Step and micro-batch that lose every sample, so that the row of zeros stands in."""
ONE = (2, 0)
"""Step and micro-batch that lose one."""

GRACE = WHOLE[0] * PER_STEP
"""Samples, instead of a thousand, before data.max_bad_fraction counts. Step 2 has a bad one too early to count; the
step that ends the run has bad ones itself, and quarantine.jsonl must name them as well."""
WITH_SMALL_GRACE = f"""
import megad2v.training.loop
from megad2v.engine.distributed import leave_now
from megad2v.training.main import main

assert megad2v.training.loop.BAD_SAMPLES_GRACE == 1000
megad2v.training.loop.BAD_SAMPLES_GRACE = {GRACE}
leave_now(main())
"""


@dataclass(frozen=True)
class Damaged:
    """Shards with broken images in them, and a run over the whole ones."""

    shards: Path
    clean: list[dict[str, Any]]
    """The trace of the run over the whole shards."""
    met: set[str]
    """Ids of broken samples that the run meets."""
    unmet: str
    """One more, which it does not get to."""


def _command(shards: Path, output: Path, *flags: str, program: tuple[str, ...] = ("launch/pretrain.py",)) -> list[str]:
    command = [sys.executable, *program, "--deepspeed", "ds_configs/zero1.json", *TINY, "--data.trace", "true"]
    command += ["--data.shards", str(shards), "--train.steps", str(STEPS), "--train.log_every", "1"]
    return [*command, "--train.tensorboard", "false", "--train.output_dir", str(output), *flags]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _break(shards: Path, sample: str, *, header: bool) -> None:
    """Flip bytes of one image where it lies: the tar around it stays sound."""
    name, key = sample.split("/", 1)
    with tarfile.open(shards / name) as tar:
        (member,) = (m for m in tar.getmembers() if m.name.startswith(f"{key}.") and m.name.endswith(".jpg"))
    content = bytearray((shards / name).read_bytes())
    image = slice(member.offset_data, member.offset_data + member.size)
    # Without its header it is no image; with a Huffman table of nonsense it opens, and fails when pixels are wanted.
    start = 0 if header else content[image].index(b"\xff\xc4") + 4
    for place in range(image.start + start, image.start + start + 16):
        content[place] ^= 0xFF
    (shards / name).write_bytes(content)


@pytest.fixture(scope="module")
def damaged(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    root = tmp_path_factory.mktemp("quarantine")
    done = run_command(_command(demo_shards / "train", root / "clean"), timeout=80)
    assert done.returncode == 0, done.stdout + done.stderr
    clean = _lines(root / "clean" / "trace" / "rank0.jsonl")
    assert not (root / "clean" / "quarantine.jsonl").exists()
    seen = {sample for line in clean for sample in line["samples"]}
    assert len(seen) == STEPS * PER_STEP, "less than an epoch: no sample comes twice"

    shards = root / "shards"
    shutil.copytree(demo_shards / "train", shards)
    shutil.rmtree(shards / "index")
    micro_batches = {(line["step"], line["micro_batch"]): line["samples"] for line in clean}
    met = [*micro_batches[WHOLE], micro_batches[ONE][2]]
    unmet = next(sample for sample in _all_samples(shards) if sample not in seen)
    for number, sample in enumerate([*met, unmet]):
        _break(shards, sample, header=number % 2 == 0)
    return Damaged(shards, clean, set(met), unmet)


def _all_samples(shards: Path) -> list[str]:
    found = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [f"{path.name}/{m.name.removesuffix('.jpg')}" for m in tar.getmembers() if m.name.endswith(".jpg")]
    return found


@pytest.mark.timeout(200)
def test_broken_samples_are_left_out_and_nothing_else_moves(damaged: Damaged, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_command(_command(damaged.shards, run), timeout=80)
    assert done.returncode == 0, done.stdout + done.stderr

    dropped = [
        {"step": line["step"], "micro_batch": line["micro_batch"], "sample": sample}
        for line in damaged.clean
        for sample in line["samples"]
        if sample in damaged.met
    ]
    named = _lines(run / "quarantine.jsonl")
    reasons = [line.pop("reason") for line in named]
    assert named == dropped, f"exactly those that were met; {damaged.unmet} was not"
    # Every other one of `met` has no header, the rest no Huffman table: two places where decoding fails.
    assert all(reasons) and len(set(reasons)) == 2, reasons

    expected = [
        {**line, "samples": [s for s, _ in kept], "hashes": [h for _, h in kept]}
        for line in damaged.clean
        for kept in [[(s, h) for s, h in zip(line["samples"], line["hashes"], strict=True) if s not in damaged.met]]
    ]
    assert _lines(run / "trace" / "rank0.jsonl") == expected

    metrics = [line for line in _lines(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    for line in metrics:
        bad = sum(one["step"] <= line["step"] for one in dropped)
        assert (line["bad_samples"], line["samples"]) == (bad, PER_STEP * line["step"] - bad)
        assert line["skipped_steps"] == 0 and math.isfinite(line["loss"])
    assert metrics[-1]["bad_samples"] == 5


@pytest.mark.timeout(200)
def test_too_many_broken_samples_stop_the_run(damaged: Damaged, tmp_path: Path) -> None:
    """Exit code 2 and one line, and not before the grace is over: a bad start is no verdict."""
    run = tmp_path / "run"
    program = ("-c", WITH_SMALL_GRACE)
    done = run_command(
        _command(damaged.shards, run, "--data.max_bad_fraction", "0", program=program), timeout=80, cwd=REPOSITORY
    )
    text = done.stdout + done.stderr
    assert done.returncode == 2, text
    (line,) = (line for line in text.splitlines() if line.startswith("pretrain: error"))
    assert "Traceback" not in text, text
    for words in (f"data.max_bad_fraction: 5 of {GRACE} samples", str(run / "quarantine.jsonl")):
        assert words in line
    assert [line["step"] for line in _lines(run / "metrics.jsonl")] == list(range(1, GRACE // PER_STEP))
    assert {line["sample"] for line in _lines(run / "quarantine.jsonl")} == damaged.met

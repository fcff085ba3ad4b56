"""Checkpoints of several ranks: what one of them meets is what all say; verification is shared out."""

from __future__ import annotations

from pathlib import Path

import pytest

from megad2v.checkpoint.catalog import step_directory
from megad2v.checkpoint.reader import Checkpoint
from tests.checkpoints import small_config, small_state, write_small_checkpoint
from tests.distributed.harness import run_ranks


@pytest.mark.timeout(150)
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_no_room_on_one_rank(background: bool, tmp_path: Path) -> None:
    """All ranks raise the same line, which names the rank; the older checkpoint stays, the next save works."""
    results = run_ranks(
        "tests.distributed.jobs_checkpoint:one_rank_has_no_room",
        2,
        {"background": background},
        timeout=120,
        output=tmp_path,
    )
    first, second = (result["said"] for result in results)
    assert first == second
    assert first[0] == first[4] == ""
    assert "step_00000002 could not be written: rank 1: " in first[2] and "File too large" in first[2]
    assert "older checkpoints are untouched" in first[2]
    assert first[1::2] == ["latest step_00000001", "latest step_00000001", "latest step_00000001 step_00000003"]
    assert [(result["newest"], result["reasons"]) for result in results] == [("step_00000003", [])] * 2
    checkpoint = Checkpoint(step_directory(tmp_path, 1))
    checkpoint.verify()
    assert (checkpoint.full("student", "a") == 1).all()


@pytest.mark.timeout(150)
def test_verification_is_shared_out(tmp_path: Path) -> None:
    """Every file is read by one rank, and all come to the same answer, whoever has found the damage."""
    config = small_config(depth=1)
    state = small_state(config)
    runs = {name: tmp_path / name for name in ("sound", "damaged", "hopeless")}
    for run in runs.values():
        for step in (1, 2):
            write_small_checkpoint(run, config, state, step=step, ranks=5)
    for run, step, rank in (("damaged", 2, 3), ("hopeless", 2, 0), ("hopeless", 2, 1), ("hopeless", 1, 4)):
        path = step_directory(runs[run], step) / f"rank{rank:05d}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    one = {"one": str(step_directory(runs["damaged"], 2))}
    results = run_ranks(
        "tests.distributed.jobs_checkpoint:verify_damaged",
        2,
        {name: str(path) for name, path in runs.items()} | one,
        timeout=120,
        output=tmp_path,
    )
    for name in results[0]:
        assert results[0][name]["newest"] == results[1][name]["newest"]
        assert results[0][name]["reasons"] == results[1][name]["reasons"]
    assert results[0]["sound"]["newest"] == "step_00000002"
    assert results[0]["damaged"]["newest"] == "step_00000001"
    assert "rank00003.safetensors does not match its checksum" in results[0]["damaged"]["reasons"][0]
    (hopeless,) = results[0]["hopeless"]["reasons"]
    assert "no checkpoint here" in hopeless and "(and 1 more)" in hopeless and "rank00004" in hopeless
    assert "rank00003.safetensors does not match its checksum; use an older" in results[0]["one"]["reasons"][0]
    files = [f"rank{rank:05d}.safetensors" for rank in range(5)]
    assert [result["sound"]["read"] for result in results] == [files[0::2] * 2, files[1::2] * 2]

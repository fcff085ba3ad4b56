"""tools/inspect_checkpoint.py: what it says of sound and of damaged checkpoints, and its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megad2v.checkpoint import describe
from megad2v.checkpoint.catalog import step_directory
from megad2v.checkpoint.layout import Index
from tests.checkpoints import small_config, small_state, write_small_checkpoint
from tests.distributed.harness import REPOSITORY
from tools.inspect_checkpoint import main

CONFIG = small_config(depth=1)
STATE = small_state(CONFIG)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 5, 10 and 15; a bit of 15 is flipped, 10 is cut short."""
    for step in (5, 10, 15):
        write_small_checkpoint(tmp_path, CONFIG, STATE, step=step)
    for step, damage in ((15, lambda data: data[:-1] + b"?"), (10, lambda data: data[:-1])):
        path = step_directory(tmp_path, step) / "rank00001.safetensors"
        path.write_bytes(damage(path.read_bytes()))
    (tmp_path / "checkpoints" / "passed_over_step_00000020").mkdir()
    return tmp_path


def facts(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes show what is cut short; a flipped bit only --verify."""
    quick, whole = facts(capsys, run), facts(capsys, run, "--verify")
    assert [row["step"] for row in quick["checkpoints"]] == [15, 10, 5]
    assert [row["damage"] is None for row in quick["checkpoints"]] == [True, False, True]
    assert [row["damage"] is None for row in whole["checkpoints"]] == [False, False, True]
    assert (quick["resume"], whole["resume"]) == (15, 5)
    assert whole["passed_over"] == ["passed_over_step_00000020"]
    assert facts(capsys, run / "checkpoints", "--verify") == whole

    assert main([str(run), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "rank00001.safetensors does not match its checksum" in said
    assert "truncated" in said and "train.resume auto takes step 5" in said
    (step_directory(run, 5) / "index.json").unlink()
    assert facts(capsys, run, "--verify", code=1)["resume"] is None


def test_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = step_directory(run, 5)
    found = facts(capsys, directory, "--verify")
    assert found["step"] == 5 and found["damage"] is None and found["incomplete"] == []
    assert found["layout"] == {"ranks": 3, "stage": 3} and found["files"] == 3
    for kind in ("student", "teacher"):
        assert found["values"][kind] == sum(value.numel() for value in STATE[kind].values())
    assert list(found["parameters"]) == list(STATE["student"])
    for name, row in found["parameters"].items():
        assert row["shape"] == list(STATE["student"][name].shape)
        assert row["kinds"] == [kind for kind in ("student", "teacher") if name in STATE[kind]]
    assert main([str(directory)]) == 0
    said = capsys.readouterr().out
    assert "step 5, whole (not verified)" in said and "encoder.relative_bias.table" in said

    facts(capsys, step_directory(run, 10), code=1)
    facts(capsys, step_directory(run, 15))
    assert "checksum" in facts(capsys, step_directory(run, 15), "--verify", code=1)["damage"]


def test_a_gap_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index that is sound, of files that do not hold everything."""
    directory = step_directory(run, 5)
    index = Index.load(directory / "index.json")
    lost = index.files[0].fragments.pop()
    (directory / "index.json").write_text(index.dumps())
    assert facts(capsys, directory, code=1)["incomplete"] == [f"{kind} {lost[1]}" for kind in lost[0]]


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "step_00000001"):
        assert main([str(path)]) == 2
        assert capsys.readouterr().err.startswith("inspect_checkpoint: ")


def test_a_run_that_deletes_while_it_is_looked_at(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    look = describe.damage

    def damage_and_delete(directory: Path, **how: Any) -> str | None:
        found = look(directory, **how)
        if directory.name == "step_00000010":
            shutil.rmtree(directory)
        return found

    monkeypatch.setattr(describe, "damage", damage_and_delete)
    (run / "checkpoints" / "latest").unlink()
    seen = facts(capsys, run)
    assert [row["step"] for row in seen["checkpoints"]] == [15, 5] and seen["latest"] is None


def test_a_reader_that_has_seen_enough(run: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "tools/inspect_checkpoint.py", str(run)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")

"""metrics.jsonl on a full disk, closing what cannot be closed, and curves of several modalities."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from megad2v.config.schema import TrainConfig
from megad2v.errors import LogError
from megad2v.metrics.logger import MetricsLogger
from megad2v.training.loop import Run


def _logger(run: Path, **settings: Any) -> MetricsLogger:
    return MetricsLogger(run, TrainConfig(tensorboard=False), resumed_at=0, config={}, **settings)


def _onto_a_full_disk(logger: MetricsLogger) -> None:
    logger._file.close()
    logger._file = Path("/dev/full").open("a", buffering=1)  # noqa: SIM115  # the logger closes it


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line_of_this_rank(tmp_path: Path) -> None:
    logger = _logger(tmp_path)
    _onto_a_full_disk(logger)
    with pytest.raises(LogError, match=r"could not be written: .*No space left on device") as raised:
        logger.write(1, {"loss": 1.0})
    assert raised.value.exit_code == 1 and raised.value.on_one_rank
    with pytest.raises(OSError, match="No space left"):  # of what is left in its buffer
        logger.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_closing_replaces_no_outcome_and_lets_go_of_the_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed: list[str] = []

    def fails() -> None:
        closed.append("loader")
        raise RuntimeError("a worker is gone")

    logger, lock = _logger(tmp_path), FileLock(tmp_path / ".lock")
    lock.acquire()
    _onto_a_full_disk(logger)
    with pytest.raises(LogError):
        logger.write(1, {"loss": 1.0})
    run: Any = SimpleNamespace(
        loader=SimpleNamespace(close=fails), records=SimpleNamespace(close=lambda: closed.append("records")),
        logger=logger, lock=lock,
    )  # fmt: skip
    Run.close(run)
    assert closed == ["loader", "records"] and not lock.is_locked
    said = capsys.readouterr().err
    assert "a worker is gone" in said and "MetricsLogger was not closed: " in said


@pytest.mark.parametrize("joint", [False, True])
def test_modalities_of_a_joint_run_have_their_own_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], joint: bool
) -> None:
    """In sinks that tell curves apart by name; metrics.jsonl has the same keys either way."""
    curves: list[tuple[str, float, int]] = []
    logged: list[dict[str, float]] = []
    logger = _logger(tmp_path, joint=joint)
    logger._tensorboard = SimpleNamespace(add_scalar=lambda *scalar: curves.append(scalar))
    logger._wandb = SimpleNamespace(log=lambda scalars, step: logged.append(scalars))
    logger.write(3, {"loss": 0.5, "modality": "vision"})
    logger.write(3, {"loss": 50.0, "modality": "text"})
    logger.write(3, {"saved": "step_00000003", "save_seconds": 2.0})
    logger.progress(3, {"loss": 50.0}, modality="text")
    of = (lambda modality: f"{modality}/") if joint else (lambda modality: "")
    assert curves == [(f"{of('vision')}loss", 0.5, 3), (f"{of('text')}loss", 50.0, 3), ("save_seconds", 2.0, 3)]
    assert [{name: value} for name, value, _ in curves] == logged
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[:2] == [
        {"step": 3, "loss": 0.5, "modality": "vision"},
        {"step": 3, "loss": 50.0, "modality": "text"},
    ]
    assert f"step 3/{logger.total}{'  text' if joint else ''}  loss 50  " in capsys.readouterr().out

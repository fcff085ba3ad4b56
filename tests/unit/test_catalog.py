"""Which checkpoints are kept, found and put aside."""

from __future__ import annotations

from pathlib import Path

from megad2v.checkpoint.catalog import prune, set_aside_later, step_directory, steps_present


def _run(tmp_path: Path, *steps: int) -> Path:
    for step in steps:
        step_directory(tmp_path, step).mkdir(parents=True)
    return tmp_path


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    run = _run(tmp_path, 100, 200, 300, 400)
    prune(run, 2)
    assert steps_present(run) == [300, 400]
    prune(run, 0)
    assert steps_present(run) == [300, 400]


def test_going_back_does_not_cost_the_new_checkpoints(tmp_path: Path) -> None:
    """Resumed at 1000 with 1500 and 2000 there: without putting those aside, pruning would delete each new one."""
    run = _run(tmp_path, 1000, 1500, 2000)
    moved = set_aside_later(run, 1000)
    assert sorted(path.name for path in moved) == ["passed_over_step_00001500", "passed_over_step_00002000"]
    _run(run, 1100)
    prune(run, 1)
    assert steps_present(run) == [1100]
    assert all(path.is_dir() for path in moved)


def test_put_aside_twice(tmp_path: Path) -> None:
    run = _run(tmp_path, 5, 9)
    set_aside_later(run, 5)
    _run(run, 9)
    set_aside_later(run, 5)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["passed_over_step_00000009", "passed_over_step_00000009_1", "step_00000005"]

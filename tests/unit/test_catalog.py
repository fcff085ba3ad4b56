"""Which checkpoints are kept, found and put aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from megad2v.checkpoint.catalog import newest_valid, prune, recover, set_aside_later, step_directory, steps_present
from megad2v.checkpoint.layout import Index
from megad2v.errors import UserError
from megad2v.training.setup import _alone_in


def _run(tmp_path: Path, *steps: int) -> Path:
    """Checkpoints without tensors."""
    for step in steps:
        step_directory(tmp_path, step).mkdir(parents=True)
        index = Index(step=step, shapes={}, files=[], state={}, config={}, layout={}, code={})
        (step_directory(tmp_path, step) / "index.json").write_text(index.dumps())
    return tmp_path


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


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
    assert _names(run) == ["latest", "passed_over_step_00000009", "passed_over_step_00000009_1", "step_00000005"]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000005\n"


def test_every_kth_is_never_deleted(tmp_path: Path) -> None:
    run = _run(tmp_path, 50, 100, 150, 200, 250)
    prune(run, 1, keep_every=100)
    assert steps_present(run) == [100, 200, 250]
    _run(run, 300, 350)
    prune(run, 1, keep_every=100)
    assert steps_present(run) == [100, 200, 300, 350]


def test_where_a_command_starts_from_is_not_deleted(tmp_path: Path) -> None:
    run = _run(tmp_path, 50, 100, 150, 200)
    prune(run, 1, spare=run / "checkpoints" / ".." / "checkpoints" / "step_00000100")
    assert steps_present(run) == [100, 200]
    prune(run, 1, spare=Path("auto"))
    assert steps_present(run) == [200]


def test_a_run_that_was_started_meanwhile(tmp_path: Path) -> None:
    run = _run(tmp_path, 50)
    with pytest.raises(UserError, match=r"another run was started in .* meanwhile; repeat the command"):
        _alone_in(run, still_empty=True)
    _alone_in(run).release()


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    """200 and 300 cannot be gone back to; 100, the only one left behind the newest, must stay."""
    run = _run(tmp_path, 50, 100, 200, 300, 400)
    (step_directory(run, 200) / "index.json").unlink()
    (step_directory(run, 300) / "index.json").write_text("{")
    prune(run, 2)
    assert steps_present(run) == [100, 200, 300, 400]
    assert newest_valid(run)[0] == step_directory(run, 400)
    (step_directory(run, 400) / "index.json").unlink()
    directory, reasons = newest_valid(run)
    assert directory == step_directory(run, 100) and len(reasons) == 3


def test_recover_takes_back_a_step_that_was_being_replaced(tmp_path: Path) -> None:
    """A kill between the two renames of a rewritten step; and leftovers of other kills."""
    run = _run(tmp_path, 100, 200)
    folder = run / "checkpoints"
    step_directory(run, 200).rename(folder / ".replaced_step_00000200")
    (folder / ".writing_step_00000200").mkdir()
    (folder / ".writing_step_00000200" / "rank00000.safetensors").write_bytes(b"half")
    (folder / ".deleting_step_00000050").mkdir()
    said = recover(run)
    assert _names(run) == ["latest", "step_00000100", "step_00000200"]
    assert newest_valid(run) == (step_directory(run, 200), [])
    assert (folder / "latest").read_text() == "step_00000200\n"
    assert len(said) == 2 and "took back" in said[0] and "never committed" in said[1]
    assert recover(run) == []

    (folder / "latest").write_text("step_00000100\n")  # killed between the rename and this
    assert recover(run) == []
    assert (folder / "latest").read_text() == "step_00000200\n"

    (folder / ".replaced_step_00000200").mkdir()  # killed after both renames: the new one is there
    assert recover(run) == []
    assert _names(run) == ["latest", "step_00000100", "step_00000200"]

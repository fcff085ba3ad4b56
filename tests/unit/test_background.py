"""Checkpoints written in the background: the snapshot, the order of things, and no error that stays silent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megad2v.checkpoint import background, writer
from megad2v.checkpoint.background import BackgroundWriter
from megad2v.checkpoint.catalog import recover, step_directory, steps_present
from megad2v.checkpoint.layout import Piece
from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.writer import CheckpointError
from tests.checkpoints import index_fields, small_config

CONFIG = small_config(depth=1)
SIZE = 5000


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits until it is set."""
    opened, write = threading.Event(), writer.write_tensors

    def when_open(*arguments: Any) -> tuple[int, str]:
        assert opened.wait(20)
        return write(*arguments)

    monkeypatch.setattr(writer, "write_tensors", when_open)
    yield opened
    opened.set()


def start(saver: BackgroundWriter, run: Path, step: int, value: torch.Tensor) -> Path:
    directory = step_directory(run, step)
    pieces = [Piece("student", "a", 0, value), Piece("teacher", "a", 0, value[:0])]
    saver.start(directory, pieces, extras={"note": b"x"}, **index_fields(CONFIG, {"a": (SIZE,)}, step))
    return directory


def test_training_goes_on_while_it_is_written(alone: None, tmp_path: Path, gate: threading.Event) -> None:
    """What changes after `before_update` is not what is saved; nothing is committed before it is on disk."""
    saver, value = BackgroundWriter(), torch.arange(float(SIZE))
    for step in (1, 2):  # the second from the memory of the first
        gate.clear()
        before = value.clone()
        directory = start(saver, tmp_path, step, value)
        saver.before_update()
        value.add_(1)
        assert saver.pending and not saver.ready()
        assert not directory.exists()
        gate.set()
        saved = saver.finish()
        assert not saver.pending and not saver.ready()
        assert saved.directory == directory and 0 < saved.stall_seconds <= saved.save_seconds
        checkpoint = Checkpoint(directory)
        checkpoint.verify()
        assert torch.equal(checkpoint.full("student", "a"), before)
        assert checkpoint.extra("note") == b"x"
    assert steps_present(tmp_path) == [1, 2]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002\n"


def test_an_update_waits_for_the_copy(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that takes long must still be of the state before the update."""
    begun, allowed = threading.Event(), threading.Event()
    fill = background.HostCopy.fill_from_host

    def slowly(*arguments: Any) -> None:
        begun.set()
        assert allowed.wait(20)
        fill(*arguments)

    monkeypatch.setattr(background.HostCopy, "fill_from_host", slowly)
    saver, value = BackgroundWriter(), torch.zeros(SIZE)
    directory = start(saver, tmp_path, 1, value)
    assert begun.wait(20)
    threading.Timer(0.2, allowed.set).start()
    saver.before_update()
    value.fill_(7)
    saved = saver.finish()
    assert saved.stall_seconds >= 0.15
    assert not Checkpoint(directory).full("student", "a").any()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError("no memory")], ids=repr)
@pytest.mark.parametrize("where", ["copy", "write"])
def test_its_error_is_raised_and_older_ones_stay(
    where: str, error: Exception, alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the copy as in the writing: `ready` says so, `finish` raises it, and a new save is possible."""
    saver, value = BackgroundWriter(), torch.zeros(SIZE)
    start(saver, tmp_path, 1, value)
    saver.finish()

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(
            *((background.HostCopy, "fill_from_host") if where == "copy" else (writer, "write_tensors")), fail
        )
        start(saver, tmp_path, 2, value)
        saver.before_update()  # must not wait for a copy that will never be there
        wait_for(saver)
        assert saver.ready()
        with pytest.raises(CheckpointError, match=str(error.args[-1])):
            saver.finish()
    assert not saver.pending
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    start(saver, tmp_path, 3, value)
    saver.finish()
    assert steps_present(tmp_path) == [1, 3]


def test_a_bug_in_the_thread_is_not_silent(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a kind that nobody thought of, or an exit: raised where the main thread asks."""
    for error in (KeyError("bug"), SystemExit(3)):
        saver = BackgroundWriter()

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(writer, "write_tensors", fail)
        start(saver, tmp_path, 1, torch.zeros(SIZE))
        wait_for(saver)
        assert saver.ready()
        with pytest.raises(type(error)):
            saver.finish()


def test_a_failure_is_heard_while_others_write(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rank sees it whose own thread is done, when another's has failed and a third still writes."""
    saver = BackgroundWriter()
    start(saver, tmp_path, 1, torch.zeros(SIZE))
    wait_for(saver)
    for failed, done, ready in ((0, 1, False), (1, 2, True), (0, 3, True)):
        with monkeypatch.context() as patch:
            patch.setattr(dist, "get_world_size", lambda: 3)
            patch.setattr(dist, "all_reduce", lambda sums, values=(failed, done), **_: sums.copy_(torch.tensor(values)))
            assert saver.ready() is ready
    saver.finish()


def test_a_process_killed_in_between_leaves_what_was_there(alone: None, tmp_path: Path, gate: threading.Event) -> None:
    saver, value = BackgroundWriter(), torch.zeros(SIZE)
    gate.set()
    start(saver, tmp_path, 1, value)
    saver.finish()
    gate.clear()
    start(saver, tmp_path, 2, value)
    assert steps_present(tmp_path) == [1]
    (said,) = recover(tmp_path)  # as the next run does; this one is as good as dead
    assert ".writing_step_00000002_" in said and "it was never committed" in said
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    gate.set()
    with pytest.raises(CheckpointError):
        saver.finish()


def wait_for(saver: BackgroundWriter) -> None:
    saver._pending.write._thread.join(20)

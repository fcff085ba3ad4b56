"""Disks that are full or may not be written: one clear error, and nothing lost. Real file systems, where we may mount
them; else a limit on the size of files."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

from megad2v.checkpoint.background import BackgroundWriter
from megad2v.checkpoint.catalog import newest_valid, prune, step_directory
from megad2v.checkpoint.layout import Piece
from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.writer import CheckpointError, write_checkpoint
from megad2v.errors import UserError
from megad2v.training.setup import _alone_in
from tests.checkpoints import index_fields, small_config

CONFIG = small_config(depth=1)
SMALL, LARGE = 10_000, 400_000
"""float32 values: 40 kB and 1.6 MB."""
ROOM = 1 << 20


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for ROOM bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of this process end at ROOM bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save(run: Path, step: int, size: int, *, background: bool) -> Path:
    directory, fields = step_directory(run, step), index_fields(CONFIG, {"a": (size,)}, step)
    pieces = [Piece("student", "a", 0, torch.full((size,), float(step)))]
    if background:
        saver = BackgroundWriter()
        saver.start(directory, pieces, **fields)
        saver.before_update()
        saver.finish()
    else:
        write_checkpoint(directory, pieces, **fields)
    return directory


def check_sound(run: Path, step: int) -> None:
    """`step` is the newest, valid, and nothing of later attempts is left."""
    assert newest_valid(run) == (step_directory(run, step), [])
    assert (Checkpoint(step_directory(run, step)).full("student", "a") == step).all()
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"latest", step_directory(run, step).name}
    assert (run / "checkpoints" / "latest").read_text() == f"{step_directory(run, step).name}\n"


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_full_disk(background: bool, alone: None, small_disk: Path) -> None:
    save(small_disk, 1, SMALL, background=background)
    with pytest.raises(CheckpointError, match=r"step_00000002 could not be written: .*No space left on device"):
        save(small_disk, 2, LARGE, background=background)
    check_sound(small_disk, 1)
    save(small_disk, 2, SMALL, background=background)  # what had been written of the other is gone
    prune(small_disk, 1)
    check_sound(small_disk, 2)


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_no_room_for_a_file(background: bool, alone: None, tmp_path: Path, small_files: None) -> None:
    save(tmp_path, 1, SMALL, background=background)
    with pytest.raises(CheckpointError, match=r"step_00000002 could not be written: .*File too large"):
        save(tmp_path, 2, LARGE, background=background)
    check_sound(tmp_path, 1)


def test_full_disk_under_a_rewritten_step(alone: None, small_disk: Path) -> None:
    """A run that went back writes a step anew: the older one stays until the newer is whole."""
    save(small_disk, 1, SMALL, background=False)
    with pytest.raises(CheckpointError):
        save(small_disk, 1, LARGE, background=False)
    check_sound(small_disk, 1)


def test_read_only_directory(alone: None, small_disk: Path) -> None:
    """Not to be locked, not to be saved into; still to be read."""
    save(small_disk, 1, SMALL, background=False)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for background in (False, True):
        with pytest.raises(CheckpointError, match="Read-only file system"):
            save(small_disk, 2, SMALL, background=background)
    with pytest.raises((OSError, UserError), match="Read-only file system"):
        _alone_in(small_disk)
    check_sound(small_disk, 1)


def test_second_run_on_a_directory(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match=r"train\.output_dir: another run is writing"):
        _alone_in(tmp_path)

"""Checkpoints of several ranks without an engine: errors of one rank, and verification that is shared out."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOM = 64 * 1024
"""Bytes that a file may have on the rank that has no more."""
SIZE = 50_000
"""float32 values of each rank."""


@contextlib.contextmanager
def no_room(active: bool) -> Iterator[None]:
    """Files of this process end at ROOM bytes, as on a disk that is full (the error is EFBIG; nobody needs be root)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM if active else soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def one_rank_has_no_room(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """A save that fits, one for which rank 1 has no room, one that fits again; in the foreground or not."""
    from megad2v.checkpoint.background import BackgroundWriter
    from megad2v.checkpoint.catalog import newest_valid_by_all, step_directory
    from megad2v.checkpoint.layout import Piece
    from megad2v.checkpoint.writer import CheckpointError, write_checkpoint
    from tests.checkpoints import index_fields, small_config

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    saver = BackgroundWriter()

    def save(step: int) -> None:
        pieces = [Piece("student", "a", rank * SIZE, torch.full((SIZE,), float(step)))]
        fields = index_fields(small_config(depth=1), {"a": (size * SIZE,)}, step)
        if not arguments["background"]:
            write_checkpoint(step_directory(output, step), pieces, **fields)
            return
        saver.start(step_directory(output, step), pieces, **fields)
        saver.before_update()
        while not saver.ready():
            pass
        saver.finish()

    said = []
    for step in (1, 2, 3):
        try:
            with no_room(step == 2 and rank == 1):
                save(step)
            said.append("")
        except CheckpointError as error:
            said.append(str(error))
        dist.barrier()  # the main rank clears up behind a failure
        names = sorted(path.name for path in (output / "checkpoints").iterdir())
        dist.barrier()
        said.append(" ".join(names))
    newest, reasons = newest_valid_by_all(output)
    return {"said": said, "newest": newest.name, "reasons": reasons}


def verify_damaged(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """What every rank finds out about each run in `arguments`, and how many files this one has read for it."""
    from megad2v.checkpoint import catalog, layout
    from megad2v.errors import UserError

    dist.init_process_group("gloo")
    read: list[str] = []
    checksum_of = layout.checksum_of

    def counted(path: Path, algorithm: str) -> str:
        read.append(path.name)
        return checksum_of(path, algorithm)

    layout.checksum_of = counted
    found = {}
    for name, path in arguments.items():
        read.clear()
        try:
            newest, reasons = catalog.find_checkpoint_by_all(Path(path)), []
            if not (Path(path) / "index.json").exists():
                newest, reasons = catalog.newest_valid_by_all(Path(path))
        except UserError as error:
            newest, reasons = Path(""), [str(error)]
        found[name] = {"newest": newest.name, "reasons": reasons, "read": list(read)}
    return found

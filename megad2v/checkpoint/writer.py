"""Writing: aside, fsynced, committed by one rename. Either the whole checkpoint is there or none of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megad2v.checkpoint.layout import INDEX, ExtraRecord, FileRecord, Index, Piece, check_extra_name, fragments_of
from megad2v.checkpoint.stream import checksum_of_bytes, write_tensors
from megad2v.engine.distributed import broadcast_text, together
from megad2v.files import sync_directory, write_file

WRITING, REPLACED = ".writing_", ".replaced_"
"""What a step directory is called while it is written, and an older one of the same step while it is replaced."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; what was there before is untouched. Raised alike on every rank."""

    exit_code = 1
    on_one_rank = False


def write_checkpoint(
    directory: Path, pieces: Sequence[Piece], *, extras: Mapping[str, bytes] | None = None, **index: Any
) -> None:
    """Write this rank's pieces; the main rank commits `directory` once every rank's file is on disk.

    `extras`, of which the main rank's count: small files by their path in the step directory ("tokenizer/vocab.json"),
    listed and checked as the data is. `index` holds the other fields of `Index`. Collective: one small broadcast, and
    three rounds of one small gather to rank 0 and one broadcast; no tensor is sent. An error on any rank raises
    CheckpointError on all, and leaves nothing half-written behind.
    """
    aside = prepare(directory)
    commit(directory, aside, lambda: write_own_file(aside, pieces), extras or {}, **index)


def prepare(directory: Path, also: Callable[[], None] | None = None) -> Path:
    """An empty folder beside `directory` for what will be committed as that, and what every rank has to do besides
    (`also`). Its name is never used twice: a rank that outlives its run cannot write into the next one's. Collective:
    one broadcast and one round; an error leaves no folder."""
    aside = _aside(directory, broadcast_text(secrets.token_hex(4)))

    def make() -> None:
        if also is not None:
            also()
        if dist.get_rank() == 0:
            _make(aside)

    try:
        _on_all(directory, make)
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return aside


def write_own_file(aside: Path, pieces: Sequence[Piece]) -> FileRecord:
    """This rank's file in that folder, fsynced. Talks to nobody; raises OSError and ValueError, and leaves no part of a
    file."""
    return _write_file(aside, pieces, dist.get_rank())


def _write_file(aside: Path, pieces: Sequence[Piece], rank: int) -> FileRecord:
    path = aside / f"rank{rank:05d}.safetensors"
    path.touch(exist_ok=False)
    try:
        size, checksum = write_tensors(path, pieces)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()  # on a full disk others need the room at once, not when all ranks have met
        raise
    return FileRecord(path.name, size, checksum, fragments_of(pieces))


def commit(
    directory: Path, aside: Path, own_file: Callable[[], FileRecord], extras: Mapping[str, bytes], **index: Any
) -> None:
    """Gather what every rank's `own_file` returns, then let the main rank make `directory` of `aside`. Collective: two
    rounds, in which errors of any rank become CheckpointError on all."""
    main = dist.get_rank() == 0
    try:
        records = _on_all(directory, own_file)
        _on_all(directory, lambda: _rename(directory, aside, extras, files=records, **index) if main else None)
    except CheckpointError:
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def write_alone(
    directory: Path, pieces: Sequence[Piece], *, extras: Mapping[str, bytes] | None = None, **index: Any
) -> None:
    """The same by one process that has joined no group: what imports weights writes. Raises CheckpointError, and leaves
    nothing half-written behind."""
    aside = _aside(directory, secrets.token_hex(4))
    try:
        _make(aside)
        _rename(directory, aside, extras or {}, files=[_write_file(aside, pieces, rank=0)], **index)
    except (OSError, RuntimeError, ValueError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{directory}: not written ({error})") from error


def _make(aside: Path) -> None:
    first = not aside.parent.exists()
    aside.mkdir(parents=True)
    for folder in aside.absolute().parents[1:3] if first else ():  # the run directory, and what it lies in
        with contextlib.suppress(OSError):  # not ours to read
            sync_directory(folder)


def _aside(directory: Path, nonce: str) -> Path:
    return directory.with_name(f"{WRITING}{directory.name}_{nonce}")


def _on_all(directory: Path, action: Callable[[], Any]) -> list[Any]:
    """A full disk on one rank must not leave the others waiting."""
    try:
        return together(action, errors=(OSError, RuntimeError, ValueError, MemoryError), raises=CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{directory} could not be written: {error}; older checkpoints are untouched") from None


def _rename(directory: Path, aside: Path, extras: Mapping[str, bytes], **index: Any) -> None:
    """Extras, the index last, then one rename. A checkpoint of the same step (a run started over) is replaced; where a
    kill falls between the two renames, `catalog.recover` takes the older one back. What fails after the rename is only
    said: the checkpoint is there."""
    records = [_write_extra(aside, name, content) for name, content in extras.items()]
    write_file(aside / INDEX, Index(extras=records, **index).dumps())
    sync_directory(aside)
    replaced = directory.with_name(f"{REPLACED}{directory.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    try:
        aside.rename(directory)
    except OSError:
        if replaced.exists():
            replaced.rename(directory)
        raise
    try:
        sync_directory(directory.parent)
        write_file(directory.parent / "latest", directory.name + "\n")
        sync_directory(directory.parent)
    except OSError as error:
        print(f"{directory} is saved, but its folder could not be brought up to date: {error}", flush=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_extra(aside: Path, name: str, content: bytes) -> ExtraRecord:
    check_extra_name(name)
    path = aside / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    for folder in path.relative_to(aside).parents:
        sync_directory(aside / folder)
    return ExtraRecord(name, len(content), checksum_of_bytes(content))

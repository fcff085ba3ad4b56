"""Writing: aside, fsynced, committed by one rename. Either the whole checkpoint is there or none of it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from megad2v.checkpoint.layout import INDEX, ExtraRecord, FileRecord, Index, Piece, check_extra_name, file_digest
from megad2v.engine.distributed import together
from megad2v.files import sync_directory, write_file


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; what was there before is untouched."""


def write_checkpoint(
    directory: Path, pieces: Sequence[Piece], *, extras: Mapping[str, bytes] | None = None, **index: Any
) -> None:
    """Write this rank's pieces; the main rank commits `directory` once every rank's file is on disk.

    `extras`, of which the main rank's count: small files by their path in the step directory ("tokenizer/vocab.json"),
    listed and checked as the data is. `index` holds the other fields of `Index`. Collective: three rounds of one small
    gather to rank 0 and one broadcast. An error on any rank raises CheckpointError on all, and leaves nothing
    half-written behind.
    """
    aside = directory.with_name(f".writing_{directory.name}")
    main = dist.get_rank() == 0
    try:
        _on_all(lambda: _fresh(aside) if main else None)
        records = _on_all(lambda: _write_file(aside, pieces, dist.get_rank()))
        _on_all(lambda: _commit(aside, directory, extras or {}, files=records, **index) if main else None)
    except CheckpointError:
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def write_alone(
    directory: Path, pieces: Sequence[Piece], *, extras: Mapping[str, bytes] | None = None, **index: Any
) -> None:
    """The same by one process that has joined no group: what imports weights writes. Raises CheckpointError, and leaves
    nothing half-written behind."""
    aside = directory.with_name(f".writing_{directory.name}")
    try:
        _fresh(aside)
        _commit(aside, directory, extras or {}, files=[_write_file(aside, pieces, rank=0)], **index)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{directory}: not written ({error})") from error


def _on_all(action: Callable[[], Any]) -> list[Any]:
    """A full disk on one rank must not leave the others waiting."""
    return together(action, errors=(OSError, RuntimeError, ValueError, SafetensorError), raises=CheckpointError)


def _fresh(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _write_file(aside: Path, pieces: Sequence[Piece], rank: int) -> FileRecord:
    path = aside / f"rank{rank:05d}.safetensors"
    path.touch()
    mode = path.stat().st_mode
    # Copies, since fragments are views of shared buffers, which the format refuses.
    save_file({piece.key: piece.values.detach().to("cpu", copy=True).contiguous() for piece in pieces}, path)
    path.chmod(mode)  # safetensors replaces it by a file that only its owner may read, whatever the umask says
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    fragments = [(piece.kind, piece.name, piece.start, piece.values.numel()) for piece in pieces]
    return FileRecord(path.name, path.stat().st_size, file_digest(path), fragments)


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
    return ExtraRecord(name, len(content), hashlib.sha256(content).hexdigest())


def _commit(aside: Path, directory: Path, extras: Mapping[str, bytes], **index: Any) -> None:
    """The index last, then one rename. A checkpoint of the same step (a run started over) is replaced."""
    records = [_write_extra(aside, name, content) for name, content in extras.items()]
    write_file(aside / INDEX, Index(extras=records, **index).dumps())
    sync_directory(aside)
    if directory.exists():
        replaced = directory.with_name(f".replaced_{directory.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        directory.rename(replaced)
        aside.rename(directory)
        shutil.rmtree(replaced)
    else:
        aside.rename(directory)
    write_file(directory.parent / "latest", directory.name + "\n")
    sync_directory(directory.parent)

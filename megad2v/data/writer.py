"""A folder of shards, written so that a killed run never leaves anything that looks whole.

Everything is made in OUT/.making and moved when complete; readers refuse a folder where .making exists, and the next
run clears it away.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from webdataset import TarWriter

from megad2v.data.format import (
    DATASET_FILE,
    INDEX_FOLDER,
    TOKENIZER_FOLDER,
    WORKING_FOLDER,
    DatasetInfo,
    ShardInfo,
    read_dataset,
    write_dataset,
)
from megad2v.data.index import build, index_path, store
from megad2v.errors import UserError

BLOCK = 512
TAR_RECORD = 10_240
"""Tars end with two zero blocks and are padded to this."""
REPORT_FILE = "report.jsonl"
LOCK_FILE = "lock"
FILE_MODE = 0o644


class DatasetWriter:
    """Writes samples into OUT/<prefix>-%06d.tar, their index, report.jsonl and dataset.json. Use it in `with`.

    No shard exceeds `max_bytes` unless one sample does. Equal samples give equal bytes: tars hold no time and no user.
    Leaving the block by an exception, or without `finish`, leaves OUT as it was.
    Raises UserError when OUT cannot be written or holds something that would be lost.
    """

    def __init__(self, out: Path, prefix: str, modality: str, max_bytes: int, *, overwrite: bool = False) -> None:
        self._out, self._prefix, self._modality, self._max_bytes = out, prefix, modality, max_bytes
        self._making = out / WORKING_FOLDER
        self._shards: list[ShardInfo] = []
        self._attached: list[str] = []
        self._tar: TarWriter | None = None
        self._file: IO[bytes] | None = None
        self._bytes = self._samples = 0
        _check_output(out, overwrite)
        try:
            self._lock = _claim(self._making)
            self._report = (self._making / REPORT_FILE).open("w", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(out, error) from error

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._report.close()
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self._making, ignore_errors=True)
        self._lock.close()
        if isinstance(error, OSError):
            raise _cannot_write(self._out, error) from error

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Append a sample: extension -> bytes."""
        needed = sum(BLOCK + -(-len(part) // BLOCK) * BLOCK for part in parts.values())
        if self._tar is not None and _tar_size(self._bytes + needed) > self._max_bytes:
            self._close_shard()
        if self._tar is None:
            self._file = (self._making / self._name(len(self._shards))).open("wb")
            self._tar = TarWriter(self._file, user="", group="", mode=FILE_MODE, encoder=False, mtime=0)
            self._bytes = self._samples = 0
        self._tar.write({"__key__": key, **parts})
        self._bytes += needed
        self._samples += 1

    def report(self, **fields: Any) -> None:
        """Add a line to report.jsonl."""
        self._report.write(json.dumps(fields, ensure_ascii=True) + "\n")

    def attach(self, path: str, content: bytes) -> None:
        """Put a small file beside the shards."""
        (self._making / path).parent.mkdir(parents=True, exist_ok=True)
        (self._making / path).write_bytes(content)
        self._attached.append(path)

    def finish(self, **about: Any) -> DatasetInfo:
        """Complete the last shard and move everything into place; `about` goes into DatasetInfo."""
        self._close_shard()
        self._report.close()
        info = DatasetInfo(
            modalities=(self._modality,),
            samples=sum(shard.samples for shard in self._shards),
            shards=tuple(self._shards),
            **about,
        )
        _remove_old(self._out, self._prefix)
        (self._out / INDEX_FOLDER).mkdir(exist_ok=True)
        for path in (self._making / INDEX_FOLDER).iterdir():
            os.replace(path, self._out / INDEX_FOLDER / path.name)
        for name in [shard.name for shard in self._shards] + [REPORT_FILE, *self._attached]:
            (self._out / name).parent.mkdir(exist_ok=True)
            os.replace(self._making / name, self._out / name)
        write_dataset(self._out, info)
        return info

    def _name(self, number: int) -> str:
        return f"{self._prefix}-{number:06d}.tar"

    def _close_shard(self) -> None:
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = Path(self._file.name)
        self._tar = self._file = None
        store(build(path, self._modality), index_path(path, self._modality))
        self._shards.append(ShardInfo(path.name, self._samples, path.stat().st_size, _checksum(path)))


def _tar_size(content: int) -> int:
    return -(-(content + 2 * BLOCK) // TAR_RECORD) * TAR_RECORD


def _checksum(path: Path) -> str:
    total = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def _check_output(out: Path, overwrite: bool) -> None:
    """Refuse to mix with, or to delete, anything that was not written by this class."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --output takes a folder")
    names = {path.name for path in out.iterdir()} - {WORKING_FOLDER} if out.exists() else set()
    if names and not overwrite:
        raise UserError(f"{out}: is not empty; give another --output, or --overwrite to replace the shards there")
    if names and not (DATASET_FILE in names or (out / WORKING_FOLDER).exists()):
        raise UserError(f"{out}: has no {DATASET_FILE}, so it was not made by make_shards; give another --output")


def _claim(making: Path) -> IO[str]:
    """Take the working folder for this process and empty it. Raises UserError while another process holds it."""
    making.mkdir(parents=True, exist_ok=True)
    lock = (making / LOCK_FILE).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UserError(f"{making.parent}: another make_shards is writing there; wait for it, or stop it") from error
    for path in making.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()
    return lock


def _remove_old(out: Path, prefix: str) -> None:
    old = read_dataset(out)
    names = {shard.name for shard in old.shards} if old is not None else set()
    (out / DATASET_FILE).unlink(missing_ok=True)
    if old is not None and old.tokenizer:
        shutil.rmtree(out / TOKENIZER_FOLDER, ignore_errors=True)
    for path in [*out.glob(f"{prefix}-*.tar"), *(out / name for name in names)]:
        path.unlink(missing_ok=True)
        for index in (out / INDEX_FOLDER).glob(f"{path.stem}.*.npy"):
            index.unlink()


def _cannot_write(out: Path, error: OSError) -> UserError:
    return UserError(f"{out}: cannot be written ({error.strerror or error}); free space or give another --output")

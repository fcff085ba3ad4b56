"""A folder of shards, written so that a killed run never leaves anything that looks whole, and can go on.

Everything is made in OUT/.making and moved when complete; readers refuse a folder where .making exists. In there:

    lock            held by the process that writes
    <plan>/         the work of one plan: input listing and options, hashed
        plan.json           what the plan is
        NAME.tar, index/    finished shards, each with NAME.json once it is whole
        beside/             report.jsonl, tokenizer/: what goes beside the shards
        dataset.json        there as soon as all is ready to be moved to OUT

Who starts with the same plan finds its work again. A process of an earlier run that has not noticed its end yet (a rank
on another machine) can do no harm: what it writes for the same plan is the same, and comes by renaming.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
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
PLAN_FILE = "plan.json"
COUNTS_FILE = "counts.json"
BESIDE = "beside"
MADE_FOLDER = ".made"
"""What .making is renamed to when nothing in it is needed any more: to readers that is its end, in one step."""
PATIENCE_S = 2.0
"""How long the lock may still be held by what a killed run left behind: its processes end with it, but not at once."""
FILE_MODE = 0o644


class Stale(UserError):
    """What an unfinished run left does not fit this one. It is left alone: whoever meant the other run can go on."""


def sample_bytes(sizes: Iterable[int]) -> int:
    """What a sample takes in a tar, from the sizes of its files."""
    return sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes)


class Cuts:
    """Where shards end: none exceeds `max_bytes` unless one sample does. Depends on the samples before alone."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0

    def before(self, needed: int) -> bool:
        """Whether the next sample, of `needed` bytes, begins another shard than that of the sample before it."""
        new = self._bytes > 0 and _tar_size(self._bytes + needed) > self._max_bytes
        self._bytes = needed if new else self._bytes + needed
        return new


def shard_name(prefix: str, number: int) -> str:
    """NAME-000000.tar."""
    return f"{prefix}-{number:06d}.tar"


def write_shard(path: Path, modality: str, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardInfo:
    """A tar of (key, extension -> bytes) and its index, whole or not at all. Equal samples give equal bytes: tars hold
    no time and no user. Raises OSError."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    count = 0
    with aside.open("wb") as file:
        tar = TarWriter(file, user="", group="", mode=FILE_MODE, encoder=False, mtime=0)
        try:
            for key, parts in samples:
                tar.write({"__key__": key, **parts})
                count += 1
        except BaseException:
            with suppress(OSError):  # or it would try again when it is collected, and print what it meets
                tar.close()
            raise
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    store(build(path, modality), index_path(path, modality))
    return ShardInfo(path.name, count, path.stat().st_size, _checksum(path))


def write_record(tar: Path, digest: str, info: ShardInfo) -> None:
    """Say beside a finished shard in .making that it is whole, and of which samples. Raises OSError."""
    _write_whole(tar.with_suffix(".json"), json.dumps({"digest": digest, "info": asdict(info)}))


def read_record(tar: Path, modality: str, digest: str) -> ShardInfo | None:
    """What `write_record` said, if the tar is there, as large as it was, and of the same samples."""
    try:
        record = json.loads(tar.with_suffix(".json").read_text())
        fits = record["digest"] == digest and tar.stat().st_size == record["info"]["bytes"]
        return ShardInfo(**record["info"]) if fits and index_path(tar, modality).exists() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class DatasetWriter:
    """The folder OUT with <prefix>-%06d.tar, their index, report.jsonl and dataset.json. Use it in `with`.

    `plan` says what is written: JSON with "input", a hash, and "settings". Work that a killed run did for the same plan
    is in `work`, and `done` is true where only moving it was left. Without a plan there is nothing to go on with.
    Leaving the block by UserError or OSError, or without `finish`, leaves OUT as it was; by anything else, with a plan,
    leaves the work for the next run. Raises UserError when OUT cannot be written or holds something that would be
    lost, and Stale when it holds unfinished work of another plan; `overwrite` drops that.
    """

    def __init__(
        self,
        out: Path,
        prefix: str,
        modality: str,
        max_bytes: int,
        *,
        overwrite: bool = False,
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        self._out, self._prefix, self._modality = out, prefix, modality
        self._cuts = Cuts(max_bytes)
        self._waiting: list[tuple[str, Mapping[str, bytes]]] = []
        self._shards: list[ShardInfo] = []
        self._goes_on = plan is not None
        text = json.dumps(plan or {"input": uuid.uuid4().hex, "settings": {}}, sort_keys=True)
        self._making = out / WORKING_FOLDER
        self.work = self._making / sha256(text.encode()).hexdigest()[:16]
        _check_output(out, overwrite or (self.work / DATASET_FILE).exists())
        try:
            self._lock = _claim(self._making)
            try:
                shutil.rmtree(out / MADE_FOLDER, ignore_errors=True)
                _clear(self._making, self.work, json.loads(text), overwrite)
                if not (self.work / PLAN_FILE).exists():
                    self.restart()
                for path in self.work.rglob(".*"):  # files that a killed run was writing
                    path.unlink()
                _write_whole(self.work / PLAN_FILE, text)
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            raise _cannot_write(out, error) from error
        self._report: IO[str] | None = None

    @property
    def done(self) -> bool:
        """Whether everything is made, and perhaps partly moved."""
        return (self.work / DATASET_FILE).exists()

    def restart(self) -> None:
        """Drop the work of the plan, if there is any."""
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / BESIDE).mkdir(parents=True)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._report is not None:
            self._report.close()
        wrong = error is None or isinstance(error, (UserError, OSError))
        if not isinstance(error, Stale) and (wrong or not self._goes_on):
            shutil.rmtree(self._making, ignore_errors=True)
        self._lock.close()
        if isinstance(error, OSError):
            raise _cannot_write(self._out, error) from error

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Append a sample, extension -> bytes, to what is written in this process, a shard at a time in memory."""
        if self._cuts.before(sample_bytes(map(len, parts.values()))):
            self._close_shard()
        self._waiting.append((key, parts))

    def report(self, **fields: Any) -> None:
        """Add a line to report.jsonl, which begins anew in each run."""
        if self._report is None:
            self._report = (self.work / BESIDE / REPORT_FILE).open("w", encoding="utf-8")
        self._report.write(json.dumps(fields, ensure_ascii=True) + "\n")

    def attach(self, path: str, content: bytes) -> None:
        """Put a small file beside the shards."""
        (self.work / BESIDE / path).parent.mkdir(parents=True, exist_ok=True)
        (self.work / BESIDE / path).write_bytes(content)

    def finish(
        self, shards: Iterable[ShardInfo] | None = None, counts: Mapping[str, int] | None = None, **about: Any
    ) -> DatasetInfo:
        """Move everything into place: `shards` that lie in `work`, or what `write` wrote. `about` goes into
        DatasetInfo; `counts` are there again after `settle`."""
        if shards is None:
            self._close_shard()
            shards = self._shards
        shards = tuple(shards)
        if self._report is None:
            (self.work / BESIDE / REPORT_FILE).write_text("")
        else:
            self._report.close()
        info = DatasetInfo(
            modalities=(self._modality,), samples=sum(shard.samples for shard in shards), shards=shards, **about
        )
        _write_whole(self.work / COUNTS_FILE, json.dumps(dict(counts or {})))
        _remove_old(self._out, self._prefix)
        write_dataset(self.work, info)
        return self.settle()[0]

    def settle(self) -> tuple[DatasetInfo, dict[str, int]]:
        """The moves of `finish`, as often as it takes: what is there already stays. Returns (info, counts)."""
        info = read_dataset(self.work)
        assert info is not None
        counts = json.loads((self.work / COUNTS_FILE).read_text())
        _move_all(self.work / INDEX_FOLDER, self._out / INDEX_FOLDER)
        for name in (shard.name for shard in info.shards):
            if (self.work / name).exists():
                os.replace(self.work / name, self._out / name)
        _move_all(self.work / BESIDE, self._out)
        write_dataset(self._out, info)
        os.replace(self._making, self._out / MADE_FOLDER)
        shutil.rmtree(self._out / MADE_FOLDER, ignore_errors=True)
        return info, counts

    def _close_shard(self) -> None:
        if self._waiting:
            path = self.work / shard_name(self._prefix, len(self._shards))
            self._shards.append(write_shard(path, self._modality, self._waiting))
            self._waiting.clear()


def _tar_size(content: int) -> int:
    return -(-(content + 2 * BLOCK) // TAR_RECORD) * TAR_RECORD


def _checksum(path: Path) -> str:
    total = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _move_all(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")) if source.exists() else ():
        goal = target / path.relative_to(source)
        if path.is_file():
            goal.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, goal)


def _check_output(out: Path, allowed: bool) -> None:
    """Refuse to mix with, or to delete, anything that was not written by this class."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --output takes a folder")
    names = {path.name for path in out.iterdir()} - {WORKING_FOLDER, MADE_FOLDER} if out.exists() else set()
    if names and not allowed:
        raise UserError(f"{out}: is not empty; give another --output, or --overwrite to replace the shards there")
    if names and not (DATASET_FILE in names or (out / WORKING_FOLDER).exists()):
        raise UserError(f"{out}: has no {DATASET_FILE}, so it was not made by make_shards; give another --output")


def _claim(making: Path) -> IO[str]:
    """Take the working folder for this process. Raises UserError while another process holds it."""
    until = time.monotonic() + PATIENCE_S
    while True:
        making.mkdir(parents=True, exist_ok=True)
        lock = (making / LOCK_FILE).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have finished and removed the folder in between.
            if (making / LOCK_FILE).exists() and (making / LOCK_FILE).samefile(f"/proc/self/fd/{lock.fileno()}"):
                return lock
        except BlockingIOError as error:
            if time.monotonic() > until:
                lock.close()
                raise UserError(
                    f"{making.parent}: another make_shards is writing there; wait for it, or stop it"
                ) from error
        lock.close()
        time.sleep(0.05)


def _clear(making: Path, work: Path, plan: Mapping[str, Any], overwrite: bool) -> None:
    """Remove all but `work`. Raises Stale when that would lose the work of another plan, unless `overwrite`."""
    others = [path for path in making.iterdir() if path not in (work, making / LOCK_FILE)]
    for path in others:
        if (path / PLAN_FILE).exists() and not overwrite:
            raise Stale(
                f"{making.parent}: holds an unfinished run {_difference(path, plan)}; start it as it was to go on with "
                "it, give another --output, or --overwrite to begin anew"
            )
    for path in others:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _difference(work: Path, plan: Mapping[str, Any]) -> str:
    """What another plan has that `plan` has not, in words."""
    other = json.loads((work / PLAN_FILE).read_text(encoding="utf-8"))
    before, now = other["settings"], plan["settings"]
    if before == now:
        return "of another input"
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "with other options (" + ", ".join(f"{key} {before.get(key)}, now {now.get(key)}" for key in keys) + ")"


def _remove_old(out: Path, prefix: str) -> None:
    old = read_dataset(out)
    names = {shard.name for shard in old.shards} if old is not None else set()
    if old is not None and old.tokenizer:
        shutil.rmtree(out / TOKENIZER_FOLDER, ignore_errors=True)
    for path in [*out.glob(f"{prefix}-*.tar"), *(out / name for name in names)]:
        path.unlink(missing_ok=True)
        for index in (out / INDEX_FOLDER).glob(f"{path.name.removesuffix('.tar')}.*.npy"):
            index.unlink()
    # Last: should this be interrupted, it still says what there is to remove.
    (out / DATASET_FILE).unlink(missing_ok=True)


def _cannot_write(out: Path, error: OSError) -> UserError:
    return UserError(f"{out}: cannot be written ({error.strerror or error}); free space or give another --output")

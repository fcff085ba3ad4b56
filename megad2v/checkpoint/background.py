"""Writing while training goes on: a snapshot in host memory, one thread that writes it, and a commit by all ranks.

    save      main thread: the folder is made; the thread starts
      |       thread: copies this rank's pieces to host memory while the next forward and backward run
    update    main thread: waits for that copy (`before_update`): an update is all that changes what is saved
      |       thread: writes the copy, with its checksum, and fsyncs it
    step      main thread: all ranks ask each other, between steps, whether their threads are done (`ready`); once all
              are, or one has failed, the same two rounds as in the foreground commit it, or raise on all (`finish`)

The thread talks to nobody: it uses no process group, so none is ever shared by two threads, and a rank whose file
cannot be written fails alone, silently, until the main threads meet. Its error is then raised on all of them. A process
that is killed in between leaves an uncommitted folder and every older checkpoint, as it would in the foreground.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megad2v.checkpoint.layout import FileRecord, Piece
from megad2v.checkpoint.writer import commit, prepare, write_own_file


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed."""

    directory: Path
    save_seconds: float
    """From the call to the commit."""
    stall_seconds: float
    """Of these, seconds in which this rank's training stood still."""


class HostCopy:
    """Host memory for one rank's pieces, kept from save to save: new memory costs more than filling it.

    It is as large as this rank's share of the checkpoint. Pinned where there is a GPU, so that copies from it run
    beside the training.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._stream: Any = None

    def reserve(self, pieces: Sequence[Piece]) -> None:
        """Have enough for `pieces`. Raises RuntimeError where the host has not."""
        total = sum(piece.values.numel() for piece in pieces)
        if self._memory is None or len(self._memory) < total:
            pinned = any(piece.values.is_cuda for piece in pieces)
            self._memory = None  # the old one goes before the new one comes
            self._memory = torch.empty(total, dtype=torch.float32, pin_memory=pinned)

    def views(self, pieces: Sequence[Piece]) -> list[Piece]:
        """`pieces` with memory of the copy's own as values: nothing is copied yet."""
        sizes = [piece.values.numel() for piece in pieces]
        parts = self._memory[: sum(sizes)].split(sizes)
        return [replace(piece, values=part) for piece, part in zip(pieces, parts, strict=True)]

    def fill_from_device(self, pieces: Sequence[Piece], copies: Sequence[Piece]) -> Any:
        """Queue copies of what lies on a GPU, on a stream of their own behind all work so far; the event at their end,
        None where nothing lies there. The main thread's part: it takes no longer than queueing does."""
        pairs = [
            (piece.values, copy.values) for piece, copy in zip(pieces, copies, strict=True) if piece.values.is_cuda
        ]
        if not pairs:
            return None
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for values, copy in pairs:
                copy.copy_(values.detach().reshape(-1), non_blocking=True)
        return self._stream.record_event()

    def fill_from_host(self, pieces: Sequence[Piece], copies: Sequence[Piece]) -> None:
        """Copy what lies in host memory already (a run on CPUs, offloaded states). The thread's part."""
        for piece, copy in zip(pieces, copies, strict=True):
            if piece.values.numel() and not piece.values.is_cuda:
                # Not torch's copy, which would start threads of its own beside those that train; numpy's lets go of
                # Python's lock meanwhile.
                np.copyto(copy.values.numpy(), piece.values.detach().reshape(-1).numpy())


class _Write:
    """One rank's file, in a thread. Whatever ends the thread is kept for `result`."""

    def __init__(self, directory: Path, pieces: Sequence[Piece], memory: HostCopy) -> None:
        copies = memory.views(pieces)
        self.queued = memory.fill_from_device(pieces, copies)
        self.staged = threading.Event()
        self._directory, self._pieces, self._copies, self._memory = directory, pieces, copies, memory
        self._record: FileRecord | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            try:
                self._memory.fill_from_host(self._pieces, self._copies)
            finally:
                self.staged.set()  # the update must not wait for a thread that is gone
            if self.queued is not None:
                self.queued.synchronize()
            self._record = write_own_file(self._directory, self._copies)
        except BaseException as error:  # raised again where the main thread asks
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def result(self) -> FileRecord:
        """Wait for the thread; its record. Raises whatever ended it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._record is not None
        return self._record


@dataclass
class _Pending:
    directory: Path
    aside: Path
    write: _Write
    fields: dict[str, Any]
    started: float
    stall: float = 0.0


class BackgroundWriter:
    """One per rank and run. All methods but `before_update` are collective, and of the main thread."""

    def __init__(
        self, *, at: Callable[[str, str], None] = lambda phase, module: None, timeout: timedelta | None = None
    ) -> None:
        """`at` hears where this rank stands (phase, part): engine.watchdog.Watchdog.at. Collective where ranks train
        on GPUs: a gloo group for `ready`, which waits for others as long as `timeout`, so that asking does not wait for
        the device."""
        self._pending: _Pending | None = None
        self._memory = HostCopy()
        self._at = at
        self._group = None
        if dist.get_world_size() > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def start(
        self,
        directory: Path,
        pieces: Sequence[Piece],
        *,
        extras: Mapping[str, bytes] | None = None,
        begun: float | None = None,
        **index: Any,
    ) -> None:
        """As `write_checkpoint`, but returns before anything is written; `pieces` must not change from here until
        `before_update` returns. The checkpoint before has to be finished. `begun` (time.perf_counter): since when
        training stands still for it."""
        assert self._pending is None, "finish the last checkpoint first"
        begun = time.perf_counter() if begun is None else begun
        self._at("checkpoint", "folder")
        aside = prepare(directory, lambda: self._memory.reserve(pieces))
        write = _Write(aside, pieces, self._memory)
        self._pending = _Pending(directory, aside, write, {"extras": extras or {}, **index}, begun)
        self._pending.stall = time.perf_counter() - begun

    def before_update(self) -> None:
        """Wait until what is saved may change. Talks to nobody."""
        if self._pending is None:
            return
        begun = time.perf_counter()
        self._pending.write.staged.wait()
        if self._pending.write.queued is not None:
            torch.cuda.current_stream().wait_event(self._pending.write.queued)  # the device waits, not the host
        self._pending.stall += time.perf_counter() - begun

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written. The same on every rank."""
        return self._pending is not None

    def ready(self) -> bool:
        """Between steps: whether `finish` would not have to wait, or has an error to raise. The same on every rank.

        One all-reduce of two integers on the host while a checkpoint is being written, nothing otherwise.
        """
        if self._pending is None:
            return False
        begun = time.perf_counter()
        write = self._pending.write
        states = torch.tensor([write.failed, write.done], dtype=torch.int64)
        dist.all_reduce(states, group=self._group)
        self._pending.stall += time.perf_counter() - begun
        failed, done = states.tolist()
        return failed > 0 or done == dist.get_world_size()

    def finish(self) -> Saved:
        """Wait for all ranks' threads and commit what is `pending`. Raises CheckpointError on all."""
        pending, self._pending = self._pending, None
        begun = time.perf_counter()

        def own_file() -> FileRecord:
            self._at("checkpoint", "waiting for the background writer")
            record = pending.write.result()
            self._at("checkpoint", "commit")  # so that a rank whose file system hangs is behind the others
            return record

        commit(pending.directory, pending.aside, own_file, **pending.fields)
        now = time.perf_counter()
        return Saved(pending.directory, now - pending.started, pending.stall + now - begun)

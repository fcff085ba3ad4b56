"""The processes that read, decode and augment, and what happens when one of them dies."""

from __future__ import annotations

import os
import re
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from megad2v.data.mix import MixedSamples
from megad2v.data.parcel import Parcel
from megad2v.data.shardset import Readable
from megad2v.data.turns import Turns
from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.modalities.sample import BadSample, Transform

PID, SAMPLE = 0, 1
"""Columns of the board on which workers write who they are and which sample they have in hand (-1: none)."""

PREPARED_STEPS = 2
"""How many steps' micro-batches may be ready or under way: one being consumed, one to follow."""


class WorkerDied(RuntimeError):
    """A data worker was killed or crashed; the message names the sample that it was reading."""


@dataclass(frozen=True)
class Refusal:
    """A UserError on its way out of a worker; DataLoader would turn its one line into a traceback."""

    message: str


class MicroBatches(Dataset["Batch | Parcel | Refusal"]):
    """Micro-batch number -> Batch (packed, in a worker). `rows` plans its (epoch, sample index) pairs; an empty plan is
    the row of zeros."""

    def __init__(
        self, shards: Readable, transform: Transform[Any], rows: Callable[[int], list[tuple[int, int]]]
    ) -> None:
        self.shards = shards
        self._transform = transform
        self._rows = rows
        self.board: torch.Tensor | None = None
        """(workers, 2) int64 in shared memory, or None without workers."""
        self.first = 0
        """Number of the first sample on the board, where others share it."""

    def __getitem__(self, number: int) -> Batch | Parcel | Refusal:
        worker = get_worker_info()
        note = None if worker is None or self.board is None else self.board[worker.id].numpy()
        samples: list[Any] = []  # the transform's own kind
        sample_ids: list[str] = []
        labels: list[int] = []
        dropped: list[tuple[str, str]] = []
        for epoch, index in self._rows(number):
            if note is not None:
                note[SAMPLE] = self.first + index
            try:
                raw = self.shards.read(index)
            except UserError as error:
                return Refusal(str(error))
            except BadSample as error:
                dropped.append((self.shards.sample_id(index), str(error)))
                continue
            try:
                samples.append(self._transform(raw.data, raw.id, epoch))
            except BadSample as error:
                dropped.append((raw.id, str(error)))
                continue
            sample_ids.append(raw.id)
            labels.append(raw.label)
        batch = self._transform.collate(samples, sample_ids, labels, dropped)
        if note is not None:
            note[SAMPLE] = -1
        return batch if worker is None else Parcel.of(batch)


class JointMicroBatches(Dataset["Batch | Parcel | Refusal"]):
    """Micro-batch number step * M + m -> micro-batch m of the step whose turn it is, from the one modality that has it:
    what a run of that modality alone has at its step `own`."""

    def __init__(self, parts: Mapping[str, MicroBatches], turns: Turns, micro_batches: int) -> None:
        self.shards = MixedSamples({name: part.shards for name, part in parts.items()}, turns.weights)
        """All samples in one list, to name them by; each part reads its own."""
        self._parts = {name: parts[name] for name in turns.weights}
        for part, first in zip(self._parts.values(), self.shards.starts, strict=False):
            part.first = first
        self._turns = turns
        self._micro_batches = micro_batches
        self.board: torch.Tensor | None = None
        """As MicroBatches.board."""

    def __getitem__(self, number: int) -> Batch | Parcel | Refusal:
        step, m = divmod(number, self._micro_batches)
        modality, own = self._turns.at(step)
        part = self._parts[modality]
        part.board = self.board
        return part[own * self._micro_batches + m]


class Stream(Iterator[Batch]):
    """The micro-batches of `numbers`, in order, prepared ahead by `workers` processes (0: by this one).

    `per_step` is how many are consumed together. Raises UserError as the shards do, WorkerDied for a dead worker.
    """

    def __init__(
        self, batches: MicroBatches | JointMicroBatches, numbers: Iterable[int], workers: int, *, per_step: int
    ) -> None:
        self._shards = batches.shards
        self._board = torch.full((max(1, workers), 2), -1, dtype=torch.int64).share_memory_()
        self._closing = torch.zeros(1, dtype=torch.int64).share_memory_()
        batches.board = self._board if workers else None
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            prefetch_factor=max(2, -(-PREPARED_STEPS * per_step // workers)) if workers else None,
            worker_init_fn=_WorkerStart(self._board, self._closing) if workers else None,
        )
        # Also at the interpreter's exit: workers ignore SIGTERM until they are told that it is meant.
        self._tell = weakref.finalize(self, self._closing.fill_, 1)
        self._items: Iterator[Batch | Parcel | Refusal] | None = None
        with self._explained():
            self._items = iter(loader)

    def __next__(self) -> Batch:
        if self._items is None:
            raise StopIteration
        with self._explained():
            item = next(self._items)
        if isinstance(item, Refusal):
            self.close()
            error = UserError(item.message)
            error.on_one_rank = True  # the others go on to their next collective
            raise error
        return item.open() if isinstance(item, Parcel) else item

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reading = self.explain(error)
            if reading is None:
                raise
            self.close()
            raise WorkerDied(reading) from error

    def close(self) -> None:
        """End the workers and wait for them."""
        self._tell()
        self._items = None  # its finaliser joins the processes

    def explain(self, error: BaseException) -> str | None:
        """One line about what the dead worker in torch's error was reading; None for any other error."""
        if isinstance(error, WorkerDied):
            return str(error)
        found = re.search(r"DataLoader worker \(pid(?:\(s\))?:? ([\d, ]+)\)", str(error))
        if found is None:
            return None
        pids = {int(pid) for pid in found[1].replace(",", " ").split()}
        read = [int(sample) for pid, sample in self._board.tolist() if pid in pids and sample >= 0]
        names = ", ".join(self._shards.sample_id(sample) for sample in read) or "nothing"
        line = " ".join(str(error).split())
        return f"a data worker died while reading {names}: {line}"


def _as_it_is(item: Batch | Parcel | Refusal) -> Batch | Parcel | Refusal:
    return item


class _WorkerStart:
    """Runs first in every worker. A class, so that it can be pickled where workers are not forked."""

    def __init__(self, board: torch.Tensor, closing: torch.Tensor) -> None:
        self._board, self._closing = board, closing

    def __call__(self, worker: int) -> None:
        self._board[worker, PID] = os.getpid()
        torch.set_num_threads(1)
        # Schedulers and Ctrl-C signal the whole process group, and the training process needs its workers until it
        # has saved. They end when it closes them, and torch's watchdog ends them when it is gone.
        self._parent = os.getppid()
        for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_terminate)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        if int(self._closing[0]) or os.getppid() != self._parent:
            raise SystemExit(0)

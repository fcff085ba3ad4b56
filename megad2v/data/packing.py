"""Which samples get into which shard: a function of their order and sizes alone, whoever prepares or writes them.

Files, in their shuffled order, are divided into chunks. What becomes of a chunk lies in a file of its own, and its
heads (outcomes without their bytes) are all that is needed here: one process decides for all that read and write.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from megad2v.data.writer import Cuts, sample_bytes

DUPLICATE = "the same as an earlier one"


@dataclass(frozen=True)
class Piece:
    """Samples of one chunk that follow each other in one shard."""

    chunk: int
    first: int
    """The number of the chunk's first outcome, in the whole corpus: keys are made of it."""
    start: int
    stop: int
    """Samples of the chunk, those of `dropped` outcomes not counted."""
    dropped: tuple[int, ...]
    """Outcomes of the chunk, before `stop`, that repeat an earlier one."""


@dataclass(frozen=True)
class ShardPlan:
    """What goes into one shard."""

    number: int
    pieces: tuple[Piece, ...]
    samples: int

    @property
    def digest(self) -> str:
        """Differs when, for one input and one set of options, the samples differ."""
        return sha256(json.dumps(asdict(self)).encode()).hexdigest()


class Packer:
    """Takes the heads of all chunks in order. Memory: the fingerprints, where there are any, and the open shard."""

    def __init__(self, max_bytes: int) -> None:
        self.outcomes = 0
        self.labels: Counter[int] = Counter()
        self.totals: dict[str, float] = {}
        self._cuts = Cuts(max_bytes)
        self._seen: set[str] = set()
        self._pieces: list[Piece] = []
        self._samples = self._shards = 0
        self._chunk, self._first = -1, 0
        self._start = self._stop = 0
        self._dropped: list[int] = []

    @property
    def open_chunks(self) -> set[int]:
        """Chunks that the shard which is not closed yet has samples of."""
        return {piece.chunk for piece in self._pieces} | ({self._chunk} if self._stop > self._start else set())

    def begin(self, chunk: int) -> None:
        """From here on, the heads are those of `chunk`."""
        self._end_piece()
        self._chunk, self._first, self._start, self._stop, self._dropped = chunk, self.outcomes, 0, 0, []

    def is_new(self, head: Mapping[str, Any]) -> bool:
        """Whether this outcome, the next to be added, does not repeat an earlier one."""
        return not head["fingerprint"] or head["fingerprint"] not in self._seen

    def add(self, head: Mapping[str, Any]) -> list[ShardPlan]:
        """The shards that are complete with this outcome."""
        number = self.outcomes
        self.outcomes += 1
        if not self.is_new(head):
            self._dropped.append(number - self._first)
            return []
        if head["fingerprint"]:
            self._seen.add(head["fingerprint"])
        complete: list[ShardPlan] = []
        for sizes, label in zip(head["samples"], head["labels"], strict=True):
            if self._cuts.before(sample_bytes(sizes.values())):
                complete.append(self._close())
            self.labels[label] += 1
            self._stop += 1
            self._samples += 1
        for name, amount in head["totals"].items() if head["samples"] else ():
            self.totals[name] = self.totals.get(name, 0) + amount
        return complete

    def last(self) -> list[ShardPlan]:
        """The shard that was open at the end, if there is one."""
        return [self._close()] if self._samples else []

    def _end_piece(self) -> None:
        if self._stop > self._start:
            self._pieces.append(Piece(self._chunk, self._first, self._start, self._stop, tuple(self._dropped)))
            self._start = self._stop

    def _close(self) -> ShardPlan:
        self._end_piece()
        plan = ShardPlan(self._shards, tuple(self._pieces), self._samples)
        self._shards, self._samples, self._pieces = self._shards + 1, 0, []
        return plan

"""make_shards: a raw corpus -> a folder of shards. The command line is tools/make_shards.py.

One driver for any number of processes, on one machine or many. Files, in their shuffled order, are divided into chunks;
the team (data.team, data.ranks) prepares chunks on disk, the driver reads only their heads (data.chunks) and decides
which samples make which shard (data.packing), and the team writes the shards, each from its chunks. Every byte of a
sample is written to the spool, read, and written to its shard; none goes through the driver.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

import megad2v
from megad2v.data.chunks import Journal, check_chunk, chunk_path, heads_path, read_outcomes, write_chunk
from megad2v.data.format import DATASET_FILE, TOKENIZER_FOLDER, DatasetInfo, ShardInfo, read_dataset
from megad2v.data.packing import DUPLICATE, Packer, Piece, ShardPlan
from megad2v.data.team import Team, local_team
from megad2v.data.writer import DatasetWriter, Stale, read_record, shard_name, write_record, write_shard
from megad2v.errors import UserError
from megad2v.modalities.corpus import Corpus, SourceFile, shuffled

CHUNK = 16
"""Files in a chunk; fewer where there are fewer than CHUNKS times as many."""
CHUNKS = 512
AHEAD = 4
"""Chunks per process that may be prepared beyond the first that is not: bounds what lies on the disk."""
SPOOL_BYTES = 4 * 2**20
"""What chunks become is written in pieces of this."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class Made:
    """What `make_shards` did."""

    info: DatasetInfo
    counts: Counter[str]
    """copied, converted, skipped -> files."""
    reported: int
    """Lines in report.jsonl."""
    noun: str
    written: tuple[int, ...] = ()
    """Samples by the rank that wrote them, in this run; where there are ranks."""

    @property
    def summary(self) -> str:
        """One line for a person."""
        labels = f"{len(self.info.classes)} classes" if self.info.classes else "no labels"
        totals = "".join(f", {amount:,.3g} {what}" for what, amount in self.info.totals.items())
        files = self.counts["copied"] + self.counts["converted"]
        what = self.noun if files == self.info.samples else f"samples of {files} {self.noun}"
        line = (
            f"{self.info.samples} {what}{totals} in {len(self.info.shards)} shards ({labels}): "
            f"{self.counts['copied']} copied, {self.counts['converted']} converted, {self.counts['skipped']} skipped"
        )
        ranks = f"; ranks wrote {', '.join(map(str, self.written))}" if self.written else ""
        return line + ranks + ("; see report.jsonl" if self.reported else "")


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Bytes in '512MB', '1GiB', '100000'. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?|)B?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"{option}: {text!r} is not a size; write for instance 512MB or 1GiB")
    return size


def classes_of(folder: Path) -> tuple[str, ...]:
    """Class names of the data set in `folder`, in the order of their ids. Raises UserError when it has none."""
    info = read_dataset(folder)
    if info is None or not info.classes:
        raise UserError(f"{folder}: no {DATASET_FILE} with classes there; --classes takes the output of make_shards")
    return info.classes


def make_shards(
    corpus: Corpus,
    out: Path,
    *,
    workers: int,
    max_shard_bytes: int,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    team: Team | None = None,
) -> Made:
    """Shards of a corpus; the same bytes for any number of `workers` (0: no processes of their own), or any `team`.

    A run that was killed goes on, when it is called again with the same arguments, with what it has made.
    Raises UserError for an output that holds other things, also unfinished ones, or when no file is usable.
    """
    files = shuffled(corpus.files, seed)
    settings = {**asdict(corpus.options), "seed": seed, "max_shard_bytes": max_shard_bytes}
    plan = {"input": _listing(corpus, files), "settings": {"version": megad2v.__version__, **settings}}
    writer = DatasetWriter(out, corpus.name, corpus.modality, max_shard_bytes, overwrite=overwrite, plan=plan)
    with writer:
        if writer.done:
            info, counts = writer.settle()
            reported = counts.pop("reported")
            return Made(info, Counter(counts), reported, corpus.noun)
        # Drained here and not by chance: processes must have ended before the working folder is cleared away.
        with team or local_team(workers) as hands:
            # None: no bar where nobody watches.
            with tqdm(total=len(files), unit="file", desc="make_shards", disable=None if progress else True) as bar:
                run = _Run(corpus, files, writer, hands, max_shard_bytes, bar)
                run.recover(overwrite)
                with closing(run):
                    shards = run.all_shards()
        packer = run.packer
        if not shards:
            raise UserError(f"{corpus.folder}: none of the {len(files)} {corpus.noun} can be used (last: {run.last})")
        info = writer.finish(
            shards,
            {**run.counts, "reported": run.reported},
            classes=tuple(corpus.classes),
            class_counts=tuple(packer.labels[label] for label in range(len(corpus.classes))),
            totals={name: round(amount, 6) for name, amount in packer.totals.items()},
            tokenizer=dict(corpus.tokenizer),
            tool=f"megad2v {megad2v.__version__} make_shards {corpus.name}",
            settings=settings,
        )
    return Made(info, run.counts, run.reported, corpus.noun, tuple(run.written[place] for place in hands.places))


def _listing(corpus: Corpus, files: Sequence[SourceFile]) -> str:
    """A hash of all that goes in but for the contents of files, whose sizes and times are kept with each chunk."""
    total = sha256()
    about = (corpus.name, str(corpus.folder.absolute()), [*corpus.classes], [*corpus.others], dict(corpus.tokenizer))
    for part in (about, *files):
        total.update(repr(part).encode("utf-8", "backslashreplace") + b"\n")
    return total.hexdigest()


class _Run:
    """The driver: what is to be prepared next, what can be written, what is no longer needed."""

    def __init__(
        self, corpus: Corpus, files: Sequence[SourceFile], writer: DatasetWriter, team: Team, max_bytes: int, bar: tqdm
    ) -> None:
        self._corpus, self._files, self._writer, self._team, self._bar = corpus, files, writer, team, bar
        self._light = replace(corpus, files=(), others=(), classes=(), tokenizer_files={})  # it travels with each task
        self._size = max(1, min(CHUNK, len(files) // CHUNKS))
        self._count = -(-len(files) // self._size)
        self.packer = Packer(max_bytes)
        self.counts: Counter[str] = Counter(skipped=len(corpus.others))
        self.written: Counter[int] = Counter()
        self.reported = len(corpus.others)
        self.last = "none has anything in it"
        self._running: dict[Future[Any], tuple[int, ShardPlan | None]] = {}
        self._next = self._unasked = 0  # chunks: to be packed, to be asked for
        self._prepared: set[int] = set()  # heads are there, and not packed yet
        self._data: set[int] = set()  # data are there, whole
        self._waiting: deque[ShardPlan] = deque()
        self._users: Counter[int] = Counter()  # of a chunk: shards that are not written yet
        self._shards: dict[int, ShardInfo] = {}

    def recover(self, overwrite: bool) -> None:
        """See what a killed run has left. Raises Stale when its input has changed since, unless `overwrite`."""
        self._greet()
        self._journal = Journal(self._writer.work)
        tasks = (
            (self._corpus.folder, self._chunk(number), self._path(number), end["bytes"], end["crc"], end["stamps"])
            for number, end in self._journal.known()
        )
        for (_, _, data, *_), (changed, whole) in self._team.each(check_chunk, tasks):
            if changed and overwrite:
                self._journal.close()
                self._writer.restart()
                self._data.clear()
                self._journal = Journal(self._writer.work)
                break
            if changed:
                raise Stale(
                    f"{self._corpus.folder / changed}: has changed since the run began that was interrupted; "
                    "--overwrite begins anew"
                )
            if whole:
                self._data.add(int(data.name))
            else:
                data.unlink(missing_ok=True)
                heads_path(data).unlink(missing_ok=True)
        self._prepared = {number for number in self._data if number >= self._journal.chunks}
        for name, content in self._corpus.tokenizer_files.items():
            self._writer.attach(f"{TOKENIZER_FOLDER}/{name}", content)
        for path in self._corpus.others:
            self._writer.report(path=path, action="skipped", reason=self._corpus.why_not)

    def close(self) -> None:
        self._journal.close()

    def all_shards(self) -> list[ShardInfo]:
        """Make them."""
        while True:
            while self._next in self._prepared or self._next < self._journal.chunks:
                self._pack()
            self._hand_out()
            if not self._running:
                break
            for future in self._team.wait(self._running):
                self._take(future)
        return [self._shards[number] for number in sorted(self._shards)]

    def _greet(self) -> None:
        """Make sure that all ranks see what they will read and write."""
        seen = (self._writer.work.absolute(), (self._corpus.folder / self._files[0].path).absolute())
        for place in self._team.places:
            trouble = self._team.submit(_unseen, seen, place=place)
            while not trouble.done():
                self._team.wait([trouble])
            if trouble.result():
                raise UserError(f"{trouble.result()}; --mpi needs --input and --output on disks that all ranks share")

    def _chunk(self, number: int) -> Sequence[SourceFile]:
        return self._files[number * self._size : (number + 1) * self._size]

    def _path(self, number: int) -> Path:
        return chunk_path(self._writer.work, number)

    def _pack(self) -> None:
        """Go through the heads of the next chunk."""
        number, files = self._next, self._chunk(self._next)
        self.packer.begin(number)
        for head in self._journal.heads(number):
            action, reason = head["action"], head["reason"]
            if not self.packer.is_new(head):
                action, reason = "skipped", DUPLICATE
            self.counts[action] += 1
            if reason:
                self.reported += 1
                self.last = reason
                where = {"path": files[head["file"]].path, **({"line": head["line"]} if head["line"] else {})}
                self._writer.report(**where, action=action, reason=reason)
            self._complete(self.packer.add(head))
        self._prepared.discard(number)
        self._next += 1
        if self._next == self._count:
            self._complete(self.packer.last())
        self._drop({number})
        self._bar.update(len(files))

    def _complete(self, plans: list[ShardPlan]) -> None:
        """Have shards written whose samples are known, unless an earlier run has."""
        for plan in plans:
            info = read_record(self._tar(plan), self._corpus.modality, plan.digest)
            if info is not None:
                self._shards[plan.number] = info
                self._drop({piece.chunk for piece in plan.pieces})
            else:
                self._users.update(piece.chunk for piece in plan.pieces)
                self._waiting.append(plan)

    def _tar(self, plan: ShardPlan) -> Path:
        return self._writer.work / shard_name(self._corpus.name, plan.number)

    def _hand_out(self) -> None:
        """Shards first: what they need lies on the disk."""
        while len(self._running) < self._team.size * self._team.ahead:
            asked = {number for number, plan in self._running.values() if plan is None}
            # Data can only be missing where a finished shard was taken away between two runs.
            lacking = next((n for plan in self._waiting for n in _chunks(plan) if n not in self._data | asked), None)
            ready = next((plan for plan in self._waiting if self._data.issuperset(_chunks(plan))), None)
            if ready is not None:
                self._waiting.remove(ready)
                pieces = [(piece, self._chunk(piece.chunk)) for piece in ready.pieces]
                arguments = (self._writer.work, self._tar(ready).name, self._corpus.modality, pieces, ready.digest)
                place = ready.number % self._team.size
                self._running[self._team.submit(_write, *arguments, place=place)] = (place, ready)
            elif lacking is not None:
                self._prepare(lacking)
            elif self._unasked < min(self._count, self._next + 1 + AHEAD * self._team.size):
                if self._unasked >= max(self._next, self._journal.chunks) and self._unasked not in self._prepared:
                    self._prepare(self._unasked)
                self._unasked += 1
            else:
                return

    def _prepare(self, number: int) -> None:
        future = self._team.submit(_several, self._light, self._chunk(number), self._path(number))
        self._running[future] = (number, None)

    def _take(self, future: Future[Any]) -> None:
        number, plan = self._running.pop(future)
        try:
            result = future.result()
        except BrokenProcessPool as error:
            path = self._chunk(plan.pieces[0].chunk if plan else number)[0].path
            raise RuntimeError(
                f"a make_shards process was killed at about {path} (out of memory? try fewer --workers); "
                "what is done is kept, and gone on with"
            ) from error
        if plan is None:
            self._data.add(number)
            if number >= self._next:
                self._prepared.add(number)
            else:
                heads_path(self._path(number)).unlink()
        else:
            self._shards[plan.number] = result
            self.written[number] += result.samples
            self._users.subtract(_chunks(plan))
            self._drop(_chunks(plan))

    def _drop(self, chunks: set[int]) -> None:
        """Remove the data that nobody needs any more."""
        for number in chunks - self.packer.open_chunks:
            if number < self._next and not self._users[number] and number in self._data:
                self._data.remove(number)
                self._path(number).unlink()


def _chunks(plan: ShardPlan) -> set[int]:
    return {piece.chunk for piece in plan.pieces}


def _unseen(paths: Sequence[Path]) -> str:
    return next((f"{path}: is not seen by a rank" for path in paths if not path.exists()), "")


def _several(corpus: Corpus, files: Sequence[SourceFile], spool: Path) -> Path:
    """What becomes of some files, in the file `spool`."""
    write_chunk(corpus, files, spool, SPOOL_BYTES)
    return spool


def _write(
    work: Path, name: str, modality: str, pieces: Sequence[tuple[Piece, Sequence[SourceFile]]], digest: str
) -> ShardInfo:
    """A shard of samples that lie in the spool."""
    samples = (sample for piece, files in pieces for sample in _samples(chunk_path(work, piece.chunk), piece, files))
    info = write_shard(work / name, modality, samples)
    write_record(work / name, digest, info)
    return info


def _samples(data: Path, piece: Piece, files: Sequence[SourceFile]) -> Iterator[tuple[str, Any]]:
    """(key, extension -> bytes)."""
    dropped, position = frozenset(piece.dropped), 0
    with data.open("rb") as stream:
        for number, outcome in enumerate(read_outcomes(files, stream)):
            if number in dropped:
                continue
            several = len(outcome.samples) > 1
            for part, sample in enumerate(outcome.samples):
                if piece.start <= position < piece.stop:
                    key = f"{piece.first + number:09d}"
                    yield (f"{key}-{part:05d}" if several else key), sample
                position += 1
            if position >= piece.stop:
                return

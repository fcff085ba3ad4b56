"""make_shards: a raw corpus -> a folder of shards. The command line is tools/make_shards.py."""

from __future__ import annotations

import re
import signal
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import megad2v
from megad2v.data.format import DATASET_FILE, WORKING_FOLDER, DatasetInfo, read_dataset
from megad2v.data.writer import DatasetWriter
from megad2v.errors import UserError
from megad2v.modalities.corpus import Corpus, Outcome, SourceFile, shuffled

CHUNK = 16
"""Files handed to a process at a time; fewer where there are few."""
AHEAD = 4
"""Chunks per process that may be finished or under way: bounds memory when the disk is slower than the processes."""
SPOOL_BYTES = 4 * 2**20
"""What a file becomes goes to the main process through a temporary file if it is larger: an hour of speech is 60 MB."""
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
        return line + ("; see report.jsonl" if self.reported else "")


def parse_size(text: str) -> int:
    """Bytes in '512MB', '1GiB', '100000'. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?|)B?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size: {text!r} is not a size; write for instance 512MB or 1GiB")
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
) -> Made:
    """Shards of a corpus; the same bytes for any number of `workers` (0: no processes of their own).

    Raises UserError for an output that holds other things, or when no file is usable.
    """
    files = shuffled(corpus.files, seed)
    counts: Counter[str] = Counter()
    labels: Counter[int] = Counter()
    totals: dict[str, float] = {}
    with DatasetWriter(out, corpus.name, corpus.modality, max_shard_bytes, overwrite=overwrite) as writer:
        for path in corpus.others:
            writer.report(path=path, action="skipped", reason=corpus.why_not)
        counts["skipped"] = reported = len(corpus.others)
        # Closed here and not by chance: processes must have ended before the working folder is cleared away.
        with closing(_outcomes(corpus, files, workers, out / WORKING_FOLDER / "spool")) as outcomes:
            # None: no bar where nobody watches.
            quiet = None if progress else True
            bar = tqdm(outcomes, total=len(files), unit="file", desc="make_shards", disable=quiet)
            for number, (outcome, samples) in enumerate(bar):
                counts[outcome.action] += 1
                if outcome.reason:
                    reported += 1
                    writer.report(path=outcome.file.path, action=outcome.action, reason=outcome.reason)
                several = len(samples) > 1
                for part, sample in enumerate(samples):
                    labels[outcome.file.label] += 1
                    writer.write(f"{number:09d}-{part:05d}" if several else f"{number:09d}", sample)
                for name, amount in outcome.totals.items():
                    totals[name] = totals.get(name, 0) + amount
        if not labels.total():
            raise UserError(
                f"{corpus.folder}: none of the {len(files)} {corpus.noun} can be used (last: {outcome.reason})"
            )
        info = writer.finish(
            classes=tuple(corpus.classes),
            class_counts=tuple(labels[label] for label in range(len(corpus.classes))),
            totals={name: round(amount, 6) for name, amount in totals.items()},
            tool=f"megad2v {megad2v.__version__} make_shards {corpus.name}",
            settings={**asdict(corpus.options), "seed": seed, "max_shard_bytes": max_shard_bytes},
        )
    return Made(info, counts, reported, corpus.noun)


class _Spooled:
    """Samples of one file, kept on disk and read one at a time."""

    def __init__(self, path: Path, samples: Sequence[Mapping[str, bytes]]) -> None:
        self._path = path
        self._sizes = [{kind: len(part) for kind, part in sample.items()} for sample in samples]
        with path.open("wb") as file:
            for sample in samples:
                file.writelines(sample.values())

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[dict[str, bytes]]:
        with self._path.open("rb") as file:
            for sizes in self._sizes:
                yield {kind: file.read(size) for kind, size in sizes.items()}
        self._path.unlink()


class _Result(NamedTuple):
    outcome: Outcome
    samples: Sequence[Mapping[str, bytes]] | _Spooled


def _outcomes(corpus: Corpus, files: Sequence[SourceFile], workers: int, spool: Path) -> Iterator[_Result]:
    """Results in the order of the files. Raises RuntimeError when a process is killed."""
    if workers == 0:
        for file in files:
            outcome = corpus.make_samples(corpus.folder, file, corpus.options)
            yield _Result(outcome, outcome.samples)
        return
    spool.mkdir()
    light = replace(corpus, files=(), others=())  # it travels with each chunk
    size = max(1, min(CHUNK, len(files) // (AHEAD * workers)))
    pool = ProcessPoolExecutor(workers, initializer=_ignore_interrupt)
    try:
        pending: deque[tuple[SourceFile, Future[list[_Result]]]] = deque()
        for start in range(0, len(files), size):
            chunk = files[start : start + size]
            pending.append((chunk[0], pool.submit(_several, light, chunk, spool)))
            if len(pending) > AHEAD * workers:
                yield from _result(*pending.popleft())
        while pending:
            yield from _result(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(first: SourceFile, future: Future[list[_Result]]) -> list[_Result]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a make_shards process was killed at about {first.path} (out of memory? try fewer --workers)"
        ) from error


def _several(corpus: Corpus, files: Sequence[SourceFile], spool: Path) -> list[_Result]:
    results: list[_Result] = []
    for file in files:
        outcome = corpus.make_samples(corpus.folder, file, corpus.options)
        samples: Sequence[Mapping[str, bytes]] | _Spooled = outcome.samples
        if sum(len(part) for sample in samples for part in sample.values()) > SPOOL_BYTES:
            samples = _Spooled(spool / blake2b(file.path.encode("utf-8", "surrogateescape")).hexdigest()[:32], samples)
        results.append(_Result(replace(outcome, samples=()), samples))
    return results


def _ignore_interrupt() -> None:
    """Ctrl-C reaches the whole group; the main process ends the others without a traceback from each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

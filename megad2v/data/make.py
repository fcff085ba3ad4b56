"""make_shards: a raw corpus -> a folder of shards. The command line is tools/make_shards.py."""

from __future__ import annotations

import io
import json
import re
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from tqdm import tqdm

import megad2v
from megad2v.data.format import (
    DATASET_FILE,
    LABEL_EXTENSION,
    TOKENIZER_FOLDER,
    WORKING_FOLDER,
    DatasetInfo,
    read_dataset,
)
from megad2v.data.writer import DatasetWriter
from megad2v.errors import UserError
from megad2v.modalities.corpus import Corpus, Outcome, SourceFile, shuffled

CHUNK = 16
"""Files handed to a process at a time; fewer where there are few."""
AHEAD = 4
"""Chunks per process that may be finished or under way: bounds memory when the disk is slower than the processes."""
SPOOL_BYTES = 4 * 2**20
"""What files become goes to the main process through a temporary file if it is larger: an hour of speech is 60 MB."""
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
) -> Made:
    """Shards of a corpus; the same bytes for any number of `workers` (0: no processes of their own).

    Raises UserError for an output that holds other things, or when no file is usable.
    """
    files = shuffled(corpus.files, seed)
    counts: Counter[str] = Counter()
    labels: Counter[int] = Counter()
    totals: dict[str, float] = {}
    seen: set[bytes] = set()
    with DatasetWriter(out, corpus.name, corpus.modality, max_shard_bytes, overwrite=overwrite) as writer:
        for name, content in corpus.tokenizer_files.items():
            writer.attach(f"{TOKENIZER_FOLDER}/{name}", content)
        for path in corpus.others:
            writer.report(path=path, action="skipped", reason=corpus.why_not)
        counts["skipped"] = reported = len(corpus.others)
        last = "none has anything in it"
        # Closed here and not by chance: processes must have ended before the working folder is cleared away.
        with closing(_outcomes(corpus, files, workers, out / WORKING_FOLDER / "spool")) as outcomes:
            # None: no bar where nobody watches.
            for number, outcome in enumerate(_watched(outcomes, len(files), None if progress else True)):
                if outcome.fingerprint in seen:
                    outcome = replace(outcome, action="skipped", reason="the same as an earlier one", samples=())
                elif outcome.fingerprint:
                    seen.add(outcome.fingerprint)
                counts[outcome.action] += 1
                if outcome.reason:
                    reported += 1
                    last = outcome.reason
                    where = {"path": outcome.file.path, **({"line": outcome.line} if outcome.line else {})}
                    writer.report(**where, action=outcome.action, reason=outcome.reason)
                several = len(outcome.samples) > 1
                for part, sample in enumerate(outcome.samples):
                    labels[int(sample.get(LABEL_EXTENSION, b"-1"))] += 1
                    writer.write(f"{number:09d}-{part:05d}" if several else f"{number:09d}", sample)
                for name, amount in outcome.totals.items() if outcome.samples else ():
                    totals[name] = totals.get(name, 0) + amount
        if not labels.total():
            raise UserError(f"{corpus.folder}: none of the {len(files)} {corpus.noun} can be used (last: {last})")
        info = writer.finish(
            classes=tuple(corpus.classes),
            class_counts=tuple(labels[label] for label in range(len(corpus.classes))),
            totals={name: round(amount, 6) for name, amount in totals.items()},
            tokenizer=dict(corpus.tokenizer),
            tool=f"megad2v {megad2v.__version__} make_shards {corpus.name}",
            settings={**asdict(corpus.options), "seed": seed, "max_shard_bytes": max_shard_bytes},
        )
    return Made(info, counts, reported, corpus.noun)


def _watched(outcomes: Iterator[Outcome], files: int, quiet: bool | None) -> Iterator[Outcome]:
    """The same, with a progress bar that counts files: one may have any number of outcomes."""
    with tqdm(total=files, unit="file", desc="make_shards", disable=quiet) as bar:
        file: SourceFile | None = None
        for outcome in outcomes:
            bar.update(outcome.file != file)
            file = outcome.file
            yield outcome


def _outcomes(corpus: Corpus, files: Sequence[SourceFile], workers: int, spool: Path) -> Iterator[Outcome]:
    """In the order of the files. Raises RuntimeError when a process is killed."""
    if workers == 0:
        for file in files:
            yield from corpus.outcomes(file)
        return
    spool.mkdir()
    light = replace(corpus, files=(), others=(), tokenizer_files={})  # it travels with each chunk
    size = max(1, min(CHUNK, len(files) // (AHEAD * workers)))
    pool = ProcessPoolExecutor(workers, initializer=_ignore_interrupt)
    try:
        pending: deque[tuple[Sequence[SourceFile], Future[bytes | Path]]] = deque()
        for start in range(0, len(files), size):
            chunk = files[start : start + size]
            pending.append((chunk, pool.submit(_several, light, chunk, spool / str(start))))
            if len(pending) > AHEAD * workers:
                yield from _result(*pending.popleft())
        while pending:
            yield from _result(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(files: Sequence[SourceFile], future: Future[bytes | Path]) -> Iterator[Outcome]:
    try:
        packed = future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a make_shards process was killed at about {files[0].path} (out of memory? try fewer --workers)"
        ) from error
    if isinstance(packed, bytes):
        yield from _unpack(files, io.BytesIO(packed))
        return
    with packed.open("rb") as stream:
        yield from _unpack(files, stream)
    packed.unlink()


def _several(corpus: Corpus, files: Sequence[SourceFile], spool: Path) -> bytes | Path:
    """What becomes of some files, packed: the bytes, or the file `spool` where they are many."""
    stream: IO[bytes] = io.BytesIO()
    try:
        for number, file in enumerate(files):
            for outcome in corpus.outcomes(file):
                _pack(number, outcome, stream)
                if isinstance(stream, io.BytesIO) and stream.tell() > SPOOL_BYTES:
                    packed, stream = stream.getvalue(), spool.open("wb")
                    stream.write(packed)
        return stream.getvalue() if isinstance(stream, io.BytesIO) else spool
    finally:
        stream.close()


def _pack(number: int, outcome: Outcome, stream: IO[bytes]) -> None:
    """A line of JSON, then the bytes of the samples: an outcome at a time is in memory, however many there are."""
    header = {
        "file": number,
        "action": outcome.action,
        "reason": outcome.reason,
        "totals": dict(outcome.totals),
        "line": outcome.line,
        "fingerprint": outcome.fingerprint.hex(),
        "samples": [{kind: len(part) for kind, part in sample.items()} for sample in outcome.samples],
    }
    stream.write(json.dumps(header).encode() + b"\n")
    for sample in outcome.samples:
        stream.writelines(sample.values())


def _unpack(files: Sequence[SourceFile], stream: IO[bytes]) -> Iterator[Outcome]:
    while line := stream.readline():
        header = json.loads(line)
        samples = tuple({kind: stream.read(size) for kind, size in sizes.items()} for sizes in header.pop("samples"))
        fingerprint = bytes.fromhex(header.pop("fingerprint"))
        yield Outcome(files[header.pop("file")], samples=samples, fingerprint=fingerprint, **header)


def _ignore_interrupt() -> None:
    """Ctrl-C reaches the whole group; the main process ends the others without a traceback from each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

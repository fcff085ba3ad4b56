"""make_shards: a raw corpus -> a folder of shards. The command line is tools/make_shards.py."""

from __future__ import annotations

import re
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

import megad2v
from megad2v.data.format import DATASET_FILE, DatasetInfo, read_dataset
from megad2v.data.writer import DatasetWriter
from megad2v.errors import UserError
from megad2v.modalities.vision.shards import (
    ImageFile,
    ImageOptions,
    Outcome,
    class_counts,
    find_images,
    make_sample,
    shuffled,
)

CHUNK = 16
"""Files handed to a process at a time."""
AHEAD = 4
"""Chunks per process that may be finished or under way: bounds memory when the disk is slower than the processes."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class Made:
    """What `make_images` did."""

    info: DatasetInfo
    counts: Counter[str]
    """copied, converted, skipped -> files."""

    @property
    def summary(self) -> str:
        """One line for a person."""
        labels = f"{len(self.info.classes)} classes" if self.info.classes else "no labels"
        line = (
            f"{self.info.samples} images in {len(self.info.shards)} shards ({labels}): {self.counts['copied']} copied, "
            f"{self.counts['converted']} converted, {self.counts['skipped']} skipped"
        )
        return line + ("; see report.jsonl" if self.counts["converted"] + self.counts["skipped"] else "")


def parse_size(text: str) -> int:
    """Bytes in '512MB', '1GiB', '100000'. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?|)B?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size: {text!r} is not a size; write for instance 512MB or 1GiB")
    return size


def make_images(
    folder: Path,
    out: Path,
    *,
    options: ImageOptions,
    workers: int,
    max_shard_bytes: int,
    seed: int = 0,
    classes_of: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Made:
    """Shards of all images under `folder`; the same bytes for any number of `workers` (0: no processes of their own).

    `classes_of` is a data set whose class names and ids are used (a folder with dataset.json), so that train and test
    agree. Raises UserError for a missing or empty input, an output that holds other things, or when no image is usable.
    """
    files, classes, others = find_images(folder, _classes(classes_of) if classes_of is not None else None)
    files = shuffled(files, seed)
    counts: Counter[str] = Counter()
    labels: Counter[int] = Counter()
    with DatasetWriter(out, "image", "vision", max_shard_bytes, overwrite=overwrite) as writer:
        for path in others:
            writer.report(path=path, action="skipped", reason="not a .jpg, .jpeg, .png or .webp file, or hidden")
        counts["skipped"] += len(others)
        outcomes = _outcomes(folder, files, options, workers)
        # None: no bar where nobody watches.
        bar = tqdm(outcomes, total=len(files), unit="image", desc="make_shards", disable=None if progress else True)
        for number, outcome in enumerate(bar):
            counts[outcome.action] += 1
            if outcome.reason:
                writer.report(path=outcome.file.path, action=outcome.action, reason=outcome.reason)
            if outcome.parts:
                labels[outcome.file.label] += 1
                writer.write(f"{number:09d}", outcome.parts)
        if not labels.total():
            raise UserError(f"{folder}: none of the {len(files)} images can be decoded (last: {outcome.reason})")
        info = writer.finish(
            classes=tuple(classes),
            class_counts=class_counts(labels, classes),
            tool=f"megad2v {megad2v.__version__} make_shards image",
            settings={**asdict(options), "seed": seed, "max_shard_bytes": max_shard_bytes},
        )
    return Made(info, counts)


def _classes(folder: Path) -> tuple[str, ...]:
    info = read_dataset(folder)
    if info is None or not info.classes:
        raise UserError(f"{folder}: no {DATASET_FILE} with classes there; --classes takes the output of make_shards")
    return info.classes


def _outcomes(folder: Path, files: Sequence[ImageFile], options: ImageOptions, workers: int) -> Iterator[Outcome]:
    """Outcomes in the order of the files. Raises RuntimeError when a process is killed."""
    if workers == 0:
        for file in files:
            yield make_sample(folder, file, options)
        return
    pool = ProcessPoolExecutor(workers, initializer=_ignore_interrupt)
    try:
        pending: deque[tuple[ImageFile, Future[list[Outcome]]]] = deque()
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            pending.append((chunk[0], pool.submit(_several, folder, chunk, options)))
            if len(pending) > AHEAD * workers:
                yield from _result(*pending.popleft())
        while pending:
            yield from _result(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(first: ImageFile, future: Future[list[Outcome]]) -> list[Outcome]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a make_shards process was killed at about {first.path} (out of memory? try fewer --workers)"
        ) from error


def _several(folder: Path, files: Sequence[ImageFile], options: ImageOptions) -> list[Outcome]:
    return [make_sample(folder, file, options) for file in files]


def _ignore_interrupt() -> None:
    """Ctrl-C reaches the whole group; the main process ends the others without a traceback from each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

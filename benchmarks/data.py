"""Samples a second and core that reach a trainer: ours, plain webdataset, loose files, and the bare decode loop.

    python benchmarks/data.py SHARED [--case NAME ...] [--rounds 24] [--note TEXT] [--output FILE]

SHARED holds image/clothing, image/clothing_fullsize, speech/librispeech_140spk and text/books; tars and loose files of
the same bytes are made of them. All do the same work on each sample, with the same functions (VisionTransform, ...):

    bare         a loop over bytes that lie in memory: transform, collate. The limit.
    ours         TrainingLoader, as the trainer iterates it
    webdataset   WebDataset(tars).shuffle(1000), transform, batched; in WebLoader's workers
    files        a torch Dataset that opens one file for each sample, shuffled by DataLoader

They take turns of a few micro-batches (a step of ours), `--rounds` times, all alive at once, so that what else the
machine does meets all alike. CPU seconds are those of the process and of the contestant's workers, until these have
made up for what was taken from them and sleep. Samples per CPU second are samples a second and core; the ratio to the
bare loop is the median over rounds of the ratio within a round. With 2 workers the bare loop is two processes at once.
`text_blocks` (documents, cut into rows as they are read) has no counterpart outside.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from statistics import quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where megad2v is not installed

import torch
import webdataset
from torch.utils.data import DataLoader, Dataset

from benchmarks.data_cases import CASES, Case, make_cases
from megad2v.data.blocks import BlockSet
from megad2v.data.loader import TRANSFORMS, TrainingLoader
from megad2v.data.plan import training_plan
from megad2v.data.shardset import Samples, ShardSet
from megad2v.modalities.batch import Batch

Endless = Iterator[Batch]


# --- the contestants: each yields micro-batches without end


def ours(case: Case, workers: int) -> Endless:
    """As training/loop.py iterates it."""
    data, train = (
        replace(case.config.data, workers=workers),
        replace(case.config.train, micro_batches_per_step=case.turn),
    )
    config = replace(case.config, data=data, train=train)
    with closing(TrainingLoader(config, rank=0, world=1, start_step=0)) as loader:
        for step in loader:
            yield from step


def from_webdataset(case: Case, workers: int) -> Endless:
    """What webdataset's documentation builds for such tars; only decoding and augmentation are ours."""
    transform, size = TRANSFORMS[case.config.modality](case.config, "train"), rows_per_batch(case)

    def prepared(sample: dict[str, Any]) -> tuple[Any, str]:
        return transform(sample[case.extension], sample["__key__"], 0), sample["__key__"]

    tars = sorted(str(path) for path in case.tars.glob("*.tar"))
    data = webdataset.WebDataset(tars, shardshuffle=len(tars), resampled=False, empty_check=False)
    data = data.shuffle(1000).map(prepared).batched(size, collation_fn=_Collate(transform), partial=False).repeat()
    yield from webdataset.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


class Files(Dataset[Any]):
    """One file, one sample."""

    def __init__(self, case: Case) -> None:
        assert case.files is not None
        self._files, self._transform = case.files, TRANSFORMS[case.config.modality](case.config, "train")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[Any, str]:
        path = self._files[number]
        return self._transform(path.read_bytes(), path.name, 0), path.name


def from_files(case: Case, workers: int) -> Endless:
    """torch's own way."""
    files = Files(case)
    options: dict[str, Any] = {"persistent_workers": True} if workers else {}
    loader = DataLoader(
        files,
        batch_size=rows_per_batch(case),
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        collate_fn=_Collate(files._transform),
        **options,
    )
    while True:
        yield from loader


class _Collate:
    """(prepared sample, id) pairs -> Batch."""

    def __init__(self, transform: Any) -> None:
        self._transform = transform

    def __call__(self, samples: list[tuple[Any, str]]) -> Batch:
        prepared, names = zip(*samples, strict=True)
        return self._transform.collate(list(prepared), list(names), [-1] * len(names), [])


def bare(case: Case, first: int, step: int) -> Endless:
    """The work itself, for every `step`-th micro-batch of ours; what it needs is read before the clock runs."""
    transform, samples = TRANSFORMS[case.config.modality](case.config, "train"), open_samples(case)
    plan, _ = training_plan(case.config, samples)
    yield transform.collate([], [], [], [])
    for start in count(first, step * case.turn):
        numbers = range(start, start + step * case.turn, step)
        todo = [[(epoch, samples.read(index)) for epoch, index in plan.numbered(number)] for number in numbers]
        yield transform.collate([], [], [], [])  # from here on the clock runs
        for rows in todo:
            prepared = [transform(raw.data, raw.id, epoch) for epoch, raw in rows]
            yield transform.collate(prepared, [raw.id for _, raw in rows], [raw.label for _, raw in rows], [])


def open_samples(case: Case) -> Samples:
    """As TrainingLoader opens them."""
    shards = ShardSet(str(case.tars), case.config.modality)
    if case.config.modality == "text" and case.config.text.blocks == "complete_doc":
        return BlockSet(shards, case.config.text.max_tokens)
    return shards


def rows_per_batch(case: Case) -> int:
    """Of a plain pipeline, which has no budgets: as many as ours have on average."""
    plan, _ = training_plan(case.config, open_samples(case))
    return round(sum(len(plan.numbered(number)) for number in range(20)) / 20)


# --- turns


@dataclass(frozen=True)
class Turn:
    """What a contestant did in one."""

    samples: int
    cpu: float
    wall: float

    @property
    def per_core(self) -> float:
        """Samples per CPU second."""
        return self.samples / self.cpu


class Pipeline:
    """A contestant that is iterated, with what workers it has."""

    def __init__(self, batches: Endless) -> None:
        before = set(multiprocessing.active_children())
        self._batches = batches
        next(batches)
        self._workers = [child.pid for child in multiprocessing.active_children() if child not in before]
        self._settle()

    def turn(self, size: int) -> Turn:
        """Take so many micro-batches, and wait until the workers have made up for them."""
        cpu, wall = self._cpu(), time.perf_counter()
        samples = sum(len(batch.sample_ids) for batch in islice(self._batches, size))
        own = time.process_time()
        self._settle()
        waited = time.process_time() - own
        return Turn(samples, self._cpu() - waited - cpu, time.perf_counter() - wall)

    def close(self) -> None:
        """End the workers."""
        self._batches.close()

    def _cpu(self) -> float:
        tasks = [path for pid in self._workers for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
        return time.process_time() + sum(int(path.read_text().split()[0]) for path in tasks) / 1e9

    def _settle(self) -> None:
        asleep = 0
        while self._workers and asleep < 4:
            states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in self._workers]
            asleep = asleep + 1 if set(states) == {"S"} else 0
            time.sleep(0.002)


class Bare:
    """The bare loop: in this process, or in several at once."""

    def __init__(self, case: Case, workers: int) -> None:
        self._here = None if workers else bare(case, case.turn, 1)
        self._pipes = []
        for worker in range(workers):
            mine, other = multiprocessing.Pipe()
            if not os.fork():
                _serve(bare(case, case.turn + worker, workers), other)
            self._pipes.append(mine)
        if self._here is not None:
            next(self._here)

    def turn(self, size: int) -> Turn:
        """With several processes each has as many."""
        if self._here is not None:
            return _looped(self._here, size)
        for pipe in self._pipes:
            pipe.send(size)
        turns = [pipe.recv() for pipe in self._pipes]
        return Turn(sum(t.samples for t in turns), sum(t.cpu for t in turns), max(t.wall for t in turns))

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(0)
            os.wait()


def _looped(batches: Endless, size: int) -> Turn:
    next(batches)  # reads
    cpu, wall = time.process_time(), time.perf_counter()
    samples = sum(len(batch.sample_ids) for batch in islice(batches, size))
    return Turn(samples, time.process_time() - cpu, time.perf_counter() - wall)


def _serve(batches: Endless, pipe: Any) -> None:
    next(batches)
    while size := pipe.recv():
        pipe.send(_looped(batches, size))
    os._exit(0)


def measure(case: Case, workers: int, rounds: int) -> dict[str, Any]:
    """All contestants in turn, `rounds` times, after one that does not count."""
    torch.set_num_threads(1)
    contestants: dict[str, Bare | Pipeline] = {"bare": Bare(case, workers), "ours": Pipeline(ours(case, workers))}
    if case.files is not None:
        contestants["webdataset"] = Pipeline(from_webdataset(case, workers))
        contestants["files"] = Pipeline(from_files(case, workers))
    found: dict[str, list[Turn]] = {name: [] for name in contestants}
    order = list(contestants)
    for number in range(rounds + 1):
        for name in order if number % 2 == 0 else order[::-1]:
            found[name].append(contestants[name].turn(case.turn))
    for contestant in contestants.values():
        contestant.close()
    limit = found["bare"][1:]
    return {name: _summary(turns[1:], limit) for name, turns in found.items()}


def _summary(turns: list[Turn], limit: list[Turn]) -> dict[str, float]:
    low, middle, high = quantiles([one.per_core / bare.per_core for one, bare in zip(turns, limit, strict=True)], n=4)
    samples = sum(one.samples for one in turns)
    return {
        "per_core": round(samples / sum(one.cpu for one in turns), 1),
        "per_second": round(samples / sum(one.wall for one in turns), 1),
        "of_bare_per_core": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
    }


def main() -> None:
    """Measure, print, and write JSON lines where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--note", default="", help="what else ran on the machine, which state of the code")
    parser.add_argument("--output", type=Path, help="append the results")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        for case in make_cases(arguments.shared, folder, arguments.case):
            for workers in arguments.workers:
                line = {"case": case.name, "workers": workers, "rounds": arguments.rounds}
                line |= measure(case, workers, arguments.rounds)
                line |= {"load": [round(load, 1) for load in os.getloadavg()], "note": arguments.note}
                print(json.dumps(line), flush=True)
                if arguments.output:
                    with arguments.output.open("a") as file:
                        file.write(json.dumps(line) + "\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

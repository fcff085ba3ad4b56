"""What is consumed by runs that are killed and go on with other ranks and workers: the trace of the uninterrupted one.

Here without a model, for every modality and for odd data sets; tests/cli/test_trace.py does it with training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megad2v.config.schema import Config, MicroBatchConfig, MixConfig
from megad2v.data.loader import TrainingLoader
from megad2v.modalities.batch import Batch
from megad2v.training.records import RunRecords
from tests.cli.live_run import lines
from tests.unit.data_helpers import config, jpeg, members, write_shards, write_tar
from tests.unit.speech_helpers import speech_config, write_speech
from tests.unit.text_helpers import story, text_config, write_text

M = 6
LIVES = (1, 3, 2)
"""Data-parallel ranks, one life after the other."""
WORKERS = ((0, 1, 4), (4, 0, 1), (1, 4, 0))
EPOCHS = 3


def images(folder: Path) -> Config:
    return config(write_shards(folder / "shards"))


def one_shard(folder: Path) -> Config:
    return config(write_tar(folder / "x.tar", members("x", 11)))


def shards_of_one(folder: Path) -> Config:
    for number in range(13):
        write_tar(folder / f"{number:02d}.tar", [("a.jpg", jpeg(number))])
    return config(folder)


def an_empty_shard(folder: Path) -> Config:
    write_tar(folder / "empty.tar", [])
    write_tar(folder / "labels.tar", [("0.cls", b"1")])
    return config(write_shards(folder))


def fewer_samples_than_m(folder: Path) -> Config:
    return config(write_tar(folder / "x.tar", members("x", M - 2)), micro_batch=MicroBatchConfig(samples=1))


def one_sample(folder: Path) -> Config:
    return config(write_tar(folder / "x.tar", members("x", 1)))


def speech(folder: Path) -> Config:
    return speech_config(write_speech(folder / "shards", [800 + 130 * number for number in range(40)]))


def text_blocks(folder: Path) -> Config:
    return text_config(write_text(folder / "shards", [story(20 + 9 * number, number) for number in range(40)]))


def mix(folder: Path) -> Config:
    for name, counts in {"small": (3, 2), "large": (9, 8)}.items():
        for number, samples in enumerate(counts):
            (folder / name).mkdir(exist_ok=True)
            write_tar(folder / name / f"{number}.tar", members(name, samples))
    parts = {"small": MixConfig(str(folder / "small"), 1.0), "large": MixConfig(str(folder / "large"), 2.0)}
    return config(None, mix=parts)


MAIN = (images, speech, text_blocks, mix)
ODD = (one_shard, shards_of_one, an_empty_shard, fewer_samples_than_m, one_sample)


def life(settings: Config, world: int, workers: int, start: int, stop: int) -> list[list[Batch]]:
    """[step][m] of all ranks."""
    settings = replace(settings, data=replace(settings.data, workers=workers))
    steps: list[list[Batch]] = [[None] * M for _ in range(start, stop)]  # type: ignore[list-item]
    for rank in range(world):
        with closing(TrainingLoader(settings, rank=rank, world=world, start_step=start)) as loader:
            for step, own in zip(steps, loader):
                step[rank::world] = own
    return steps


def trace(steps: list[list[Batch]]) -> str:
    """SHA-256 of ids, and hashes of crop and mask, in order; of what was dropped, too."""
    rows = [
        repr((step, m, batch.sample_ids, batch.fingerprints, batch.dropped))
        for step, batches in enumerate(steps)
        for m, batch in enumerate(batches)
    ]
    return sha256("\n".join(rows).encode()).hexdigest()


def steps_of(settings: Config) -> int:
    """So many that every set has had three epochs."""
    with closing(TrainingLoader(settings, rank=0, world=1, start_step=0)) as loader:
        return next(n for n in range(3, 1000) if min(loader.epochs(n).values()) >= EPOCHS)


def once_an_epoch(settings: Config, steps: list[list[Batch]]) -> None:
    """Each sample in each of the first three epochs of its set."""
    met: Counter[tuple[int, str]] = Counter()
    with closing(TrainingLoader(settings, rank=0, world=1, start_step=0)) as loader:
        for number, batch in enumerate(batch for step in steps for batch in step):
            rows = loader._batches._rows(number)
            gone = {sample for sample, _ in batch.dropped}
            epochs = {loader._shards.sample_id(index): epoch for epoch, index in rows}
            assert set(epochs) == {*batch.sample_ids, *gone}
            met.update((epoch, loader._shards.sample_id(index)) for epoch, index in rows)
        everything = {loader._shards.sample_id(index) for index in range(len(loader._shards))}
    assert set(met.values()) == {1}
    for epoch in range(EPOCHS):
        assert {sample for at, sample in met if at == epoch} == everything


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "data,workers", [*((images, workers) for workers in WORKERS), *zip(MAIN[1:], WORKERS, strict=True)]
)
def test_killed_and_resumed(data: Callable[[Path], Config], workers: tuple[int, ...], tmp_path: Path) -> None:
    _same_trace(data, workers, tmp_path)


@pytest.mark.parametrize("data", ODD)
def test_killed_and_resumed_on_odd_data(data: Callable[[Path], Config], tmp_path: Path) -> None:
    _same_trace(data, (0, 1, 0), tmp_path)


def _same_trace(data: Callable[[Path], Config], workers: tuple[int, ...], folder: Path) -> None:
    made = data(folder)
    settings = replace(made, train=replace(made.train, micro_batches_per_step=M))
    total = steps_of(settings)
    whole = life(settings, 1, 0, 0, total)
    once_an_epoch(settings, whole)
    steps: list[list[Batch]] = []
    for number, (world, own) in enumerate(zip(LIVES, workers, strict=True)):
        del steps[max(0, len(steps) - 1) :]  # killed a step after its last checkpoint
        stop = total * (number + 1) // len(LIVES)
        steps += life(settings, world, own, len(steps), stop)
    assert trace(steps) == trace(whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_micro_batch_with_nothing_left_on_one_rank(workers: int, tmp_path: Path) -> None:
    """One rank has the row of zeros, its neighbours and its next step what they would have had."""
    sound = config(write_tar(tmp_path / "x.tar", members("x", 30)))
    sound = replace(sound, train=replace(sound.train, micro_batches_per_step=M))
    total = steps_of(sound)
    whole = life(sound, 1, 0, 0, total)
    victims = whole[1][4].sample_ids  # of rank 1 of 3
    (tmp_path / "bad").mkdir()
    bad = {int(sample.rpartition("/")[2]) for sample in victims}
    broken = config(write_tar(tmp_path / "bad" / "x.tar", members("x", 30, bad)))
    broken = replace(broken, train=sound.train)
    steps = life(broken, 3, workers, 0, total)
    assert trace(steps) == trace(life(broken, 1, 0, 0, 2) + life(broken, 2, workers, 2, total))
    once_an_epoch(broken, steps)
    empty = steps[1][4]
    assert empty.sample_ids == () and [sample for sample, _ in empty.dropped] == list(victims)
    assert len(empty.inputs) == 1 and not empty.inputs.any() and empty.masked_count() == 0
    for mine, theirs in zip((b for step in steps for b in step), (b for step in whole for b in step), strict=True):
        kept = [i for i, sample in enumerate(theirs.sample_ids) if sample not in victims]
        assert mine.sample_ids == tuple(theirs.sample_ids[i] for i in kept)
        assert mine.fingerprints == tuple(theirs.fingerprints[i] for i in kept)


def test_traces_of_ranks_that_are_gone_end_where_the_run_resumes(tmp_path: Path) -> None:
    """Three ranks were killed behind step 5; two go on from step 4."""

    def records(rank: int, size: int, resumed_at: int) -> RunRecords:
        world = SimpleNamespace(rank=rank, size=size, data=SimpleNamespace(rank=rank, size=size))
        world.tensor = SimpleNamespace(rank=0, size=1)
        return RunRecords(tmp_path, world, trace=True, resumed_at=resumed_at)  # type: ignore[arg-type]

    batch = Batch("vision", torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 4, dtype=torch.bool))
    for size, first, last in ((3, 1, 5), (2, 5, 6)):
        for own in [records(rank, size, first - 1) for rank in range(size)]:
            for step in range(first, last + 1):
                own.consumed(step, [batch])
            own.close()
    steps = [[line["step"] for line in lines(tmp_path / "trace" / f"rank{rank}.jsonl")] for rank in range(3)]
    assert steps == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4]]

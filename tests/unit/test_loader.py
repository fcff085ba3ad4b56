"""The loader: the same stream for any ranks and workers, resumed anywhere; validation, probes, bad samples, deaths."""

from __future__ import annotations

import gc
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, replace
from hashlib import sha256
from itertools import islice
from multiprocessing import active_children
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

from megad2v.config.schema import Config, MicroBatchConfig, TrainConfig
from megad2v.data.format import DatasetInfo, ShardInfo, write_dataset
from megad2v.data.loader import FiniteBatches, TrainingLoader, labelled_batches, validation_batches
from megad2v.data.parcel import Parcel, Shelf
from megad2v.data.workers import WorkerDied
from megad2v.engine.guard import Seen
from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.modalities.speech.transforms import SpeechTransform
from megad2v.modalities.text.transforms import TextTransform
from megad2v.modalities.vision.transforms import VisionTransform
from megad2v.training.proposal import seen
from tests.unit.data_helpers import SHARDS, TOTAL, config, jpeg, write_shards, write_tar
from tests.unit.speech_helpers import speech_config, write_speech
from tests.unit.text_helpers import story, text_config, write_text

STEPS = 7  # 56 samples of 21: ends in the third epoch, in the middle of a window


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    if active_children():
        gc.collect()  # slow, and pytest may only keep a traceback alive
    assert active_children() == []


def consumed(settings: Config, world: int, start_step: int = 0, stop_step: int = STEPS) -> list[list[Batch]]:
    """What all ranks together consume: [step][m]."""
    micro_batches = settings.train.micro_batches_per_step
    steps: list[list[Batch | None]] = [[None] * micro_batches for _ in range(start_step, stop_step)]
    for rank in range(world):
        with closing(TrainingLoader(settings, rank=rank, world=world, start_step=start_step)) as loader:
            for step, own in zip(steps, loader):
                step[rank::world] = own
    assert all(batch is not None for step in steps for batch in step)
    return steps


def digest(steps: list[list[Batch]]) -> str:
    """Hash of every byte that a trainer could have looked at, in order."""
    total = sha256()
    for batch in (batch for step in steps for batch in step):
        total.update(repr((batch.sample_ids, batch.fingerprints, batch.dropped)).encode())
        for tensor in (batch.inputs, batch.mask_bmt, batch.labels):
            total.update(repr(tensor.shape).encode() + tensor.numpy().tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[list[Batch]]:
    return consumed(config(folder), world=1)


def ids(steps: list[list[Batch]]) -> list[str]:
    return [sample_id for step in steps for batch in step for sample_id in batch.sample_ids]


def test_every_sample_once_an_epoch(reference: list[list[Batch]], folder: Path) -> None:
    met = ids(reference)
    assert len(met) == STEPS * 8
    everything = Counter(f"{name}/{i:04d}" for name, count in SHARDS for i in range(count))
    assert Counter(met[:TOTAL]) == Counter(met[TOTAL : 2 * TOTAL]) == everything
    assert met[:TOTAL] != met[TOTAL : 2 * TOTAL]
    assert not Counter(met[2 * TOTAL :]) - everything
    loader = TrainingLoader(config(folder), rank=0, world=1, start_step=0)
    assert loader.epoch_size == TOTAL


def test_batches_are_what_the_model_expects(reference: list[list[Batch]]) -> None:
    for batch in (batch for step in reference for batch in step):
        assert batch.modality == "vision"
        assert (batch.inputs.dtype, batch.inputs.shape) == (torch.uint8, (2, 3, 32, 32))
        assert (batch.mask_bmt.dtype, batch.mask_bmt.shape) == (torch.bool, (2, 1, 16))
        assert batch.padding_bt is None
        assert 2 <= batch.masked_count() <= 16
        assert len(batch.fingerprints) == len(batch.sample_ids) == 2
        assert batch.labels.tolist() == [int(sample_id[-4:]) % 3 for sample_id in batch.sample_ids]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_same_bytes_for_any_ranks_and_workers(
    folder: Path, reference: list[list[Batch]], world: int, workers: int
) -> None:
    assert digest(consumed(config(folder, workers=workers), world)) == digest(reference)


def test_tensor_parallel_ranks_see_the_same(folder: Path) -> None:
    """Ranks of a tensor-parallel group ask for the same data-parallel share. What the guard compares of it (ids, crops,
    masks) is equal, whatever their global random state and their workers."""

    def read(data_rank: int, seed: int, workers: int) -> list[list[Seen]]:
        random.seed(seed)
        torch.manual_seed(seed)
        settings = config(folder, workers=workers)
        with closing(TrainingLoader(settings, rank=data_rank, world=2, start_step=0)) as loader:
            return [[seen(batch) for batch in step] for step in islice(loader, 3)]

    assert read(0, 1, 0) == read(0, 2, 2)
    assert read(0, 1, 0) != read(1, 1, 0)


@pytest.mark.parametrize("start,world,workers", [(1, 1, 0), (3, 2, 2), (6, 4, 0)])
def test_resume_is_the_uninterrupted_run(
    folder: Path, reference: list[list[Batch]], start: int, world: int, workers: int
) -> None:
    resumed = consumed(config(folder, workers=workers), world, start_step=start)
    assert digest(resumed) == digest(reference[start:])


def test_iterating_again_starts_again(folder: Path) -> None:
    with closing(TrainingLoader(config(folder, workers=1), rank=0, world=2, start_step=2)) as loader:
        first = next(iter(loader))
        assert digest([next(iter(loader))]) == digest([first])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_sample_is_dropped_and_nobody_shifts(tmp_path: Path, reference: list[list[Batch]], workers: int) -> None:
    broken = write_shards(tmp_path / "shards", bad={"b.tar": {2}})
    steps = consumed(config(broken, workers=workers), world=2)
    dropped = 0
    for mine, whole in zip([b for s in steps for b in s], [b for s in reference for b in s]):
        keep = [i for i, sample_id in enumerate(whole.sample_ids) if sample_id != "b.tar/0002"]
        assert mine.sample_ids == tuple(whole.sample_ids[i] for i in keep)
        assert mine.fingerprints == tuple(whole.fingerprints[i] for i in keep)
        if keep:
            assert (mine.inputs == whole.inputs[keep]).all()
            assert (mine.mask_bmt == whole.mask_bmt[keep]).all()
            assert (mine.labels == whole.labels[keep]).all()
        if len(keep) < 2:
            assert mine.dropped == (("b.tar/0002", "not a JPEG, PNG or WebP image"),)
            dropped += 1
        else:
            assert mine.dropped == ()
    assert dropped >= 2, "once an epoch"


def is_row_of_zeros(batch: Batch) -> bool:
    assert batch.inputs.shape == (1, 3, 32, 32)
    assert batch.mask_bmt.shape == (1, 1, 16)
    assert batch.inputs.dtype == torch.uint8
    return not batch.inputs.any() and batch.masked_count() == 0 and batch.sample_ids == () == batch.fingerprints


def test_micro_batch_with_nothing_left(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("0.jpg", b"junk"), ("1.jpg", b"")])
    with closing(TrainingLoader(config(tar), rank=0, world=1, start_step=0)) as loader:
        step = next(iter(loader))
    assert all(is_row_of_zeros(batch) and len(batch.dropped) == 2 for batch in step)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("samples,workers", [(2, 0), (4, 2), (100, 0)])
def test_validation(folder: Path, world: int, samples: int, workers: int) -> None:
    settings = config(None, valid=str(folder), micro_batch=MicroBatchConfig(samples=samples), workers=workers)
    ranks = [validation_batches(settings, rank=rank, world=world) for rank in range(world)]
    passes = [[list(rank) for rank in ranks] for _ in range(1 if workers else 2)]
    assert len({len(rank) for rank in ranks}) == 1, "ranks that run unequally often would hang"
    rows: dict[str, str] = {}
    for own, rank in zip(passes[0], ranks):
        assert len(own) == len(rank)
        for batch in own:
            assert batch.sample_ids or is_row_of_zeros(batch)
            for sample_id, fingerprint in zip(batch.sample_ids, batch.fingerprints):
                assert sample_id not in rows, "met twice"
                rows[sample_id] = fingerprint
    assert len(rows) == TOTAL
    assert sum(rank.samples for rank in ranks) == TOTAL
    alone = validation_batches(config(None, valid=str(folder)), rank=0, world=1)
    assert rows == {k: v for batch in alone for k, v in zip(batch.sample_ids, batch.fingerprints)}
    for again in passes[1:]:
        assert digest(again) == digest(passes[0]), "a second pass is the same"


def test_leaving_validation_early_ends_its_workers(folder: Path) -> None:
    batches = validation_batches(config(None, valid=str(folder), workers=2), rank=0, world=1)
    assert len(list(islice(iter(batches), 2))) == 2


def labelled(pattern: Path) -> FiniteBatches:
    return labelled_batches(str(pattern), config(None), 8, 0)


def test_labelled(folder: Path, tmp_path: Path) -> None:
    batches = labelled(folder)
    rows = [(i, y) for batch in batches for i, y in zip(batch.sample_ids, batch.labels.tolist())]
    assert rows == [(f"{name}/{i:04d}", i % 3) for name, count in SHARDS for i in range(count)]
    assert batches.classes == ("0", "1", "2")
    assert all(batch.masked_count() == 0 for batch in batches)
    named = write_shards(tmp_path / "named")
    shards = tuple(ShardInfo(name, count, 1, "") for name, count in SHARDS)
    write_dataset(named, DatasetInfo(("vision",), TOTAL, shards, classes=("cat", "dog", "eel")))
    assert labelled(named).classes == ("cat", "dog", "eel")
    write_dataset(named, DatasetInfo(("vision",), TOTAL, shards, classes=("cat", "dog")))
    with pytest.raises(UserError, match="class id 2 has no name"):
        labelled(named)


@pytest.mark.parametrize("label", [None, b"cat", b"-3", b""])
def test_probe_needs_labels(tmp_path: Path, label: bytes | None) -> None:
    rows = [("0.jpg", jpeg(0)), ("0.cls", b"1"), ("1.jpg", jpeg(1))] + ([] if label is None else [("1.cls", label)])
    tar = write_tar(tmp_path / "x.tar", rows)
    with pytest.raises(UserError, match=r"x\.tar/1: has no class id"):
        labelled(tar)
    with closing(TrainingLoader(config(tar), rank=0, world=1, start_step=0)) as loader:
        assert next(iter(loader))[0].labels.min() == -1, "training does not ask for labels"


@pytest.mark.parametrize(
    "change,message",
    [
        ({"shards": None}, r"data\.shards: not set"),
        ({"shards": {"speech": "x"}}, r"data\.shards: has no entry for modality vision, only for speech"),
        ({"window": 0}, r"data\.window"),
        ({"workers": -1}, r"data\.workers"),
    ],
)
def test_wrong_keys(folder: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainingLoader(config(folder, **change), rank=0, world=1, start_step=0)
    with pytest.raises(UserError, match=r"train\.micro_batches_per_step"):
        TrainingLoader(config(folder), rank=0, world=3, start_step=0)


def test_map_of_modalities(folder: Path) -> None:
    loader = TrainingLoader(config(folder, shards={"vision": str(folder)}), rank=0, world=1, start_step=0)
    assert loader.epoch_size == TOTAL


def test_seed_changes_order(folder: Path, reference: list[list[Batch]]) -> None:
    settings = replace(config(folder), train=TrainConfig(micro_batches_per_step=4, seed=4))
    assert ids(consumed(settings, 1)) != ids(reference)


@pytest.mark.parametrize("workers", [0, 2])
def test_shard_that_vanishes_is_one_clear_line(tmp_path: Path, workers: int) -> None:
    shards = write_shards(tmp_path / "shards")
    loader = TrainingLoader(config(shards, workers=workers), rank=0, world=1, start_step=0)
    for name, _ in SHARDS:
        (shards / name).unlink()
    with pytest.raises(UserError, match=r"[abc]\.tar: cannot be read") as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)


def recordings(folder: Path) -> Config:
    return speech_config(write_speech(folder, [900 + 100 * number for number in range(12)]), workers=2)


def texts(folder: Path) -> Config:
    return text_config(write_text(folder, [story(150, number) for number in range(12)]), workers=2)


@pytest.mark.parametrize("data,transform", [(recordings, SpeechTransform), (texts, TextTransform)])
def test_killed_worker_names_its_recording_or_row(
    data: Callable[[Path], Config], transform: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = data(tmp_path / "shards")
    with closing(TrainingLoader(settings, rank=0, world=1, start_step=0)) as loader:
        victim = next(iter(loader))[1].sample_ids[0]
    original = transform.__call__

    def lethal(self: Any, data: bytes, sample_id: str, epoch: int) -> object:
        if sample_id == victim:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, data, sample_id, epoch)

    monkeypatch.setattr(transform, "__call__", lethal)
    with closing(TrainingLoader(settings, rank=0, world=1, start_step=0)) as loader:
        with pytest.raises(WorkerDied, match=f"while reading .*{re.escape(victim)}"):
            next(iter(loader))


@pytest.mark.parametrize("inline,pieces", [(0, 1), (0, 0), (10**9, 1)])
def test_parcel_holds_the_batch(
    reference: list[list[Batch]], inline: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the pipe, and through shared memory, of the shelf or not; every tensor, aligned, and it can be written
    to."""
    monkeypatch.setattr("megad2v.data.parcel.INLINE_BYTES", inline)
    batch = replace(reference[0][0], padding_bt=torch.tensor([[False] * 15 + [True]] * 2))
    shelf = Shelf(1, pieces)
    parcel = Parcel.of(batch, shelf, 0)
    assert isinstance(parcel.content, torch.Tensor) == (inline == 0)
    assert (parcel.piece is not None) == (inline == 0 and pieces > 0)
    assert not any(isinstance(getattr(parcel.rest, field.name), torch.Tensor) for field in fields(batch))
    opened = ForkingPickler.loads(ForkingPickler.dumps(parcel)).open()
    for field in fields(batch):
        mine, theirs = getattr(opened, field.name), getattr(batch, field.name)
        if isinstance(theirs, torch.Tensor):
            assert mine.dtype == theirs.dtype and mine.equal(theirs) and mine.is_contiguous()
            assert mine.data_ptr() % theirs.dtype.itemsize == 0
            mine.fill_(1)
        else:
            assert mine == theirs


def test_pieces_are_used_again_when_nobody_refers_to_them(
    reference: list[list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megad2v.data.parcel.INLINE_BYTES", 0)
    monkeypatch.setattr("megad2v.data.parcel.GRAIN_BYTES", 1)
    first, second = reference[0][0], reference[0][1]
    large = replace(first, inputs=first.inputs.repeat(3, 1, 1, 1))
    shelf = Shelf(2, 2)

    def sent(batch: Batch, worker: int = 0) -> Parcel:
        return ForkingPickler.loads(ForkingPickler.dumps(Parcel.of(batch, shelf, worker)))

    parcel = sent(first)
    assert parcel.piece == (shelf.name, 0, 0) and parcel.content is not None
    inputs = parcel.open().inputs  # all that is left of the batch
    assert sent(second, 1).piece == (shelf.name, 1, 0), "each worker has pieces of its own"
    other = sent(large)
    assert other.piece == (shelf.name, 0, 1)
    kept = other.open()
    thrown_away = sent(second)
    assert thrown_away.piece is None and thrown_away.open().inputs.equal(second.inputs)
    assert inputs.equal(first.inputs) and kept.inputs.equal(large.inputs), "nobody wrote there meanwhile"
    view = inputs[1:, :, 3]
    del inputs
    assert sent(second).piece is None, "a view is a reference"
    del view
    again = sent(second)
    assert again.piece == (shelf.name, 0, 0) and again.content is None, "only its number is sent"
    assert again.open().inputs.equal(second.inputs)
    grown = sent(large)
    assert grown.piece == (shelf.name, 0, 0) and grown.content is not None, "too small for this one"
    assert grown.open().inputs.equal(large.inputs) and kept.inputs.equal(large.inputs)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # which needs a GPU
    pinned = sent(first)
    assert pinned.piece == (shelf.name, 0, 0)
    pinned = pinned.pin_memory()
    assert sent(second).piece == (shelf.name, 0, 0), "free as soon as it is copied"
    assert pinned.piece is None and pinned.open().inputs.equal(first.inputs)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_stay_as_they_are(
    workers: int, folder: Path, reference: list[list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there are pieces, with others in between that are let go of."""
    monkeypatch.setattr("megad2v.data.parcel.INLINE_BYTES", 0)
    kept, others = [], []
    with closing(TrainingLoader(config(folder, workers=workers), rank=0, world=1, start_step=0)) as loader:
        for number, step in enumerate(islice(loader, STEPS)):
            if number % 2:
                others.append(digest([step]))
            else:
                kept.append(step)
    del step
    assert digest(kept) == digest(reference[::2])
    assert others == [digest([step]) for step in reference[1::2]]


def test_killed_worker_names_its_sample(
    folder: Path, reference: list[list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = reference[0][0].sample_ids[1]
    original = VisionTransform.__call__

    def lethal(self: VisionTransform, data: bytes, sample_id: str, epoch: int) -> object:
        if sample_id == victim:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, data, sample_id, epoch)

    monkeypatch.setattr(VisionTransform, "__call__", lethal)  # workers are forked, so they get it
    loader = TrainingLoader(config(folder, workers=2), rank=0, world=1, start_step=0)
    with pytest.raises(WorkerDied, match=f"while reading .*{victim}"):
        next(iter(loader))
    loader.close()


def test_signals_to_the_group_leave_workers_alive(folder: Path, reference: list[list[Batch]]) -> None:
    """A scheduler's warning reaches workers too; the trainer still needs them until it has saved."""
    with closing(TrainingLoader(config(folder, workers=2), rank=0, world=1, start_step=0)) as loader:
        steps = iter(loader)
        met = [next(steps)]
        for child in active_children():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(child.pid, number)
        met += islice(steps, STEPS - 1)
        steps.close()
    assert digest(met) == digest(reference)


def test_work_can_be_sent_to_spawned_workers(folder: Path) -> None:
    """Where processes are not forked (Python 3.14), everything that a worker needs is pickled."""
    loader = TrainingLoader(config(folder), rank=0, world=1, start_step=0)
    before = loader._batches[5]
    sent = ForkingPickler.loads(ForkingPickler.dumps(loader._batches))
    assert digest([[sent[5]]]) == digest([[before]])


def test_program_that_never_closes_its_loader_ends(folder: Path) -> None:
    program = (
        "import sys, megad2v.data.make; from megad2v.data.loader import TrainingLoader\n"
        "from tests.unit.data_helpers import config\n"
        "loader = TrainingLoader(config(sys.argv[1], workers=2), rank=0, world=1, start_step=0)\n"
        "steps = iter(loader); print(len(next(steps)))\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "4"), done.stderr
    assert "Error" not in done.stderr

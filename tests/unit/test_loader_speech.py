"""The loader on shards of speech, from FLAC bytes to batches: same stream for any ranks and workers, nothing lost."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megad2v.config.schema import Config, MicroBatchConfig
from megad2v.data.loader import TrainingLoader, labelled_batches, validation_batches
from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.modalities.speech.geometry import frame_count
from tests.unit.speech_helpers import LAYERS, speech_config, write_speech

STEPS = 8
SHORT, LONG = 800, 6400
"""speech.min_seconds and max_seconds of `speech_config` in samples."""
LENGTHS = [*np.random.default_rng(0).integers(500, 9000, 60).tolist(), SHORT, SHORT - 1, LONG, LONG + 1]
KEPT = [f"{number:04d}" for number, length in enumerate(LENGTHS) if length >= SHORT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech(tmp_path_factory.mktemp("speech") / "shards", LENGTHS)


def consumed(settings: Config, world: int = 1, start_step: int = 0) -> list[Batch]:
    """What all ranks together consume, in the order of (step, m)."""
    steps: list[list[Batch | None]] = [[None] * 4 for _ in range(start_step, STEPS)]
    for rank in range(world):
        with closing(TrainingLoader(settings, rank=rank, world=world, start_step=start_step)) as loader:
            for step, own in zip(steps, loader):
                step[rank::world] = own
    return [batch for step in steps for batch in step if batch is not None]


def keys(batches: list[Batch]) -> list[str]:
    return [sample_id.partition("/")[2] for batch in batches for sample_id in batch.sample_ids]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        (a.sample_ids, a.fingerprints, a.dropped) == (b.sample_ids, b.fingerprints, b.dropped)
        and torch.equal(a.inputs, b.inputs)
        and torch.equal(a.mask_bmt, b.mask_bmt)
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[Batch]:
    return consumed(speech_config(folder))


def test_shards_are_several(folder: Path) -> None:
    assert len(list(folder.glob("*.tar"))) > 5


def test_every_recording_once_an_epoch(folder: Path, reference: list[Batch]) -> None:
    with closing(TrainingLoader(speech_config(folder), rank=0, world=1, start_step=0)) as loader:
        assert loader.epoch_size == len(KEPT)
        short = len(LENGTHS) - len(KEPT)
        assert loader.remarks[0] == (
            f"data.shards: {short} of {len(LENGTHS)} recordings, shorter than 0.05 s, are left out"
        )
        epoch = int(loader.remarks[1].split()[4])
    assert loader.remarks[1].endswith(f" length buckets, {epoch} micro-batches an epoch") and epoch < 4 * STEPS
    assert Counter(keys(reference[:epoch])) == Counter(KEPT)


def test_batches_are_what_the_model_expects(reference: list[Batch]) -> None:
    lengths = dict(zip((f"{n:04d}" for n in range(len(LENGTHS))), LENGTHS, strict=True))
    for batch in reference:
        own = [min(LONG, lengths[key]) for key in keys([batch])]
        assert batch.inputs.shape == (len(own), min(own)) and batch.inputs.dtype == torch.float32
        assert max(own) <= 1.3 * min(own) + 2
        assert batch.inputs.shape[0] * max(own) <= 16_000
        assert batch.mask_bmt.shape == (len(own), 1, frame_count(min(own), LAYERS))
        assert batch.padding_bt is None and not batch.dropped
        assert len(batch.fingerprints) == len(own)
        assert batch.labels.tolist() == [int(key) % 3 for key in keys([batch])]
    assert len({batch.inputs.shape[1] for batch in reference[:4]}) > 2, "neighbours differ in length"


@pytest.mark.parametrize("world,workers,start", [(2, 0, 0), (4, 0, 0), (1, 2, 0), (2, 1, 3)])
def test_same_stream_for_any_ranks_workers_and_restarts(
    folder: Path, reference: list[Batch], world: int, workers: int, start: int
) -> None:
    assert same(consumed(speech_config(folder, workers=workers), world, start), reference[4 * start :])


def test_fixed_number_of_recordings(folder: Path) -> None:
    batches = consumed(speech_config(folder, micro_batch=MicroBatchConfig(samples=3)))
    assert max(len(batch.sample_ids) for batch in batches) == 3
    assert set(keys(batches)) == set(KEPT)


def test_bad_recording_is_dropped(tmp_path: Path, reference: list[Batch]) -> None:
    broken = write_speech(tmp_path / "shards", LENGTHS, bad=(5,))
    batches = consumed(speech_config(broken))
    dropped = [batch.dropped for batch in batches if batch.dropped]
    assert dropped and {sample_id.partition("/")[2] for pairs in dropped for sample_id, _ in pairs} == {"0005"}
    assert Counter(keys(batches)) == Counter(key for key in keys(reference) if key != "0005")


def test_micro_batch_with_nothing_left(tmp_path: Path) -> None:
    tar = write_speech(tmp_path / "shards", [1000, 1000], bad=(0, 1))
    with closing(TrainingLoader(speech_config(tar), rank=0, world=1, start_step=0)) as loader:
        batch = next(iter(loader))[0]
    assert batch.inputs.shape == (1, SHORT) and not batch.sample_ids and batch.masked_count() == 0
    assert len(batch.dropped) == 2


@pytest.mark.parametrize("world", [1, 3])
def test_validation(folder: Path, world: int) -> None:
    settings = speech_config(valid=str(folder))
    ranks = [validation_batches(settings, rank=rank, world=world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert Counter(keys(batches)) == Counter(KEPT)
    assert all(batch.inputs.numel() <= 16_000 for batch in batches)
    assert any(batch.padding_bt is not None for batch in batches)
    assert ranks[0].remarks[0].startswith("data.valid: ")
    alone = validation_batches(
        speech_config(valid=str(folder), micro_batch=MicroBatchConfig(samples=1)), rank=0, world=1
    )
    prints = {batch.sample_ids[0]: batch.fingerprints[0] for batch in alone}
    assert prints == {
        sample_id: print_
        for batch in batches
        for sample_id, print_ in zip(batch.sample_ids, batch.fingerprints, strict=True)
    }, "crops and masks are those of any other batching"


def test_probe_has_all_recordings_with_labels(folder: Path) -> None:
    batches = labelled_batches(str(folder), speech_config(), 10, 0)
    rows = [(key, label) for batch in batches for key, label in zip(keys([batch]), batch.labels.tolist(), strict=True)]
    assert rows == [(f"{number:04d}", number % 3) for number in range(len(LENGTHS))]
    assert batches.classes == ("a", "b", "c")
    assert not any(batch.mask_bmt.any() for batch in batches)


def test_nothing_long_enough(folder: Path) -> None:
    settings = speech_config(folder)
    settings = replace(settings, speech=replace(settings.speech, min_seconds=1.0, max_seconds=1.0))
    with pytest.raises(UserError, match=r"data\.shards: all 64 recordings are shorter than speech\.min_seconds, 1;"):
        TrainingLoader(settings, rank=0, world=1, start_step=0)


def test_fingerprint_knows_lengths(folder: Path, tmp_path: Path) -> None:
    """The order follows from them, so a resumed run has to be told."""
    other = write_speech(tmp_path / "shards", [length + (length > 4000) for length in LENGTHS])
    loaders = [TrainingLoader(speech_config(path), rank=0, world=1, start_step=0) for path in (folder, folder, other)]
    assert loaders[0].fingerprint == loaders[1].fingerprint != loaders[2].fingerprint

"""The loader of a joint run: each modality's own stream, dealt out by turns, for any ranks, workers and restarts."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from megad2v.config.parts import of_modality
from megad2v.config.schema import Config
from megad2v.config.validate import validate
from megad2v.data.loader import TrainingLoader, validation_batches
from megad2v.data.workers import WorkerDied
from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.modalities.text.transforms import TextTransform
from tests.unit.joint_helpers import WEIGHTS, joint_config, singles, write_all
from tests.unit.speech_helpers import write_speech
from tests.unit.text_helpers import write_text

STEPS = 24
Step = list[Batch]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_all(tmp_path_factory.mktemp("joint"))


@pytest.fixture(scope="module")
def reference(shards: dict[str, str]) -> list[Step]:
    return consumed(joint_config(shards), STEPS)


def consumed(settings: Config, stop: int, *, start: int = 0, world: int = 1) -> list[Step]:
    """What all ranks together consume: [step][m]."""
    steps: list[list[Batch | None]] = [[None] * 4 for _ in range(start, stop)]
    for rank in range(world):
        with closing(TrainingLoader(settings, rank=rank, world=world, start_step=start)) as loader:
            for step, own in zip(steps, loader):
                step[rank::world] = own
    assert all(batch is not None for step in steps for batch in step)
    return steps  # type: ignore[return-value]


def tensors(batch: Batch) -> Iterator[torch.Tensor | None]:
    yield from (batch.inputs, batch.mask_bmt, batch.padding_bt, batch.labels)


def same(one: list[Step], other: list[Step]) -> bool:
    """To the byte: ids, crops, masks, padding, labels, and what was dropped."""
    if [len(step) for step in one] != [len(step) for step in other]:
        return False
    for a, b in zip((a for step in one for a in step), (b for step in other for b in step), strict=True):
        if (a.modality, a.sample_ids, a.fingerprints, a.dropped) != (
            b.modality,
            b.sample_ids,
            b.fingerprints,
            b.dropped,
        ):
            return False
        for x, y in zip(tensors(a), tensors(b), strict=True):
            if (x is None) != (y is None) or (x is not None and y is not None and not torch.equal(x, y)):
                return False
    return True


def turns(settings: Config, steps: int) -> list[tuple[str, int]]:
    with closing(TrainingLoader(settings, rank=0, world=1, start_step=0)) as loader:
        return [loader.turn(step) for step in range(steps)]


def test_the_configuration_is_one_that_a_run_accepts(shards: dict[str, str]) -> None:
    validate(joint_config(shards, valid=shards))
    validate(joint_config(shards, {"text": 0.5}))


def test_steps_are_those_of_runs_of_one_modality(shards: dict[str, str], reference: list[Step]) -> None:
    """The same ids, crops, masks and drops, step by step, as independent loaders of one modality give."""
    dealt = turns(joint_config(shards), STEPS)
    assert {modality for modality, _ in dealt} == set(WEIGHTS)
    for name, alone in singles(shards).items():
        mine = [step for step, (modality, _) in zip(reference, dealt, strict=True) if modality == name]
        assert [own for modality, own in dealt if modality == name] == list(range(len(mine)))
        assert len(mine) > 3 and same(mine, consumed(alone, len(mine)))
        assert all(batch.modality == name for step in mine for batch in step)
    dropped = {(batch.modality, bad) for step in reference for batch in step for bad, _ in batch.dropped}
    assert ("vision", "b.tar/0002") in dropped and {modality for modality, _ in dropped} == set(WEIGHTS)


@pytest.mark.parametrize("start,world,workers", [(0, 2, 0), (0, 4, 0), (0, 1, 2), (7, 2, 2), (13, 4, 0), (23, 1, 0)])
def test_same_steps_for_any_ranks_workers_and_restarts(
    shards: dict[str, str], reference: list[Step], start: int, world: int, workers: int
) -> None:
    settings = joint_config(shards, workers=workers)
    assert same(consumed(settings, STEPS, start=start, world=world), reference[start:])


def test_resume_at_every_step(shards: dict[str, str], reference: list[Step]) -> None:
    for start in range(STEPS):
        assert same(consumed(joint_config(shards), start + 1, start=start), reference[start : start + 1])


def test_of_one_modality(shards: dict[str, str]) -> None:
    """The stream of a run of that modality, though written as a joint one."""
    settings = joint_config(shards, {"text": 0.5})
    assert same(consumed(settings, 6), consumed(singles(shards)["text"], 6))
    assert turns(settings, 80) == [("text", step) for step in range(80)] == turns(singles(shards)["text"], 80)


def test_a_subset_reads_nothing_of_the_others(shards: dict[str, str]) -> None:
    settings = joint_config({**shards, "speech": "/nowhere"}, {"vision": 1.0, "text": 1.0})
    assert {batch.modality for step in consumed(settings, 8) for batch in step} == {"vision", "text"}


def test_what_people_are_told(shards: dict[str, str]) -> None:
    with closing(TrainingLoader(joint_config(shards), rank=0, world=1, start_step=0)) as loader:
        alone = {name: TrainingLoader(one, rank=0, world=1, start_step=0) for name, one in singles(shards).items()}
        assert loader.epoch_size == sum(one.epoch_size for one in alone.values())
        counts = {name: [loader.turn(step)[0] for step in range(100)].count(name) for name in WEIGHTS}
        assert loader.epochs(100) == {name: one.epochs(counts[name])[""] for name, one in alone.items()}
        assert loader.remarks[:2] == [
            "joint: vision takes 50.000% of the updates, 21 samples",
            "joint: speech takes 33.333% of the updates, 30 samples",
        ]
        for name, one in alone.items():
            for remark in one.remarks:
                assert remark.replace("data.shards", f"data.shards.{name}") in loader.remarks
        assert len(loader.remarks) == 3 + sum(len(one.remarks) for one in alone.values())


def test_fingerprint_covers_shards_modalities_and_ratios(shards: dict[str, str], tmp_path: Path) -> None:
    def of(settings: Config) -> str:
        with closing(TrainingLoader(settings, rank=0, world=1, start_step=0)) as loader:
            return loader.fingerprint

    first = of(joint_config(shards))
    assert first == of(joint_config(shards, {name: 2 * weight for name, weight in WEIGHTS.items()}))
    longer = write_speech(tmp_path / "speech", [901 + 170 * number for number in range(30)])
    others = {
        of(joint_config(shards, {**WEIGHTS, "text": 2.0})),
        of(joint_config(shards, {"vision": 3.0, "speech": 2.0})),
        of(joint_config({**shards, "speech": str(longer)})),
    }
    assert len(others) == 3 and first not in others


def test_seed_changes_turns(shards: dict[str, str]) -> None:
    settings = joint_config(shards)
    other = replace(settings, train=replace(settings.train, seed=4))
    assert turns(settings, STEPS) != turns(other, STEPS)


@pytest.mark.parametrize("workers", [0, 2])
def test_emptied_micro_batch_is_of_its_modality(shards: dict[str, str], tmp_path: Path, workers: int) -> None:
    broken = {**shards, "text": str(write_text(tmp_path / "text", [b"no .npy", b"nor this"]))}
    steps = consumed(joint_config(broken, workers=workers), STEPS)
    for (modality, _), step in zip(turns(joint_config(broken), STEPS), steps, strict=True):
        assert [batch.modality for batch in step] == [modality] * 4
        for batch in step if modality == "text" else []:
            assert batch.sample_ids == () and batch.inputs.shape == (1, 2, 2) and batch.masked_count() == 0
            assert len(batch.dropped) == 2


def test_killed_worker_names_its_sample(
    shards: dict[str, str], reference: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its modality, as file names of two may be equal."""
    victim = next(batch.sample_ids[0] for step in reference for batch in step if batch.modality == "text")
    original = TextTransform.__call__

    def lethal(self: TextTransform, data: bytes, sample_id: str, epoch: int) -> object:
        if sample_id == victim:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, data, sample_id, epoch)

    monkeypatch.setattr(TextTransform, "__call__", lethal)
    with closing(TrainingLoader(joint_config(shards, workers=2), rank=0, world=1, start_step=0)) as loader:
        with pytest.raises(WorkerDied, match=f"while reading .*text:{re.escape(victim)}"):
            list(islice(loader, STEPS))


def test_work_can_be_sent_to_spawned_workers(shards: dict[str, str]) -> None:
    loader = TrainingLoader(joint_config(shards), rank=0, world=1, start_step=0)
    sent = ForkingPickler.loads(ForkingPickler.dumps(loader._batches))
    for number in (0, 5, 41):
        mine, theirs = sent[number], loader._batches[number]
        assert isinstance(mine, Batch) and isinstance(theirs, Batch) and same([[mine]], [[theirs]])
    loader.close()


def test_validation_of_each(shards: dict[str, str]) -> None:
    """One pass for each modality, by its view; the map of patterns is looked up."""
    settings = joint_config(shards, valid=shards)
    for name, alone in singles(shards).items():
        alone = replace(alone, data=replace(alone.data, valid=shards[name]))
        mine = list(validation_batches(of_modality(settings, name), rank=0, world=1))
        assert same([mine], [list(validation_batches(alone, rank=0, world=1))])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"text": "/nowhere/text-*.tar"}, r"^data\.shards\.text: "),
        ({"speech": ""}, r"^data\.shards\.speech: not set"),
    ],
)
def test_wrong_patterns_name_their_modality(shards: dict[str, str], change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        TrainingLoader(joint_config({**shards, **change}), rank=0, world=1, start_step=0)
    assert "\n" not in str(caught.value)

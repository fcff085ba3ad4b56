"""The loader on shards of text, from .npy bytes to batches: same stream for any ranks and workers, nothing lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megad2v.config.schema import Config, MicroBatchConfig
from megad2v.data.blocks import BlockSet
from megad2v.data.loader import TrainingLoader, labelled_batches, validation_batches
from megad2v.data.shardset import RawSample
from megad2v.modalities.batch import Batch
from megad2v.modalities.sample import BadSample
from megad2v.modalities.text.decode import write_tokens
from tests.unit.text_helpers import document, story, text_config, write_text

STEPS = 12
LENGTHS = [*np.random.default_rng(0).integers(1, 400, 40).tolist(), 1, 62, 63, 64]
DOCUMENTS = [story(length, seed) for seed, length in enumerate(LENGTHS)]
ROOM = 63
BLOCKS = ("complete_doc", "document")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "shards", DOCUMENTS)


def consumed(settings: Config, world: int = 1, start_step: int = 0, steps: int = STEPS) -> list[Batch]:
    """What all ranks together consume, in the order of (step, m)."""
    made: list[list[Batch | None]] = [[None] * 4 for _ in range(start_step, steps)]
    for rank in range(world):
        with closing(TrainingLoader(settings, rank=rank, world=world, start_step=start_step)) as loader:
            for step, own in zip(made, loader):
                step[rank::world] = own
    return [batch for step in made for batch in step if batch is not None]


def keys(batches: list[Batch]) -> list[str]:
    return [sample_id.partition("/")[2] for batch in batches for sample_id in batch.sample_ids]


def rows(batches: list[Batch]) -> Iterator[tuple[str, list[int]]]:
    """(key, what a teacher that sees everything sees, without `<s>` and padding)"""
    for batch in batches:
        for key, ids in zip(keys([batch]), batch.inputs[:, 0].tolist(), strict=True):
            assert ids[0] == 0
            yield key, [i for i in ids[1:] if i != 1]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        (a.sample_ids, a.fingerprints, a.dropped) == (b.sample_ids, b.fingerprints, b.dropped)
        and torch.equal(a.inputs, b.inputs)
        and torch.equal(a.mask_bmt, b.mask_bmt)
        for a, b in zip(one, other, strict=True)
    )


def settings_for(folder: Path, blocks: str) -> Config:
    return text_config(folder, text={"blocks": blocks})


def epoch_of(settings: Config) -> tuple[int, int, list[str]]:
    """(samples, micro-batches, remarks)"""
    with closing(TrainingLoader(settings, rank=0, world=1, start_step=0)) as loader:
        return loader.epoch_size, int(loader.remarks[-1].split()[4]), loader.remarks


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, list[Batch]]:
    return {blocks: consumed(settings_for(folder, blocks)) for blocks in BLOCKS}


def test_every_token_once_an_epoch(folder: Path, references: dict[str, list[Batch]]) -> None:
    """complete_doc: the blocks of a document, in order, are the document."""
    size, epoch, remarks = epoch_of(settings_for(folder, "complete_doc"))
    assert remarks[0] == f"data.shards: {size:,} rows of text, {sum(LENGTHS) + size:,} tokens an epoch, `<s>` included"
    assert len(remarks) == 2 and remarks[1].endswith(f" length buckets, {epoch} micro-batches an epoch")
    assert epoch < 4 * STEPS
    met = list(rows(references["complete_doc"][:epoch]))
    assert len(met) == size
    for number, tokens in enumerate(DOCUMENTS):
        own = {int(key[5:]): ids for key, ids in met if key.startswith(f"{number:04d}:")}
        assert [i for start in sorted(own) for i in own[start]] == tokens.tolist()
        assert all(ids[-1] == 2 for ids in own.values()), "whole sentences"


def test_every_document_once_an_epoch(folder: Path, references: dict[str, list[Batch]]) -> None:
    size, epoch, remarks = epoch_of(settings_for(folder, "document"))
    longer = sum(length > ROOM for length in LENGTHS)
    assert remarks[1].startswith(f"data.shards: {longer} of {len(LENGTHS)} documents are longer than text.max_tokens: ")
    met = list(rows(references["document"][:epoch]))
    assert size == len(met) == len(DOCUMENTS) and epoch < 4 * STEPS
    for key, ids in met:
        tokens = DOCUMENTS[int(key)].tolist()
        assert len(ids) == min(ROOM, len(tokens))
        assert any(tokens[start : start + len(ids)] == ids for start in range(len(tokens) - len(ids) + 1))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_batches_are_what_the_model_expects(references: dict[str, list[Batch]], blocks: str) -> None:
    for batch in references[blocks]:
        lengths = [len(ids) + 1 for _, ids in rows([batch])]
        assert batch.inputs.shape == (len(lengths), 2, max(lengths)) and batch.inputs.dtype == torch.int64
        assert batch.inputs.shape[0] * batch.inputs.shape[2] <= 256, "the budget counts padding"
        assert max(lengths) <= 1.3 * min(lengths) + 1
        assert batch.mask_bmt.shape == (len(lengths), 1, max(lengths)) and not batch.dropped
        assert (batch.padding_bt is None) == (len(set(lengths)) == 1)
        assert len(batch.fingerprints) == len(lengths)
        assert batch.labels is not None
        assert batch.labels.tolist() == [int(key[:4]) % 3 for key in keys([batch])]
    assert len({batch.inputs.shape[2] for batch in references[blocks][:8]}) > 2, "neighbours differ in length"


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("world,workers,start", [(2, 0, 0), (4, 0, 5), (1, 2, 0), (2, 1, 3)])
def test_same_stream_for_any_ranks_workers_and_restarts(
    folder: Path, references: dict[str, list[Batch]], blocks: str, world: int, workers: int, start: int
) -> None:
    settings = settings_for(folder, blocks)
    settings = replace(settings, data=replace(settings.data, workers=workers))
    assert same(consumed(settings, world, start), references[blocks][4 * start :])


def test_epochs_differ(folder: Path) -> None:
    settings = settings_for(folder, "complete_doc")
    _, epoch, _ = epoch_of(settings)
    batches = consumed(settings, steps=-(-2 * epoch // 4))
    one, two = batches[:epoch], batches[epoch : 2 * epoch]
    assert keys(one) != keys(two) and Counter(keys(one)) == Counter(keys(two))
    prints = [
        {key: print_ for batch in part for key, print_ in zip(keys([batch]), batch.fingerprints, strict=True)}
        for part in (one, two)
    ]
    changed = sum(prints[0][key] != prints[1][key] for key in prints[0])
    assert changed > 0.8 * len(prints[0]), "new masks, but for rows that are too short for one"


def test_fixed_number_of_rows(folder: Path) -> None:
    settings = text_config(folder, micro_batch=MicroBatchConfig(samples=3))
    assert max(len(batch.sample_ids) for batch in consumed(settings, steps=4)) == 3


def test_length_counts_the_first_token(tmp_path: Path) -> None:
    """Four rows of 52 fit into 256; were `<s>` not counted, five of 51 would."""
    full = write_text(tmp_path / "shards", [document([51], seed) for seed in range(20)])
    batches = list(validation_batches(text_config(valid=str(full)), rank=0, world=1))
    assert [batch.inputs.shape for batch in batches] == [(4, 2, 52)] * 5


@pytest.mark.parametrize("blocks", BLOCKS)
def test_bad_document_is_dropped(tmp_path: Path, blocks: str) -> None:
    data = write_tokens(DOCUMENTS[5])
    broken = [*DOCUMENTS[:5], data[:-9], *DOCUMENTS[6:]]
    special = DOCUMENTS[7].copy()
    special[3] = 299
    broken[7] = special
    settings = settings_for(write_text(tmp_path / "shards", broken), blocks)
    batches = consumed(settings, steps=-(-epoch_of(settings)[1] // 4))
    dropped = {sample_id.partition("/")[2]: reason for batch in batches for sample_id, reason in batch.dropped}
    names = ("0005:0", "0007:0") if blocks == "complete_doc" else ("0005", "0007")
    assert set(dropped) == set(names)
    assert dropped[names[0]].startswith("cut short: ")
    assert dropped[names[1]] == "token id 299, <mask>, inside a document"
    assert set(names).isdisjoint(keys(batches)) and len(set(keys(batches))) >= len(DOCUMENTS) - 2


def test_block_behind_its_document_is_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the reader refuses costs the run no more than one that the decoder refuses."""
    read = BlockSet.read

    def refuses(self: BlockSet, index: int) -> RawSample:
        if self.sample_id(index).endswith("0005:0"):
            raise BadSample("ends behind its document")
        return read(self, index)

    monkeypatch.setattr(BlockSet, "read", refuses)
    settings = settings_for(folder, "complete_doc")
    batches = consumed(settings, steps=-(-epoch_of(settings)[1] // 4))
    dropped = [(sample_id.partition("/")[2], reason) for batch in batches for sample_id, reason in batch.dropped]
    assert set(dropped) == {("0005:0", "ends behind its document")}


def test_documents_without_a_length_are_told(tmp_path: Path) -> None:
    shards = write_text(tmp_path / "shards", [*DOCUMENTS, b"no .npy"])
    total, _, remarks = epoch_of(text_config(shards))
    assert remarks[0] == (
        f"data.shards: 1 of {total} rows cannot be measured and count as text.max_tokens; "
        "tools/make_shards.py text names what is wrong with them"
    )


def test_micro_batch_with_nothing_left(tmp_path: Path) -> None:
    shards = write_text(tmp_path / "shards", [b"no .npy", b"nor this"])
    with closing(TrainingLoader(text_config(shards), rank=0, world=1, start_step=0)) as loader:
        batch = next(iter(loader))[0]
    assert batch.inputs.shape == (1, 2, 2) and not batch.sample_ids and batch.masked_count() == 0
    assert len(batch.dropped) == 2


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_validation(folder: Path, world: int, blocks: str) -> None:
    settings = text_config(text={"blocks": blocks}, valid=str(folder))
    ranks = [validation_batches(settings, rank=rank, world=world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    met = dict(rows([batch for batch in batches if batch.sample_ids]))
    for number, tokens in enumerate(DOCUMENTS):
        if blocks == "document":
            assert met[f"{number:04d}"] == tokens[:ROOM].tolist()
        else:
            own = {int(key[5:]): ids for key, ids in met.items() if key.startswith(f"{number:04d}:")}
            assert [i for start in sorted(own) for i in own[start]] == tokens.tolist()
    assert all(batch.inputs.shape[0] * batch.inputs.shape[2] <= 256 for batch in batches)
    one_by_one = replace(settings, data=replace(settings.data, micro_batch=MicroBatchConfig(samples=1)))
    alone = validation_batches(one_by_one, rank=0, world=1)
    prints = {batch.sample_ids[0]: batch.fingerprints[0] for batch in alone}
    assert prints == {
        sample_id: print_
        for batch in batches
        for sample_id, print_ in zip(batch.sample_ids, batch.fingerprints, strict=True)
    }, "masks are those of any other batching"


def test_probe_has_all_documents_with_labels(folder: Path) -> None:
    """Documents also where training has blocks: a label is a document's."""
    batches = labelled_batches(str(folder), settings_for(folder, "complete_doc"), 10, 0)
    found = [
        (key, label, ids)
        for batch in batches
        for (key, ids), label in zip(rows([batch]), batch.labels.tolist(), strict=True)
    ]
    assert found == [(f"{n:04d}", n % 3, tokens[:ROOM].tolist()) for n, tokens in enumerate(DOCUMENTS)]
    assert batches.classes == ("a", "b", "c")
    assert all(batch.inputs.shape[1] == 1 and not batch.mask_bmt.any() for batch in batches)


def test_fingerprint_knows_blocks(folder: Path, tmp_path: Path) -> None:
    """The order follows from their lengths, so a resumed run has to be told."""
    moved = [story(length, seed + (seed == 3)) for seed, length in enumerate(LENGTHS)]
    other = write_text(tmp_path / "shards", moved)
    loaders = [TrainingLoader(text_config(path), rank=0, world=1, start_step=0) for path in (folder, folder, other)]
    assert loaders[0].fingerprint == loaders[1].fingerprint != loaders[2].fingerprint
    documents = [
        TrainingLoader(settings_for(path, "document"), rank=0, world=1, start_step=0).fingerprint
        for path in (folder, other)
    ]
    assert documents[0] == documents[1] != loaders[0].fingerprint, "documents are as long as they were"

"""Weighted mixes: shares at any time, each set's own epochs, any ranks, any resume; a pure function of the number."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megad2v.config.load import load_config
from megad2v.config.schema import Config, MixConfig
from megad2v.data.loader import TrainingLoader
from megad2v.data.mix import Merge, whole_weights
from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.training.state import _check_weights
from tests.unit.data_helpers import config, members, write_tar
from tests.unit.speech_helpers import speech_config, write_speech

SIZES = {"small": (3, 2), "large": (9, 8), "odd": (7,)}
"""Samples of each tar; tars of different sets have the same names."""
WEIGHTS = {"small": 0.5, "large": 1.0, "odd": 0.25}


@pytest.mark.parametrize(
    "weights,largest",
    [((1,), 0.01), ((1, 1), 0.51), ((1, 1000), 0.51), ((3, 2), 0.51), ((5, 3, 1), 0.99), ((4, 2, 1, 1), 0.99)],
)
def test_each_set_has_its_share_at_any_time(weights: tuple[int, ...], largest: float) -> None:
    merge, total = Merge(weights), sum(weights)
    counts = [0] * len(weights)
    for number in range(3 * total):
        which, own = merge.place(number)
        assert own == counts[which], "a set's micro-batches come in their order, none twice, none left out"
        counts[which] += 1
        assert merge.counts(number + 1) == counts
        assert max(abs(c - (number + 1) * w / total) for c, w in zip(counts, weights, strict=True)) <= largest
    assert counts == [3 * weight for weight in weights]


def test_shares_of_many_sets() -> None:
    """About one micro-batch where up to nine are mixed: 1.2 was the most that 400 random mixes gave."""
    rng, worst = random.Random(1), []
    for _ in range(60):
        weights = [rng.randint(1, 40) for _ in range(rng.randint(2, 9))]
        merge, counts, most = Merge(weights), [0] * len(weights), 0.0
        for number in range(1, sum(weights) + 1):
            counts[merge.place(number - 1)[0]] += 1
            most = max(most, *(abs(c - number * w / sum(weights)) for c, w in zip(counts, weights, strict=True)))
        worst.append(most)
    assert max(worst) < 1.3
    assert sum(worst) / len(worst) < 0.9


def test_far_numbers_are_computed_alone() -> None:
    merge = Merge([3, 1, 2])
    assert sum(merge.counts(10**15)) == 10**15
    which, own = merge.place(10**15)
    assert own == merge.counts(10**15)[which]


def test_only_ratios_of_weights_count() -> None:
    assert whole_weights({"b": 0.5, "a": 0.1}) == {"a": 1, "b": 5} == whole_weights({"a": 2, "b": 10})
    assert list(whole_weights({"b": 1.0, "a": 1.0})) == ["a", "b"]
    assert whole_weights({"a": 1e-7, "b": 1.0}) == {"a": 1, "b": 10**7}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    for name, tars in SIZES.items():
        (root / name).mkdir()
        for number, count in enumerate(tars):
            write_tar(root / name / f"{number}.tar", members(f"{name}{number}", count))
    return {name: root / name for name in SIZES}


def mixed(sets: dict[str, Path], workers: int = 0, **weights: float) -> Config:
    mix = {name: MixConfig(str(path), {**WEIGHTS, **weights}[name]) for name, path in sets.items()}
    return config(None, workers=workers, mix=mix)


def consumed(settings: Config, world: int, start: int, stop: int) -> list[list[Batch]]:
    steps: list[list[Any]] = [[None] * 4 for _ in range(start, stop)]
    for rank in range(world):
        with closing(TrainingLoader(settings, rank=rank, world=world, start_step=start)) as loader:
            for step, own in zip(steps, loader):
                step[rank::world] = own
    return steps


def seen(steps: list[list[Batch]]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    return [(batch.sample_ids, batch.fingerprints) for step in steps for batch in step]


def test_each_set_has_its_own_epochs(sets: dict[str, Path]) -> None:
    steps, settings = 21, mixed(sets)
    met = seen(consumed(settings, 1, 0, steps))
    of_set: dict[str, list[str]] = {name: [] for name in SIZES}
    for ids, _ in met:
        names = {sample_id.split(":")[0] for sample_id in ids}
        assert len(names) == 1, "a micro-batch is of one set"
        of_set[names.pop()] += ids
    assert {name: len(ids) // 2 for name, ids in of_set.items()} == {"small": 24, "large": 48, "odd": 12}
    for name, ids in of_set.items():
        size = sum(SIZES[name])
        everything = {f"{name}:{n}.tar/{i:04d}" for n, count in enumerate(SIZES[name]) for i in range(count)}
        for epoch in range(len(ids) // size):
            assert Counter(ids[epoch * size : (epoch + 1) * size]) == Counter(everything), (name, epoch)
    loader = TrainingLoader(settings, rank=0, world=1, start_step=0)
    assert loader.epochs(steps) == {name: pytest.approx(len(ids) / sum(SIZES[name])) for name, ids in of_set.items()}
    assert loader.epoch_size == 29
    assert [remark.split(",")[0] for remark in loader.remarks] == [
        "data.mix: large is 57.143% of the micro-batches",
        "data.mix: odd is 14.286% of the micro-batches",
        "data.mix: small is 28.571% of the micro-batches",
    ]


@pytest.mark.parametrize("world,workers,start", [(1, 2, 0), (2, 0, 0), (4, 0, 5), (2, 1, 3)])
def test_same_stream_for_any_ranks_workers_and_resume(
    sets: dict[str, Path], world: int, workers: int, start: int
) -> None:
    settings = mixed(sets, workers=workers)
    whole = seen(consumed(mixed(sets), 1, 0, 9))
    assert seen(consumed(settings, world, start, 9)) == whole[4 * start :]
    turned = replace(settings.data, mix=dict(reversed((settings.data.mix or {}).items())))
    assert seen(consumed(replace(settings, data=turned), world, start, 9)) == whole[4 * start :], (
        "names, not their order"
    )


def test_fingerprint_covers_sets_and_weights(sets: dict[str, Path]) -> None:
    def of(settings: Config) -> str:
        return TrainingLoader(settings, rank=0, world=1, start_step=0).fingerprint

    first = of(mixed(sets))
    assert first == of(mixed(sets, small=1.0, large=2.0, odd=0.5))
    others = {of(mixed(sets, small=2.0)), of(mixed({n: p for n, p in sets.items() if n != "odd"}))}
    assert first not in others and len(others) == 2


def test_resume_refuses_other_weights() -> None:
    def check(then: dict[str, Any] | None, now: dict[str, float] | None) -> None:
        checkpoint: Any = SimpleNamespace(directory="run/step_5", index=SimpleNamespace(config={"data": {"mix": then}}))
        mix = None if now is None else {name: MixConfig("elsewhere", weight) for name, weight in now.items()}
        _check_weights(checkpoint, config(None, mix=mix))

    saved = {"a": {"shards": "x", "weight": 1.0}, "b": {"shards": "y", "weight": 3.0}}
    check(saved, {"b": 6.0, "a": 2.0})
    check(None, None)
    for now, words in (
        ({"a": 1.0, "b": 2.0}, "a 1, b 3, not a 1, b 2"),
        (None, "a 1, b 3, not no mix"),
        ({"a": 1.0}, "not a 1"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            check(saved, now)
        assert "\n" not in str(caught.value)


def test_recordings_are_mixed_too(tmp_path: Path) -> None:
    lengths = {"a": [900, 1500, 2500, 6000, 3000, 3100], "b": [4000, 4100, 1000]}
    sets = {name: write_speech(tmp_path / name, own) for name, own in lengths.items()}
    settings = speech_config()
    mix = {name: MixConfig(str(path), 1.0) for name, path in sets.items()}
    loader = TrainingLoader(replace(settings, data=replace(settings.data, mix=mix)), rank=0, world=1, start_step=0)
    with closing(loader):
        batches = [batch for step in islice(loader, 20) for batch in step]
    for name, own in lengths.items():
        ids = [sample for batch in batches for sample in batch.sample_ids if sample.startswith(f"{name}:")]
        assert Counter(ids[: len(own)]) == Counter(set(ids)) and len(set(ids)) == len(own)
    assert [key for key, value in loader.epochs(20).items() if value > 3] == ["a", "b"]


@pytest.mark.parametrize(
    "mix,message",
    [
        ({"a": {"shards": "x", "weight": 0}}, r"data\.mix\.a\.weight: expected a number above 0"),
        ({"a": {"shards": "x", "weight": float("inf")}}, r"data\.mix\.a\.weight"),
        ({"a/b": {"shards": "x"}}, r"data\.mix: a name is made of"),
        ({"a": {"weight": 1}}, r"data\.mix: expected NAME: \{shards: PATTERN, weight: NUMBER\} .*shards"),
        ({"a": {"shards": "x", "wight": 1}}, r"data\.mix: expected NAME: .*wight"),
        ({}, r"data\.mix: names no data set"),
    ],
)
def test_wrong_mixes_are_one_line(mix: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config("vision_tiny", data__mix=mix)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_mix_beside_shards_and_unknown_shards(sets: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"data\.shards and data\.mix both"):
        load_config("vision_tiny", data__mix={"a": {"shards": "x"}}, data__shards="y")
    settings = mixed({**sets, "odd": Path("nowhere")})
    with pytest.raises(UserError, match=r"data\.mix\.odd\.shards: nowhere: no such file"):
        TrainingLoader(settings, rank=0, world=1, start_step=0)

"""All samples of one rank's micro-batch are bad: nobody hangs, and the step is the one of the other rank's alone."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from megad2v.data.loader import TrainingLoader
from megad2v.data.shardset import ShardSet
from tests import tolerances
from tests.distributed.harness import run_ranks
from tests.distributed.jobs_recipes import small
from tests.unit.data_helpers import write_shards
from tests.unit.speech_helpers import write_speech

RUNS = {"vision_tiny": "zero3", "speech_tiny": "zero1"}


def second_micro_batch(recipe: str, shards: dict[str, str], output: Path) -> list[str]:
    config = small(recipe, 2, shards, str(output))
    with closing(TrainingLoader(config, rank=1, world=2, start_step=0)) as loader:
        return list(next(iter(loader))[0].sample_ids)


def spoil(folder: str, modality: str, ids: list[str]) -> None:
    """Blank the first bytes of these samples where they lie, as a failing disk does: index and plan stay."""
    shards = ShardSet(folder, modality)
    for index in range(len(shards)):
        sample = shards.read(index)
        if sample.id in ids:
            path = Path(folder, sample.id.split("/")[0])
            stat = path.stat()
            content = path.read_bytes()
            place = content.index(sample.data)
            path.write_bytes(content[:place] + bytes(16) + content[place + 16 :])
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """(two ranks, one of which loses everything; the other's micro-batch alone; ids that were spoilt)."""
    output = tmp_path_factory.mktemp("bad")
    shards = {
        "vision": str(write_shards(output / "images")),
        "speech": str(write_speech(output / "speech", [1000, 2000, 3000, 9000] * 4)),
    }
    spoilt = {}
    for recipe, modality in (("vision_tiny", "vision"), ("speech_tiny", "speech")):
        spoilt[recipe] = second_micro_batch(recipe, shards, output / "plan")
        spoil(shards[modality], modality, spoilt[recipe])
    arguments = {"runs": RUNS, "shards": shards}
    job = "tests.distributed.jobs_bad_samples:one_step"
    two = run_ranks(job, 2, arguments, timeout=150, output=output / "two")
    (alone,) = run_ranks(job, 1, arguments, timeout=100, output=output / "alone")
    quarantine = {recipe: (output / "two" / recipe / "quarantine.jsonl").read_text() for recipe in RUNS}
    return two, alone, {"ids": spoilt, "quarantine": quarantine}


def assembled(ranks: list[dict[str, Any]], recipe: str, kind: str) -> torch.Tensor:
    """All fragments of the ranks, in the order of names and places."""
    fragments = [f for rank in ranks for f in rank[recipe]["state"] if f[0] == kind]
    return torch.cat([torch.tensor(values, dtype=torch.float64) for _, _, _, values in sorted(fragments, key=_place)])


def _place(fragment: tuple[str, str, int, list[float]]) -> tuple[str, int]:
    return fragment[1], fragment[2]


@pytest.mark.timeout(280)
@pytest.mark.parametrize("recipe", RUNS)
def test_step_is_that_of_the_good_samples(recipe: str, results: tuple[Any, Any, Any]) -> None:
    two, alone, told = results
    for kind in ("exp_avg", "student"):  # the first moment after one step is the gradient, times a constant
        mine, expected = assembled(two, recipe, kind), assembled([alone], recipe, kind)
        assert mine.shape == expected.shape and expected.norm() > 0
        assert (mine - expected).norm() <= tolerances.STEP_GRADIENT * expected.norm(), kind
    for rank in two:
        counted = {key: rank[recipe][key] for key in ("updates", "samples", "dropped")}
        assert counted == {"updates": 1, "samples": alone[recipe]["samples"], "dropped": len(told["ids"][recipe])}
    assert alone[recipe]["dropped"] == 0
    lines = [json.loads(line) for line in told["quarantine"][recipe].splitlines()]
    assert [(line["step"], line["micro_batch"], line["sample"]) for line in lines] == [
        (1, 1, sample) for sample in told["ids"][recipe]
    ]
    assert all(line["reason"] for line in lines)

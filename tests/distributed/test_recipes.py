"""Every recipe of the package trains: one update on images, recordings or text through its own set-up and loop."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megad2v.config.load import load_config, recipes
from megad2v.data.turns import training_turns
from tests.distributed.harness import run_ranks
from tests.unit.data_helpers import write_shards
from tests.unit.speech_helpers import write_speech
from tests.unit.text_helpers import story, write_text

RANKS = 2
RECIPES = sorted(recipes())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All recipes in one launch, at reduced size; by rank, then by recipe."""
    output = tmp_path_factory.mktemp("recipes")
    shards = {
        "vision": str(write_shards(output / "images")),
        "speech": str(write_speech(output / "speech", [1000, 2000, 3000, 9000] * 4)),
        "text": str(write_text(output / "text", [story(60, seed) for seed in range(16)])),
    }
    arguments = {"recipes": RECIPES, "shards": shards}
    return run_ranks("tests.distributed.jobs_recipes:one_update", RANKS, arguments, timeout=500, output=output)


@pytest.mark.timeout(540)
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_update(recipe: str, results: list[dict[str, Any]]) -> None:
    """The loss is finite, the update taken (of a joint recipe one of each modality), and it moves the student, its
    moments and the teacher on every rank."""
    config = load_config(recipe)
    for rank, by_recipe in enumerate(results):
        seen = by_recipe[recipe]
        assert seen["updates"] == training_turns(config).until_all(), rank
        assert all(seen["changed"].values()) and {"student", "teacher"} <= seen["changed"].keys(), seen["changed"]
    line = results[0][recipe]["line"]
    assert math.isfinite(line["loss"]) and line["loss"] > 0
    assert math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0
    assert line["masked"] > 0 and line["skipped_steps"] == 0
    assert line["lr"] == config.optimizer.lr  # without warm-up the first update has the peak


@pytest.mark.timeout(540)
@pytest.mark.parametrize("recipe", RECIPES)
def test_weight_decay_is_the_recipes_after_an_update(recipe: str, results: list[dict[str, Any]]) -> None:
    """No schedule touches it: what decays, decays by the recipe's one value."""
    for by_recipe in results:
        assert set(by_recipe[recipe]["weight_decay"]) - {0.0} == {load_config(recipe).optimizer.weight_decay}

"""Job for test_recipes.py: one real update of every recipe, at sizes that a CPU takes in its stride."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megad2v.config.parts import JOINT, modalities, of_modality
from megad2v.config.schema import Config

PATCHES_A_SIDE = 4


def _small_vision(config: Config) -> dict[str, Any]:
    """A grid of 4 x 4 of the recipe's own patches, with blocks to match."""
    return {"vision__image_size": PATCHES_A_SIDE * config.vision.patch_size, "mask__min_block": 2}


def _small_speech(config: Config) -> dict[str, Any]:
    """20 samples a frame, a fraction of a second."""
    return {
        "speech__conv_layers": [[8, 10, 5], [8, 3, 2], [8, 2, 2]],
        "speech__min_seconds": 0.05,
        "speech__max_seconds": 0.4,
    }


def _small_text(config: Config) -> dict[str, Any]:
    """Rows of half a document of tests/unit/text_helpers.py, and its ids."""
    from tests.unit.text_helpers import VOCABULARY

    return {"text__vocabulary": VOCABULARY, "text__max_tokens": 32}


SMALL = {"vision": _small_vision, "speech": _small_speech, "text": _small_text}
"""By modality, what makes its inputs small. A recipe of a new modality needs an entry here."""
SPLIT = {"text_large": {"parallel__tensor": 2, "parallel__sequence": True}}
"""Recipes that are split here though they need not be: text has parts of its own to split, the table of tokens."""


def small(recipe: str, ranks: int, shards: dict[str, str], output: str) -> Config:
    """The recipe, everything but its size: 4 channels a head, as many blocks as are averaged, batches of 2; one step,
    or as many as give every modality of a joint recipe one. Warm-up, whose first learning rate would move no weight, is
    left out."""
    from megad2v.config.load import load_config
    from megad2v.data.turns import training_turns

    config = load_config(recipe)
    alone = [of_modality(config, modality) for modality in modalities(config)]
    budget = {"samples": 2, "seconds": None, "tokens": None}
    joint = config.modality == JOINT
    budgets = {f"joint__{one.modality}__micro_batch": budget for one in alone}
    return load_config(
        recipe,
        model__width=4 * config.model.heads,
        model__depth=max(one.targets.layers for one in alone),
        schedule__warmup_steps=0,
        data__shards={one.modality: shards[one.modality] for one in alone} if joint else shards[config.modality],
        data__workers=0,
        train__steps=training_turns(config).until_all(),
        train__micro_batches_per_step=ranks,
        train__init=None,
        train__init_teacher="teacher",
        train__log_every=1,
        train__tensorboard=False,
        train__output_dir=output,
        **(budgets if joint else {"data__micro_batch": budget}),
        **{_key(key, joint): value for one in alone for key, value in SMALL[one.modality](one).items()},
        **SPLIT.get(recipe, {"parallel__tensor": min(config.parallel.tensor, ranks)}),
    )


def _key(key: str, joint: bool) -> str:
    """Masks are the modality's own in a joint recipe; of images alone anything is set here."""
    return f"joint__vision__{key}" if joint and key.startswith("mask__") else key


def one_update(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """By recipe: its metrics line, by kind of state how many of this rank's tensors the update changed, and the weight
    decays in use after it. The package's own set-up and loop, on as many ranks as there are, one after another."""
    from megad2v.engine import distributed
    from megad2v.parallel.topology import Topology

    world = distributed.start()
    results = {}
    configs = {name: small(name, world.size, arguments["shards"], str(output / name)) for name in arguments["recipes"]}
    # DeepSpeed remembers the last topology that it was given, so tensor parallelism comes last.
    for name, config in sorted(configs.items(), key=lambda item: item[1].parallel.tensor):
        print(f"--- {name}", flush=True)
        tensor = config.parallel.tensor
        results[name] = _update(config, world if tensor == 1 else replace(world, topology=Topology(tensor, "cpu")))
    return results


def _update(config: Config, world: Any) -> dict[str, Any]:
    from megad2v.config.deepspeed_json import read_deepspeed_json
    from megad2v.training.loop import train
    from megad2v.training.setup import set_up
    from megad2v.training.state import state_memory
    from tests.distributed.harness import REPOSITORY

    ds = read_deepspeed_json(REPOSITORY / "ds_configs" / "zero1.json")
    run = set_up(config, ds, world, recipe="test")
    try:
        before = [memory.clone() for memory in run.memory()]
        train(run)
        changed: dict[str, int] = {}
        pairs = zip(state_memory(run.engine, run.teacher), before, strict=True)
        for (kind, _, now), then in pairs:
            changed[kind] = changed.get(kind, 0) + int(not now.equal(then))
        groups = run.engine.deepspeed.optimizer.param_groups
        return {
            "line": json.loads((run.directory / "metrics.jsonl").read_text().splitlines()[0]) if world.is_main else {},
            "updates": run.progress.updates,
            "changed": changed,
            "weight_decay": sorted({group["weight_decay"] for group in groups}),
        }
    finally:
        run.close()

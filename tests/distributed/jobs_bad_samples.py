"""Job for test_bad_samples.py: one real step on shards whose second micro-batch cannot be decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.jobs_recipes import small


def one_step(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """By recipe: student and first moment after the step (name, start, values) of this rank, and what it counted. As
    many micro-batches as there are ranks, one each."""
    from megad2v.config.deepspeed_json import read_deepspeed_json
    from megad2v.engine import distributed
    from megad2v.training.loop import train
    from megad2v.training.setup import set_up
    from megad2v.training.state import state_memory
    from tests.distributed.harness import REPOSITORY

    world = distributed.start()
    results = {}
    for recipe, stage in arguments["runs"].items():
        config = small(recipe, world.size, arguments["shards"], str(output / recipe))
        ds = read_deepspeed_json(REPOSITORY / "ds_configs" / f"{stage}.json")
        run = set_up(config, ds, world, recipe="test")
        try:
            train(run)
            results[recipe] = {
                "state": [
                    (kind, fragment.name, fragment.start, memory.tolist())
                    for kind, fragment, memory in state_memory(run.engine, run.teacher)
                    if kind in ("student", "exp_avg")
                ],
                "updates": run.progress.updates,
                "samples": run.progress.samples,
                "dropped": run.progress.dropped,
            }
        finally:
            run.close()
    return results

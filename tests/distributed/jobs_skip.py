"""Job for test_skip.py: a step in which one rank's loss is not a number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megad2v.config.schema import Config
from megad2v.modalities.batch import Batch

POISONED_RANK = 1
Snapshot = dict[str, list[torch.Tensor]]


def _poisoned(batch: Batch) -> Batch:
    """The same micro-batch as float pixels, one of which is NaN; its mask, and so every count, stays as it was."""
    pixels = (batch.inputs.float() / 255 - 0.5) / 0.5
    pixels[0, 0, 0, 0] = float("nan")
    return replace(batch, inputs=pixels)


def _snapshot(engine: Any, teacher: Any) -> Snapshot:
    """All that a run saves, as this rank holds it, and the weights that the forwards use. Collective."""
    from megad2v.engine.fragments import adam_entries
    from megad2v.training.state import state_memory
    from tests.distributed.jobs_layout import gathered

    kept: Snapshot = {}
    for kind, _, memory in state_memory(engine, teacher):
        kept.setdefault(kind, []).append(memory.clone())
    kept["adam_step"] = [entry["step"].clone() for entry in adam_entries(engine.deepspeed, engine.state)]
    kept["student's forward"] = list(gathered(engine, engine.student).values())
    kept["teacher's forward"] = list(gathered(engine, engine.teacher_module).values())
    return kept


def _equal(first: Snapshot, second: Snapshot) -> dict[str, bool]:
    """By kind, to the bit (and so False where anything is NaN)."""
    return {
        kind: all(torch.equal(a, b) for a, b in zip(tensors, second[kind], strict=True))
        for kind, tensors in first.items()
    }


class _Trainer:
    """One engine from the same initial weights, fed step by step through the trainer's own `take_step`."""

    def __init__(self, config: Config, layout: str, precision: str, world: Any) -> None:
        from megad2v.config.deepspeed_json import fill_deepspeed, read_deepspeed_json
        from megad2v.teacher.ema import ShardedTeacher
        from megad2v.training.setup import build_engine
        from tests.distributed.harness import REPOSITORY

        ds = read_deepspeed_json(REPOSITORY / "ds_configs" / f"{layout}.json")
        filled = fill_deepspeed(ds, config, precision=precision, data_parallel=world.data.size)
        self.config, self.world = config, world
        self.engine = build_engine(config, filled, world)
        self.teacher = ShardedTeacher(self.engine)

    def step(self, step: int, *, poison: bool = False) -> bool:
        from megad2v.training.step import count_step, take_step
        from tests.distributed.layouts import micro_batch

        world = self.world
        places = range(world.data.rank, self.config.train.micro_batches_per_step, world.data.size)
        batches = [micro_batch(step, m) for m in places]
        if poison and world.rank == POISONED_RANK:
            batches[0] = _poisoned(batches[0])  # not the last: what follows must not hide it
        return take_step(
            self.engine,
            self.teacher,
            batches,
            count_step(batches, world),
            world=world,
            seed=1,
            step=step,
            learning_rate=self.config.optimizer.lr,
            decay=0.9,
            statistics=None,
        )

    def snapshot(self) -> Snapshot:
        return _snapshot(self.engine, self.teacher)


def skip(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """Under each (layout, precision) of `cases`, one after the other: a good step, a poisoned one, a good one; and
    beside it a run that never met the poisoned one. Returns, by case, which steps were taken and what was equal."""
    from megad2v.engine import distributed
    from tests.distributed.layouts import tiny_config

    world = distributed.start()
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    for layout, precision in arguments["cases"]:
        trainer, spared = (_Trainer(tiny_config(), layout, precision, world) for _ in range(2))
        taken = [trainer.step(0)]
        before = trainer.snapshot()
        taken.append(trainer.step(1, poison=True))
        after = trainer.snapshot()
        taken.append(trainer.step(2))
        last = trainer.snapshot()
        spared.step(0), spared.step(2)
        seen[f"{layout} {precision}"] = {
            "taken": taken,
            "over the poisoned step": _equal(before, after),
            "over the next step": _equal(after, last),
            "with the spared run": _equal(last, spared.snapshot()),
        }
    return seen

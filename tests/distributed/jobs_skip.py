"""Job for test_skip.py: steps that one rank's micro-batch spoils, by NaN or by a loss far beyond the usual."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megad2v.config.schema import Config, ParallelConfig
from megad2v.modalities.batch import Batch
from megad2v.parallel.topology import Topology

POISONED_RANK = 1
SPIKE = 1e4
USUAL_STEPS = 16
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

    def __init__(self, config: Config, layout: str, precision: str, tensor: int, world: Any) -> None:
        from megad2v.config.deepspeed_json import fill_deepspeed, read_deepspeed_json
        from megad2v.config.schema import VerdictConfig
        from megad2v.teacher.ema import ShardedTeacher
        from megad2v.training.setup import build_engine
        from megad2v.training.verdict import Verdict
        from tests.distributed.harness import REPOSITORY

        if tensor > 1:
            world = replace(world, topology=Topology(tensor, "cpu"))
            config = replace(config, parallel=ParallelConfig(tensor=tensor))
        ds = read_deepspeed_json(REPOSITORY / "ds_configs" / f"{layout}.json")
        filled = fill_deepspeed(ds, config, precision=precision, data_parallel=world.data.size)
        self.config, self.world = config, world
        self.engine = build_engine(config, filled, world)
        self.teacher = ShardedTeacher(self.engine)
        self.verdict = Verdict(VerdictConfig(window=USUAL_STEPS), losses={}, norms={})

    def step(self, step: int, spoil: str = "") -> bool:
        """One step; on one rank its first micro-batch (what follows must not hide it) is spoilt by "nan" or "spike"."""
        from megad2v.training.step import count_step, take_step
        from tests.distributed.layouts import micro_batch

        world, forward = self.world, self.engine.forward
        places = range(world.data.rank, self.config.train.micro_batches_per_step, world.data.size)
        batches = [micro_batch(step, m) for m in places]
        factors = iter([SPIKE])
        if world.rank == POISONED_RANK and spoil == "nan":
            batches[0] = _poisoned(batches[0])
        # Tensor-parallel ranks compute the same loss: a spike is on all of a group, or it is no sum of anything.
        if (world.rank == POISONED_RANK or world.tensor.size > 1) and spoil == "spike":
            self.engine.forward = lambda *inputs: _times(next(factors, 1.0), forward(*inputs))
        try:
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
                verdict=self.verdict,
            )
        finally:
            self.engine.forward = forward

    def first_step(self) -> bool:
        """Step 0, then as many like it in the verdict's memory as it wants to see before it calls a spike."""
        taken = self.step(0)
        for histories in self.verdict._histories.values():
            histories["vision"] *= USUAL_STEPS
        return taken

    def snapshot(self) -> Snapshot:
        kept = _snapshot(self.engine, self.teacher)
        kept["history"] = [
            torch.tensor(histories["vision"], dtype=torch.float64) for histories in self.verdict._histories.values()
        ]
        return kept

    def without_gate(self) -> None:
        """From here on DeepSpeed decides alone, as it does for anybody."""
        optimizer = self.engine.deepspeed.optimizer
        for name in ("_get_norm_groups", "scaled_global_norm", "check_overflow"):
            vars(optimizer).pop(name, None)
        self.engine._gate.step = lambda loss, judge: self.engine.deepspeed.step() is None


def _times(factor: float, forward: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    loss_sum, *others = forward
    return loss_sum * factor, *others


def skip(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """Under each (layout, precision, tensor size) of `cases`: good, NaN, good, spike, good; and beside it a run
    that never met the two spoilt steps. Returns, by case, which steps were taken, why not, what was equal, and what a
    good step sent more, and less, than DeepSpeed's own."""
    from megad2v.engine import distributed
    from tests.distributed.jobs_layout import CountCollectives
    from tests.distributed.layouts import tiny_config

    world = distributed.start()
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    for layout, precision, tensor in arguments["cases"]:
        trainer, spared = (_Trainer(tiny_config(), layout, precision, tensor, world) for _ in range(2))
        taken, judgements, spoilt, moved = [trainer.first_step()], [], {}, {}
        for step, kind in ((1, "nan"), (3, "spike")):
            before = trainer.snapshot()
            taken.append(trainer.step(step, kind))
            after = trainer.snapshot()
            judgements.append(asdict(trainer.verdict.latest))
            taken.append(trainer.step(step + 1))
            last = trainer.snapshot()
            spoilt[kind], moved[kind] = _equal(before, after), _equal(after, last)
        spared.first_step(), spared.step(2), spared.step(4)
        same = _equal(last, spared.snapshot())
        with CountCollectives() as asked:
            trainer.step(5)
        spared.without_gate()
        with CountCollectives() as unasked:
            spared.step(5)
        ours, theirs = Counter(asked.calls), Counter(unasked.calls)
        seen[f"{layout} {precision} tp{tensor}"] = {
            "taken": taken,
            "judgements": judgements,
            "over the spoilt step": spoilt,
            "over the next step": moved,
            "with the spared run": same,
            "sent more": list((ours - theirs).elements()),
            "sent less": list((theirs - ours).elements()),
            "sent": len(asked.calls),
        }
    return seen

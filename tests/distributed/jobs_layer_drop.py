"""Job for test_layer_drop.py: the trainer's own step, with blocks left out and the guard watching."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megad2v.config.schema import Config
from megad2v.training.layer_drop import kept_blocks
from tests.distributed.layouts import tiny_config

RATE = 0.4


def config_with_drop(steps: int) -> Config:
    """Three blocks, so that some steps keep all, some none, and some a part."""
    config = tiny_config(steps=steps)
    return replace(config, model=replace(config.model, depth=3, layer_drop=RATE))


def kept_in(step: int) -> tuple[int, ...]:
    """As the trainer draws them."""
    kept = kept_blocks(1, step, depth=3, rate=RATE)
    assert kept is not None
    return kept


def drops(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train under each of `layouts`, one after the other. Per layout: losses, gradient norms, and the largest element
    of each block's gradient in every step, as DeepSpeed's own accessor gives it just before the update; the final
    weights go to LAYOUT.safetensors."""
    from megad2v.engine import distributed

    world = distributed.start()
    torch.set_num_threads(1)
    return {layout: _train(layout, world, arguments["steps"], output) for layout in arguments["layouts"]}


def _train(layout: str, world: Any, steps: int, output: Path) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    from megad2v.engine.distributed import sum_over
    from megad2v.engine.guard import Guard
    from megad2v.engine.watchdog import Watchdog
    from megad2v.metrics.statistics import StepStatistics
    from megad2v.teacher.ema import ShardedTeacher
    from megad2v.training.loop import _rates
    from megad2v.training.proposal import propose
    from megad2v.training.setup import build_engine
    from megad2v.training.step import count_step, take_step
    from tests.distributed.jobs_layout import gathered
    from tests.distributed.layouts import deepspeed_config, micro_batch

    config = config_with_drop(steps)
    engine = build_engine(config, deepspeed_config(config, layout, world.data.size, 0), world)
    teacher = ShardedTeacher(engine)
    guard = Guard(engine, world, Watchdog(), limit=60.0)
    seen: dict[str, Any] = {"losses": [], "norms": [], "gradients": []}
    take = engine.deepspeed._take_model_step

    def look_and_take(*arguments: Any, **words: Any) -> None:
        seen["gradients"].append(
            [
                max(safe_get_full_grad(p).abs().max().item() for p in b.parameters())
                for b in engine.student.encoder.blocks
            ]
        )
        take(*arguments, **words)

    # With an offloaded optimizer, gradients get to where the accessor looks only inside step(), just before this.
    engine.deepspeed._take_model_step = look_and_take
    for step in range(steps):
        statistics = StepStatistics(config.model.width, world.device)
        batches = [micro_batch(step, m) for m in range(world.data.rank, 4, world.data.size)]
        kept = kept_blocks(config.train.seed, step, depth=3, rate=config.model.layer_drop)
        proposal = propose(batches, kind="training", step=step, updates=step, depth=3, blocks=kept)
        counts = count_step(batches, world, lambda own, proposal=proposal: guard.agree(proposal, own))
        _, decay = _rates(config, step)
        assert take_step(
            engine, teacher, batches, counts, world=world, seed=1, step=step, learning_rate=config.optimizer.lr,
            decay=decay, statistics=statistics, blocks=kept, guard=guard,
        )  # fmt: skip
        sum_over(world.data, statistics.sums)
        seen["losses"].append(statistics.read()["loss"])
        seen["norms"].append(engine.gradient_norm())
    weights = gathered(engine, engine.student)
    if world.is_main:
        save_file(weights, output / f"{layout}.safetensors")
    guard.close()
    return seen

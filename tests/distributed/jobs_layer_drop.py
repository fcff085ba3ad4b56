"""Job for test_layer_drop.py: the trainer's own step, with blocks left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megad2v.config.schema import Config
from tests.distributed import layouts
from tests.distributed.layouts import Layout, tiny_config


def config_with_drop(steps: int) -> Config:
    """Three blocks, so that some steps keep all, some none, and some a part."""
    config = tiny_config(steps=steps)
    return replace(config, model=replace(config.model, depth=3, layer_drop=0.4))


def kept_in(step: int) -> tuple[int, ...]:
    """As the trainer draws them."""
    kept = layouts.kept_in(config_with_drop(step + 1), step)
    assert kept is not None
    return kept


def drops(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train on each of `layouts`, one after the other. Per layout: losses, gradient norms, and the largest element of
    each block's gradient in every step, as DeepSpeed's own accessor gives it just before the update; the final weights
    go to LAYOUT.safetensors."""
    from tests.distributed.jobs_layout import start

    world = start()
    layouts = sorted((Layout(**fields) for fields in arguments["layouts"]), key=lambda layout: layout.tensor)
    return {str(layout): _train(layout, world, arguments["steps"], output) for layout in layouts}


def all_dropped(arguments: dict[str, Any], output: Path) -> list[float]:
    """bf16 under ZeRO-1 with tensor parallelism: rank 1 has no gradient of its own in a step without blocks.
    Returns the gradient norms of such a step and of the next."""
    from tests.distributed.jobs_layout import build, start

    trainer = build(start(), config_with_drop(2), Layout("zero1", 1, 2, precision="bf16"))
    norms = []
    for step, kept in enumerate([(), (0, 1, 2)]):
        trainer.step(step, None, kept)
        norms.append(trainer.engine.gradient_norm())
    return norms


def gathers(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """ZeRO-3, speech, nothing persistent and nothing gathered ahead: number and bytes of the all-gathers that this rank
    takes part in during a step, one after the other for the blocks in `arguments["kept"]`; and a block's bytes.
    A step whose blocks are None is validation."""
    from tests.distributed.jobs_layout import CountCollectives, build, start
    from tests.distributed.layouts import micro_batch

    layout = Layout("zero3", 2, persistence=0, modality="speech")
    trainer = build(start(), tiny_config(micro_batches=2, modality="speech"), layout, prefetch=0)
    engine, steps = trainer.engine, []
    for step, kept in enumerate(arguments["kept"]):
        with CountCollectives() as sent:
            if kept is None:
                engine.deepspeed.eval()
                batch = micro_batch(step, trainer.world.rank, "speech")
                with torch.no_grad():
                    engine.forward(batch.inputs, batch.mask_bmt, batch.padding_bt)
                engine.deepspeed.train()
            else:
                trainer.step(step, None, tuple(kept))
        sizes = [size for name, size in sent.calls if "allgather" in name]
        steps.append((len(sizes), sum(sizes)))
    padded = sum(2 * p.ds_tensor.ds_numel for p in engine.student.encoder.blocks[0].parameters())
    return {"steps": steps, "block": 4 * padded}


def _train(layout: Layout, world: Any, steps: int, output: Path) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    from megad2v.engine.distributed import sum_over
    from megad2v.metrics.statistics import StepStatistics
    from tests.distributed.jobs_layout import build, gathered, whole

    trainer = build(world, config_with_drop(steps), layout)
    engine, axis = trainer.engine, trainer.world.tensor
    seen: dict[str, Any] = {"losses": [], "norms": [], "gradients": []}
    take = engine.deepspeed._take_model_step

    def look_and_take(*arguments: Any, **words: Any) -> None:
        seen["gradients"].append(
            [
                max(whole(p, safe_get_full_grad(p), axis).abs().max().item() for p in block.parameters())
                for block in engine.student.encoder.blocks
            ]
        )
        take(*arguments, **words)

    # With an offloaded optimizer, gradients get to where the accessor looks only inside step(), just before this.
    engine.deepspeed._take_model_step = look_and_take
    for step in range(steps):
        statistics = StepStatistics(trainer.config.model.width, world.device)
        trainer.step(step, statistics, kept_in(step))
        sum_over(trainer.world.data, statistics.sums)
        seen["losses"].append(statistics.read()["loss"])
        seen["norms"].append(engine.gradient_norm())
    weights = gathered(engine, engine.student, axis)
    if world.is_main:
        save_file(weights, output / f"{layout}.safetensors")
    return seen

"""Job for test_published.py: the published program's steps, taken by our engine, teacher and schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def train(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """From the vectors' student and teacher, `steps` steps under ZeRO `zero`, each over as many micro-batches as there
    are ranks. Losses, gradient norms, learning rates and decays; the weights after it go to KIND.safetensors, under our
    names."""
    from megad2v.engine.distributed import sum_over
    from megad2v.metrics.statistics import StepStatistics
    from megad2v.modalities.batch import Batch
    from megad2v.teacher.ema import ShardedTeacher
    from megad2v.training.loop import _rates
    from megad2v.training.setup import build_engine
    from megad2v.training.step import count_step, take_step
    from tests.distributed.jobs_layout import gathered, start
    from tests.distributed.layouts import deepspeed_config
    from tests.parity.test_published import load_vectors, ours, published_config

    world = start()
    description, tensors = load_vectors()
    theirs = description["config"]
    config = published_config(theirs, micro_batches=world.data.size)
    engine = build_engine(config, deepspeed_config(config, arguments["zero"], world.data.size), world)
    teacher = ShardedTeacher(engine)
    weights = {kind: ours(tensors, kind) for kind in ("student", "teacher")}
    for fragment in engine.state.fragments:
        _write(fragment.master, fragment, weights["student"])
    for fragment, average in zip(teacher.fragments, teacher.averages, strict=True):
        _write(average, fragment, weights["teacher"])
    engine.state.publish()
    teacher.refresh()
    seen: dict[str, list[Any]] = {key: [] for key in ("losses", "norms", "rates", "decays", "counts")}
    for step in range(theirs["steps"]):
        images, mask = (
            tensors[f"inputs.{step}.{key}"].chunk(world.data.size)[world.data.rank] for key in ("images", "mask")
        )
        batch = Batch("vision", images, mask.flatten(1).unsqueeze(1), sample_ids=tuple(map(str, range(len(images)))))
        rate, decay = _rates(config, theirs["first_step"] + step)
        statistics = StepStatistics(config.model.width, world.device)
        assert take_step(
            engine,
            teacher,
            [batch],
            count_step([batch], world),
            world=world,
            seed=1,
            step=step,
            learning_rate=rate,
            decay=decay,
            statistics=statistics,
        )
        sum_over(world.data, statistics.sums)
        seen["losses"].append(statistics.read()["loss"])
        seen["norms"].append(engine.gradient_norm())
        seen["rates"].append(rate)
        seen["decays"].append(decay)
        seen["counts"].append(batch.masked_count())
    student, average = gathered(engine, engine.student), gathered(engine, engine.teacher_module)
    if world.is_main:
        for kind, values in (("student", student), ("teacher", average)):
            save_file({name: value.contiguous() for name, value in values.items()}, output / f"{kind}.safetensors")
    return seen


@torch.no_grad()
def _write(memory: torch.Tensor, fragment: Any, full: dict[str, torch.Tensor]) -> None:
    memory.copy_(full[fragment.name].flatten()[fragment.start : fragment.start + fragment.length])

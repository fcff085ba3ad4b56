"""Job for test_unused.py: a student whose head is left out of every second step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megad2v.config.schema import Config
from megad2v.modalities.build import build_student, build_teacher
from megad2v.models.data2vec import Student


class SometimesUsed(nn.Module):
    """Stands for a block under layer drop, or another modality's front end: whole steps go by without it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.used = True

    def forward(self, x: Tensor) -> Tensor:
        """The inner module's output, or `x` itself."""
        return self.inner(x) if self.used else x


def student_with_gaps(config: Config) -> Student:
    """The student, its head wrapped."""
    student = build_student(config)
    student.head = SometimesUsed(student.head)
    return student


def used_in(step: int) -> bool:
    """Steps 0, 2, ... use the head."""
    return step % 2 == 0


def gaps(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train under each of `layouts`, one after the other. Per layout: losses, gradient norms, and the largest element
    of the head's gradient in every step, as DeepSpeed's own accessor gives it just before the update; the final weights
    go to LAYOUT.safetensors. All ranks skip the head in the same steps.
    """
    from megad2v.engine import distributed

    world = distributed.start()
    torch.set_num_threads(1)
    return {layout: _train(layout, world, arguments["steps"], output) for layout in arguments["layouts"]}


def _train(layout: str, world: Any, steps: int, output: Path) -> dict[str, list[float]]:
    from deepspeed.utils import safe_get_full_grad

    from megad2v.engine.distributed import sum_over
    from megad2v.engine.setup import TrainingEngine
    from megad2v.metrics.statistics import StepStatistics
    from megad2v.teacher.ema import ShardedTeacher
    from tests.distributed.jobs_layout import Trainer, gathered
    from tests.distributed.layouts import deepspeed_config, tiny_config

    config = tiny_config(steps=steps)
    o = config.optimizer
    engine = TrainingEngine(
        lambda: student_with_gaps(config),
        lambda: build_teacher(config),
        deepspeed_config(config, layout, world.data.size),
        optimizer={"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay},
        decay_all=True,
        seed=config.train.seed,
        device=world.device,
        topology=world.topology,
    )
    trainer = Trainer(world, config, engine, ShardedTeacher(engine))
    seen: dict[str, list[float]] = {"losses": [], "norms": [], "head_gradients": []}
    take = engine.deepspeed._take_model_step

    def look_and_take(*arguments: Any, **words: Any) -> None:
        largest = [safe_get_full_grad(p).abs().max().item() for p in engine.student.head.parameters()]
        seen["head_gradients"].append(max(largest))
        take(*arguments, **words)

    # With an offloaded optimizer, gradients get to where the accessor looks only inside step(), just before this.
    engine.deepspeed._take_model_step = look_and_take
    for step in range(steps):
        engine.student.head.used = used_in(step)
        statistics = StepStatistics(config.model.width, world.device)
        trainer.step(step, statistics)
        sum_over(world.data, statistics.sums)
        seen["losses"].append(statistics.read()["loss"])
        seen["norms"].append(engine.gradient_norm())
    weights = gathered(engine, engine.student)
    if world.is_main:
        save_file(weights, output / f"{layout}.safetensors")
    return seen

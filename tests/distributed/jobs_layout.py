"""Jobs that train the tiny model under DeepSpeed: a layout's curve and gradients, the teacher against an oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode


class CountCollectives(TorchDispatchMode):
    """Counts what is sent while it is active: every c10d operation passes torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            # The output of a gather comes first and is its size on every rank.
            self.calls.append((func._schema.name, tensors[0].numel() * tensors[0].element_size()))
        return func(*args, **(kwargs or {}))


def _build(arguments: dict[str, Any]) -> tuple[Any, ...]:
    from megad2v.engine import distributed

    world = distributed.start()
    torch.set_num_threads(1)
    from megad2v.teacher.ema import ShardedTeacher
    from megad2v.training.setup import build_engine
    from tests.distributed.layouts import deepspeed_config, tiny_config

    config = tiny_config(
        micro_batches=arguments["micro_batches"], steps=arguments["schedule_steps"], scope=arguments["scope"]
    )
    ds = deepspeed_config(config, arguments["layout"], world.data.size, arguments.get("persistence"))
    engine = build_engine(config, ds, world)
    return world, config, engine, ShardedTeacher(engine)


def gathered(engine: Any, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Full weights by DeepSpeed's own gathering, not by our fragments. Collective."""
    if engine.state.stage < 3:
        return {name: p.detach().clone() for name, p in module.named_parameters()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: p.detach().clone() for name, p in module.named_parameters()}


def _run_step(world: Any, config: Any, engine: Any, teacher: Any, step: int, statistics: Any = None) -> list[int]:
    """One step through the trainer's own `take_step`; returns this rank's masked counts."""
    from megad2v.training.loop import _rates
    from megad2v.training.step import count_step, take_step
    from tests.distributed.layouts import micro_batch

    places = range(world.data.rank, config.train.micro_batches_per_step, world.data.size)
    batches = [micro_batch(step, m) for m in places]
    counts = count_step(batches, world)
    _, decay = _rates(config, step)
    taken = take_step(
        engine,
        teacher,
        batches,
        counts,
        world=world,
        seed=1,
        step=step,
        learning_rate=config.optimizer.lr,
        decay=decay,
        statistics=statistics,
    )
    assert taken
    return [batch.masked_count() for batch in batches]


def curve(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """Step-1 gradients by DeepSpeed's own accessor, 20 losses and norms, final weights of student and teacher."""
    world, config, engine, teacher = _build(arguments)
    from deepspeed.utils import safe_get_full_grad

    from megad2v.engine.distributed import sum_over
    from megad2v.metrics.statistics import StepStatistics

    gradients: dict[str, torch.Tensor] = {}
    step_engine = engine.step

    def step_and_look(*arguments: Any) -> bool:
        # With an offloaded optimizer the reduction happens inside step(): there is nothing whole to look at before.
        if not gradients and engine._managed:
            gradients.update({n: safe_get_full_grad(p).clone() for n, p in engine.student.named_parameters()})
        return step_engine(*arguments)

    engine.step = step_and_look
    losses, norms, counts = [], [], []
    for step in range(arguments["steps"]):
        statistics = StepStatistics(config.model.width, world.device)
        counts.append(_run_step(world, config, engine, teacher, step, statistics))
        sum_over(world.data, statistics.sums)
        losses.append(statistics.read()["loss"])
        norms.append(engine.gradient_norm())
    student, average = gathered(engine, engine.student), gathered(engine, engine.teacher_module)
    if world.is_main:
        save_file({n: g.contiguous() for n, g in gradients.items()}, output / "gradients.safetensors")
        save_file(student, output / "student.safetensors")
        save_file(average, output / "teacher.safetensors")
    return {"losses": losses, "norms": norms, "counts": counts}


def oracle(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train for many steps; average, in float64 and on the full model, the students that DeepSpeed gathers.

    Returns the largest relative error of the teacher's shards and of the weights that its forward sees, the error of
    the targets it computes in the NEXT forward (a stale weight shows there), and what update and refresh sent.
    """
    world, config, engine, teacher = _build(arguments)
    from megad2v.modalities.build import build_teacher
    from megad2v.training.loop import _rates
    from tests.distributed.layouts import micro_batch

    full = {n: p.double() for n, p in gathered(engine, engine.student).items()}
    names = [name for name, _ in engine.teacher_module.named_parameters()]
    average = {name: full[name].clone() for name in names}
    plain = build_teacher(config)
    target_error = 0.0
    for step in range(arguments["steps"]):
        _run_step(world, config, engine, teacher, step)
        _, decay = _rates(config, step)
        now = gathered(engine, engine.student)
        for name in names:
            average[name].mul_(decay).add_(now[name].double(), alpha=1 - decay)
        if step % 100 == 99 or step < 3:
            plain.load_state_dict({n: v.float() for n, v in average.items()}, strict=False)
            probe = micro_batch(step, 0)
            view = torch.randn(2, 10, config.model.width, generator=torch.Generator().manual_seed(step))
            pixels = probe.inputs[:2]
            seen, expected = engine.teacher(pixels, view, None), plain(pixels, view, None)
            target_error = max(target_error, float((seen - expected).norm() / expected.norm()))
    shard_error = 0.0
    for fragment, shard in zip(teacher.fragments, teacher.averages, strict=True):
        truth = average[fragment.name].flatten()[fragment.start : fragment.start + fragment.length]
        shard_error = max(shard_error, float((shard.double() - truth).norm() / truth.norm().clamp_min(1e-12)))
    forward = gathered(engine, engine.teacher_module)
    forward_error = max(float((forward[n].double() - average[n]).norm() / average[n].norm()) for n in names)
    with CountCollectives() as update:
        teacher.update(0.5)
    with CountCollectives() as refresh:
        teacher.refresh()
    covered = sum(fragment.length for fragment in teacher.fragments)
    return {
        "shard_error": shard_error,
        "forward_error": forward_error,
        "target_error": target_error,
        "update": update.calls,
        "refresh": refresh.calls,
        "covered": covered,
        "teacher_numel": sum(average[n].numel() for n in names),
    }

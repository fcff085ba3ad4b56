"""Jobs that train the tiny model under DeepSpeed: a layout's curve and gradients, the teacher against an oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from megad2v.config.schema import ParallelConfig
from megad2v.parallel.topology import Axis

TENSOR = [Axis(0, 1)]
"""The tensor-parallel axis of this process's engine, for `whole`."""


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

    world = distributed.start(tensor_parallel=arguments.get("tensor", 1))
    torch.set_num_threads(1)
    from megad2v.teacher.ema import ShardedTeacher
    from megad2v.training.setup import build_engine
    from tests.distributed.layouts import deepspeed_config, tiny_config

    config = tiny_config(
        micro_batches=arguments["micro_batches"], steps=arguments["schedule_steps"], scope=arguments["scope"]
    )
    parallel = ParallelConfig(tensor=arguments.get("tensor", 1), sequence=arguments.get("sequence", False))
    config = replace(
        config,
        parallel=parallel,
        teacher=replace(config.teacher, resident=arguments.get("resident", False)),
        train=replace(config.train, compile=arguments.get("compile", False)),
    )
    ds = deepspeed_config(config, arguments["layout"], world.data.size, arguments.get("persistence"))
    engine = build_engine(config, ds, world)
    TENSOR[:] = [world.tensor]
    return world, config, engine, ShardedTeacher(engine)


def gathered(engine: Any, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Full weights by DeepSpeed's own gathering, not by our fragments; tensor-parallel slices are laid end to end,
    copies must be equal to the bit. Collective."""
    if engine.state.stage < 3:
        return {name: whole(p, p.detach()) for name, p in module.named_parameters()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: whole(p, p.detach()) for name, p in module.named_parameters()}


def whole(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """`value` (of `parameter`, or its gradient) over all tensor-parallel ranks. Collective."""
    axis = TENSOR[0]
    if axis.size == 1:
        return value.clone()
    parts = [torch.empty_like(value) for _ in range(axis.size)]
    torch.distributed.all_gather(parts, value.contiguous(), group=axis.group)
    if getattr(parameter, "tensor_model_parallel", False):
        return torch.cat(parts)
    assert all(torch.equal(parts[0], part) for part in parts[1:]), "replicated parameters have drifted apart"
    return parts[0]


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
    take = engine.deepspeed._take_model_step

    def look_and_take(*arguments: Any, **words: Any) -> None:
        # With an offloaded optimizer the reduction happens inside step(), before this.
        if not gradients:
            gradients.update({n: whole(p, safe_get_full_grad(p)) for n, p in engine.student.named_parameters()})
        take(*arguments, **words)

    engine.deepspeed._take_model_step = look_and_take
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

"""Jobs that train the tiny model under DeepSpeed: a layout's curve and gradients, the teacher against an oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from megad2v.modalities.build import copied_prefixes
from megad2v.parallel.topology import Axis, Topology
from tests.distributed.layouts import Layout


class CountCollectives(TorchDispatchMode):
    """Counts what is sent while it is active: every c10d operation passes torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            # The output of a gather comes first and is its size on every rank.
            self.calls.append((func._schema.name, tensors[0].numel() * tensors[0].element_size()))
        return func(*args, **(kwargs or {}))


@dataclass
class Trainer:
    """An engine on one layout and what belongs to it; every layout trains under the guard, as runs do."""

    world: Any
    config: Any
    engine: Any
    teacher: Any

    def __post_init__(self) -> None:
        from megad2v.engine.guard import Guard
        from megad2v.engine.watchdog import Watchdog

        self.guard = Guard(self.engine, self.world, Watchdog(), limit=60.0)

    def step(self, step: int, statistics: Any = None, blocks: tuple[int, ...] | None = None) -> list[int]:
        """One step on this rank's micro-batches; returns their masked counts. `blocks` of the student run (None:
        all)."""
        from tests.distributed.layouts import micro_batch_of

        world, config = self.world, self.config
        places = range(world.data.rank, config.train.micro_batches_per_step, world.data.size)
        batches = [micro_batch_of(config, step, m) for m in places]
        self.step_on(step, batches, statistics, blocks)
        return [batch.masked_count() for batch in batches]

    def step_on(
        self,
        step: int,
        batches: list[Any],
        statistics: Any = None,
        blocks: tuple[int, ...] | None = None,
        *,
        agreed: list[Any] | None = None,
    ) -> None:
        """One step on `batches` through the trainer's own `take_step`. `agreed`: what this rank tells the others that
        it takes, where that is not true."""
        from megad2v.config.parts import loss_weight
        from megad2v.training.proposal import propose
        from megad2v.training.schedules import rates_at
        from megad2v.training.step import count_step, take_step

        world, config, depth = self.world, self.config, self.config.model.depth
        told = batches if agreed is None else agreed
        proposal = propose(told, kind="training", step=step, updates=step, depth=depth, blocks=blocks)
        counts = count_step(batches, world, lambda own: self.guard.agree(proposal, own))
        _, decay = rates_at(config, step)
        taken = take_step(
            self.engine,
            self.teacher,
            batches,
            counts,
            world=world,
            seed=1,
            step=step,
            learning_rate=config.optimizer.lr,
            decay=decay,
            loss_weight=loss_weight(config, batches[0].modality),
            statistics=statistics,
            blocks=blocks,
            guard=self.guard,
        )
        assert taken


def start() -> Any:
    """The process group; engines of several layouts may follow one another in it, smaller tensor sizes first (DeepSpeed
    remembers the last mpu)."""
    from megad2v.engine import distributed

    world = distributed.start()
    torch.set_num_threads(1)
    return world


def build(world: Any, config: Any, layout: Layout, *, prefetch: int | None = None) -> Trainer:
    """`config` trained on `layout`; `prefetch` is ZeRO-3's bucket in elements. Collective."""
    from megad2v.teacher.ema import ShardedTeacher
    from megad2v.training.setup import build_engine
    from tests.distributed.layouts import deepspeed_config

    print(f"--- {layout}", flush=True)
    torch.compiler.reset()
    if layout.tensor > 1:
        world = replace(world, topology=Topology(layout.tensor, "cpu"))
    config = layout.apply(config)
    ds = deepspeed_config(config, layout.zero, world.data.size, layout.persistence, layout.precision, prefetch)
    engine = build_engine(config, ds, world)
    return Trainer(world, config, engine, ShardedTeacher(engine, copied=copied_prefixes(config)))


def gathered(engine: Any, module: torch.nn.Module, axis: Axis | None = None) -> dict[str, torch.Tensor]:
    """Full weights by DeepSpeed's own gathering, not by our fragments; the slices of tensor-parallel axis `axis` are
    laid end to end, copies must be equal to the bit. Collective."""
    if engine.state.stage < 3 or not any(hasattr(p, "ds_tensor") for p in module.parameters()):
        return {name: whole(p, p.detach(), axis) for name, p in module.named_parameters()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: whole(p, p.detach(), axis) for name, p in module.named_parameters()}


def whole(parameter: torch.nn.Parameter, value: torch.Tensor, axis: Axis | None) -> torch.Tensor:
    """`value` (of `parameter`, or its gradient) over all tensor-parallel ranks. Collective."""
    if axis is None or axis.size == 1:
        return value.clone()
    parts = [torch.empty_like(value) for _ in range(axis.size)]
    torch.distributed.all_gather(parts, value.contiguous(), group=axis.group)
    if getattr(parameter, "tensor_model_parallel", False):
        joined, rows = torch.cat(parts), parameter.shard.full_shape[0]
        assert not joined[rows:].any(), "padding behind a vocabulary is not zeros"
        return joined[:rows].clone()
    drift = max(float((parts[0] - part).abs().max()) for part in parts)
    assert drift == 0, f"copies of a parameter {tuple(value.shape)} have drifted apart by {drift:.1e}"
    return parts[0]


def curves(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train on each of `layouts`, one after the other. By name: losses and norms of all steps, this rank's masked
    counts; step-1 gradients and final weights go to NAME.KIND.safetensors, a checkpoint to NAME/."""
    world = start()
    layouts = sorted((Layout(**fields) for fields in arguments["layouts"]), key=lambda layout: layout.tensor)
    return {str(layout): _curve(world, layout, arguments["steps"], output) for layout in layouts}


def _curve(world: Any, layout: Layout, steps: int, output: Path) -> dict[str, Any]:
    """The gradients come from DeepSpeed's own accessor, the weights from its own gathering."""
    from deepspeed.utils import safe_get_full_grad

    from megad2v.engine.distributed import sum_over
    from megad2v.metrics.statistics import StepStatistics
    from tests.distributed.layouts import kept_in, tiny_config

    config = tiny_config(steps=steps, modality=layout.modality, teacher_sees=layout.teacher_sees)
    trainer = build(world, config, layout)
    world, config, engine, axis = trainer.world, trainer.config, trainer.engine, trainer.world.tensor
    gradients: dict[str, torch.Tensor] = {}
    take = engine.deepspeed._take_model_step

    def look_and_take(*words: Any, **more: Any) -> None:
        # With an offloaded optimizer the reduction happens inside step(), before this.
        if not gradients:
            gradients.update({n: whole(p, safe_get_full_grad(p), axis) for n, p in engine.student.named_parameters()})
        take(*words, **more)

    engine.deepspeed._take_model_step = look_and_take
    losses, norms, counts = [], [], []
    for step in range(steps):
        statistics = StepStatistics(config.model.width, world.device)
        counts.append(trainer.step(step, statistics, kept_in(config, step)))
        sum_over(world.data, statistics.sums)
        losses.append(statistics.read()["loss"])
        norms.append(engine.gradient_norm())
    student, average = gathered(engine, engine.student, axis), gathered(engine, engine.teacher_module, axis)
    if world.is_main:
        for kind, tensors in (("gradients", gradients), ("student", student), ("teacher", average)):
            save_file({n: v.contiguous() for n, v in tensors.items()}, output / f"{layout}.{kind}.safetensors")
    _save(trainer, output / str(layout))
    return {"losses": losses, "norms": norms, "counts": counts}


def _save(trainer: Trainer, directory: Path) -> None:
    """A checkpoint, by the trainer's own function. Collective."""
    from megad2v.training.state import Progress, save

    save(
        directory,
        trainer.engine,
        trainer.teacher,
        Progress(step=1),
        trainer.config,
        world=trainer.world,
        data_fingerprint="none",
    )


def oracles(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """By layout, what `_oracle` returns."""
    world = start()
    layouts = sorted((Layout(**fields) for fields in arguments["layouts"]), key=lambda layout: layout.tensor)
    return {str(layout): _oracle(world, layout, arguments["steps"]) for layout in layouts}


def _oracle(world: Any, layout: Layout, steps: int) -> dict[str, Any]:
    """Train for many steps; average, in float64 and on the full model, the students that DeepSpeed gathers.

    Returns the largest relative error of the teacher's shards and of the weights that its forward sees, the error of
    the targets it computes in the NEXT forward (a stale weight shows there), and what update and refresh sent.
    """
    from megad2v.modalities.build import build_teacher
    from megad2v.training.schedules import rates_at
    from tests.distributed.layouts import kept_in, micro_batch_of, tiny_config

    config = tiny_config(micro_batches=layout.data, steps=steps, scope=layout.scope, modality=layout.modality)
    trainer = build(world, config, layout)
    world, config, engine, teacher = trainer.world, trainer.config, trainer.engine, trainer.teacher
    axis = world.tensor
    full = {n: p.double() for n, p in gathered(engine, engine.student, axis).items()}
    names = [name for name, _ in engine.teacher_module.named_parameters()]
    average = {name: full[name].clone() for name in names}
    plain = build_teacher(config)
    target_error = 0.0
    for step in range(steps):
        trainer.step(step, blocks=kept_in(config, step))
        _, decay = rates_at(config, step)
        now = gathered(engine, engine.student, axis)
        for name in names:
            if name.startswith(tuple(copied_prefixes(config))):
                average[name].copy_(now[name])
            else:
                average[name].mul_(decay).add_(now[name].double(), alpha=1 - decay)
        if step % 100 == 99 or step < 3:
            plain.load_state_dict({n: v.float() for n, v in average.items()}, strict=False)
            inputs = micro_batch_of(config, step, 0).inputs[:2]
            view = torch.randn(2, 10, config.model.width, generator=torch.Generator().manual_seed(step))
            seen, expected = engine.teacher(inputs, view, None), plain(inputs, view, None)
            target_error = max(target_error, float((seen - expected).norm() / expected.norm()))
    shard_error, covered, copied_numel, copied_differ = 0.0, 0, 0, 0
    for fragment, shard in zip(teacher.fragments, teacher.averages, strict=True):
        truth = average[fragment.name].flatten()[fragment.start : fragment.start + fragment.length]
        error = float((shard.double() - truth).norm() / truth.norm().clamp_min(1e-12))
        shard_error = max(shard_error, error)
        if fragment.name.startswith(tuple(copied_prefixes(config))):
            copied_differ += int((shard != fragment.master).sum())
            copied_numel += fragment.length
        covered += fragment.length * (fragment.split or axis.rank == 0)
    forward = gathered(engine, engine.teacher_module, axis)
    forward_error = max(float((forward[n].double() - average[n]).norm() / average[n].norm()) for n in names)
    with CountCollectives() as update:
        teacher.update(0.5)
    with CountCollectives() as refresh:
        teacher.refresh()
    return {
        "shard_error": shard_error,
        "forward_error": forward_error,
        "target_error": target_error,
        "update": update.calls,
        "refresh": refresh.calls,
        "covered": covered,
        "copied_numel": copied_numel,
        "copied_differ": copied_differ,
        "teacher_numel": sum(average[n].numel() for n in names),
        "own_numel": sum(getattr(p, "ds_numel", p.numel()) for p in engine.teacher_module.parameters()),
    }

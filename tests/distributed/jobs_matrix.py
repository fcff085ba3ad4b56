"""Jobs of the layout matrix: train, save and go on; load what others saved, and go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.distributed.jobs_layout import Trainer, build, gathered, start, whole
from tests.distributed.layouts import Layout, matrix_config

BEFORE, AFTER = 5, 5
"""Steps up to the save, and after it."""


def visit(arguments: dict[str, Any], output: Path) -> dict[str, Any]:
    """On each of `layouts`: save there if its name is in `save`, then load the `load[name]` that others (or it) saved.

    Returns by layout name: `went_on`, losses and gradient norms after the save; `loaded`, by source, what `_load` does.
    Checkpoints, the truth that they are compared with, and the ends of the runs lie in `folder`.
    """
    world, results, folder = start(), {}, Path(arguments["folder"])
    layouts = sorted((Layout(**fields) for fields in arguments["layouts"]), key=lambda layout: layout.tensor)
    for layout in layouts:
        result: dict[str, Any] = {}
        if str(layout) in arguments["save"]:
            result["went_on"] = _save(build(world, matrix_config(), layout), layout, folder)
        sources = arguments["load"].get(str(layout), [])
        if sources:
            trainer = build(world, matrix_config(), layout)  # anew: a run resumes into an engine that never trained
            result["loaded"] = {source: _load(trainer, source, folder) for source in sources}
        results[str(layout)] = result
    return results


def _save(trainer: Trainer, layout: Layout, folder: Path) -> dict[str, Any]:
    from megad2v.training.state import Progress, save

    _train(trainer, 0, BEFORE)
    state = _state(trainer)
    save(
        folder / str(layout),
        trainer.engine,
        trainer.teacher,
        Progress(step=BEFORE, updates=BEFORE),
        trainer.config,
        world=trainer.world,
        data_fingerprint="none",
    )
    curve = _train(trainer, BEFORE, AFTER)
    end = _state(trainer)
    if trainer.world.is_main:
        save_file(state, folder / f"{layout}.saved.safetensors")
        save_file(end, folder / f"{layout}.end.safetensors")
    uneven = [p for p in trainer.engine.student.parameters() if getattr(p, "ds_numel", p.numel()) % 4]
    return {**curve, "uneven": len(uneven)}


def _load(trainer: Trainer, source: str, folder: Path) -> dict[str, Any]:
    """Load, compare, take AFTER steps, compare. On every rank: names of tensors that differ from what was saved, number
    of tensors, the curve; at the end, tensors not equal to the bit and the largest relative error of one.

    What is compared was gathered by DeepSpeed on either side, so that no code of ours vouches for itself."""
    from megad2v.checkpoint.reader import Checkpoint
    from megad2v.training.state import load

    progress = load(Checkpoint(folder / source), trainer.engine, trainer.teacher)
    assert progress.step == progress.updates == BEFORE
    state, saved = _state(trainer), load_file(folder / f"{source}.saved.safetensors")
    assert set(state) == set(saved)
    differing = [name for name, value in state.items() if not torch.equal(value, saved[name])]
    curve = _train(trainer, BEFORE, AFTER)
    ours, theirs = _state(trainer), load_file(folder / f"{source}.end.safetensors")
    errors = {
        name: float((value.double() - theirs[name].double()).norm() / theirs[name].double().norm().clamp_min(1e-3))
        for name, value in ours.items()
        if not name.startswith("exp_avg")
    }
    return {
        **curve,
        "differing": differing,
        "tensors": len(state),
        "unequal_at_end": sum(not torch.equal(value, theirs[name]) for name, value in ours.items()),
        "error_at_end": max(errors.values()),
    }


def _train(trainer: Trainer, first: int, steps: int) -> dict[str, list[float]]:
    from megad2v.engine.distributed import sum_over
    from megad2v.metrics.statistics import StepStatistics

    losses, norms = [], []
    for step in range(first, first + steps):
        statistics = StepStatistics(trainer.config.model.width, trainer.world.device)
        trainer.step(step, statistics)
        sum_over(trainer.world.data, statistics.sums)
        losses.append(statistics.read()["loss"])
        norms.append(trainer.engine.gradient_norm())
    return {"losses": losses, "norms": norms}


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Masters, moments, forward weights of student and teacher, and the teacher's averages, each whole. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine, axis, tensors = trainer.engine, trainer.world.tensor, {}
    if engine.state.stage < 3:
        # DeepSpeed 0.19.8 links parameters to moments after the first group's first step, when the second has none yet.
        engine.deepspeed.optimizer._hp_optimizer_states_linked = False
        engine.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.student.named_parameters():
        tensors[f"master/{name}"] = whole(parameter, safe_get_full_fp32_param(parameter), axis)
        for moment in ("exp_avg", "exp_avg_sq"):
            value = safe_get_full_optimizer_state(parameter, moment)
            tensors[f"{moment}/{name}"] = whole(parameter, value.view(_own_shape(parameter)), axis)
    for kind, module in (("student", engine.student), ("teacher", engine.teacher_module)):
        for name, value in gathered(engine, module, axis).items():
            tensors[f"{kind}/{name}"] = value
    return {name: value.detach().float().contiguous().clone() for name, value in tensors.items()}


def _own_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """This tensor-parallel rank's shape, partitioned or not."""
    return getattr(parameter, "ds_shape", parameter.shape)

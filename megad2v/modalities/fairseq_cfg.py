"""What the configurations of fairseq's data2vec models share: objective, teacher, optimizer and schedule, both ways.

Names and defaults are those of the dataclasses in fairseq's examples/data2vec/models, fairseq/optim/adam.py and
fairseq/optim/lr_scheduler (3d262bb). Values are plain Python: a fairseq checkpoint holds no class of ours.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from megad2v.config.schema import Config, LossConfig, TargetsConfig, TeacherConfig
from megad2v.errors import UserError

NORM_EPS = 1e-5
"""Of every layer norm of fairseq's: torch's default, which no key changes."""

Rules = Iterable[tuple[str, bool, str]]
"""(our key, whether it is at odds, what the other program does)."""


def refuse(program: str, rules: Rules) -> None:
    """Raises UserError for the first of `rules` that is broken."""
    for key, wrong, words in rules:
        if wrong:
            raise UserError(f"{key}: {program} {words}")


def objective_rules(config: Config, tensor: str) -> Rules:
    """What holds for all of fairseq's data2vec models; `tensor` is what the one in question makes targets of."""
    model, targets, loss = config.model, config.targets, config.loss
    return (
        ("model.norm_eps", model.norm_eps != NORM_EPS, f"norms with {NORM_EPS:g}; {model.norm_eps:g} has no place"),
        ("model.deep_norm", model.deep_norm, "does not scale residuals; DeepNorm has no place"),
        ("targets.tensor", targets.tensor != tensor, f"makes targets of {tensor}; {targets.tensor} has no place"),
        ("targets.average", not targets.average, "regresses the average of the layers alone"),
        ("targets.shuffle", targets.shuffle, "never permutes targets: the control experiment has no place"),
        ("loss.variance_weight", loss.variance_weight != 0, "has no variance term"),
        ("teacher.context", config.teacher.context != 1.0, "has a teacher that sees all of its input"),
    )


def objective_keys(config: Config) -> dict[str, Any]:
    """Keys of the section `model` that say what is regressed on what, and how the teacher follows."""
    targets, loss, teacher, width = config.targets, config.loss, config.teacher, config.model.width
    scale = {"rsqrt_width": 0.0 if config.modality == "text" else None, "mean": 1.0 / width, "sum": 1.0}[loss.scale]
    return {
        "average_top_k_layers": targets.layers,
        "layer_norm_target_layer": targets.layer_norm == "layer",
        "instance_norm_target_layer": targets.layer_norm == "instance",
        "batch_norm_target_layer": False,
        "layer_norm_targets": targets.average_norm == "layer",
        "instance_norm_targets": targets.average_norm == "instance",
        "loss_beta": float(loss.beta) if loss.kind == "smooth_l1" else 0.0,
        "loss_scale": scale,
        "ema_decay": float(teacher.decay_start),
        "ema_end_decay": float(teacher.decay_end),
        "ema_anneal_end_step": teacher.decay_steps or max(1, config.train.steps),
    }


def with_objective(config: Config, model: Mapping[str, Any]) -> Config:
    """`config` with the objective of a fairseq `model` section. Raises UserError for what has no place in ours."""
    for key in ("batch_norm_target_layer", "group_norm_target_layer"):
        if model.get(key):
            raise UserError(f"model.{key}: our targets know layer and instance norm only")
    beta, width = float(model.get("loss_beta") or 0.0), config.model.width
    norms = (
        _norm(model, "layer_norm_target_layer", "instance_norm_target_layer"),
        _norm(model, "layer_norm_targets", "instance_norm_targets"),
    )
    # Theirs takes the last K of a list, which may be fewer.
    layers = min(int(model.get("average_top_k_layers", 8)), config.model.depth)
    targets: TargetsConfig = replace(config.targets, layers=layers, layer_norm=norms[0], average_norm=norms[1])
    loss: LossConfig = replace(
        config.loss,
        kind="smooth_l1" if beta else "mse",
        beta=beta,
        scale=_scale(model.get("loss_scale"), config, width),
    )
    teacher: TeacherConfig = replace(
        config.teacher,
        decay_start=float(model.get("ema_decay", 0.999)),
        decay_end=float(model.get("ema_end_decay", 0.9999)),
        decay_steps=int(model["ema_anneal_end_step"]) if model.get("ema_anneal_end_step") else None,
    )
    return replace(config, targets=targets, loss=loss, teacher=teacher)


def _norm(model: Mapping[str, Any], layer: str, instance: str) -> str:
    if model.get(layer) and model.get(instance):
        raise UserError(f"model.{layer}: is on together with {instance}; our targets have one norm there")
    return "layer" if model.get(layer) else "instance" if model.get(instance) else "none"


def _scale(theirs: float | None, config: Config, width: int) -> str:
    if theirs is None or (theirs <= 0 and config.modality == "text"):
        return "rsqrt_width"
    if theirs <= 0:  # the vision port multiplies by what is above 0 only
        return "sum"
    for ours, value in (("sum", 1.0), ("mean", 1.0 / width), ("rsqrt_width", width**-0.5)):
        if math.isclose(theirs, value, rel_tol=1e-6):
            return ours
    raise UserError(f"model.loss_scale: {theirs}; ours knows 1, 1/D and 1/sqrt(D) (loss.scale)")


def training_sections(config: Config) -> dict[str, dict[str, Any]]:
    """Everything beside `task` and `model`: what a person reads, and what fairseq would continue with."""
    optimizer, schedule, train, budget = config.optimizer, config.schedule, config.train, config.data.micro_batch
    steps, lr = max(1, train.steps), [float(optimizer.lr)]
    dataset: dict[str, Any] = {"num_workers": config.data.workers, "skip_invalid_size_inputs_valid_test": True}
    if budget.samples is not None:
        dataset["batch_size"] = budget.samples
    else:
        dataset["max_tokens"] = round(budget.seconds * 16_000) if budget.seconds is not None else budget.tokens
    schedules: dict[str, dict[str, Any]] = {
        "cosine": {"warmup_updates": schedule.warmup_steps, "warmup_init_lr": float(schedule.start_lr)}
        | {"min_lr": float(schedule.min_lr), "lr": lr, "max_update": steps},
        "constant": {"warmup_updates": schedule.warmup_steps, "lr": lr},
        "tri_stage": {"phase_ratio": _phases(schedule.warmup_steps / steps, schedule.hold_fraction)}
        | {"init_lr_scale": float(schedule.final_scale), "final_lr_scale": float(schedule.final_scale)}
        | {"lr": lr, "max_update": steps},
    }
    first, second = optimizer.betas
    return {
        "common": {"seed": train.seed, "fp16": False, "log_format": "json", "log_interval": 200},
        "checkpoint": {"save_interval_updates": train.save_every, "no_epoch_checkpoints": True},
        "dataset": dataset,
        "distributed_training": {
            "distributed_world_size": train.micro_batches_per_step,
            "ddp_backend": "legacy_ddp",
        },
        "criterion": {"_name": "model", "log_keys": ["ema_decay", "target_var", "pred_var"]},
        "optimization": {"max_update": steps, "lr": lr, "clip_norm": float(optimizer.clip), "update_freq": [1]},
        "optimizer": {
            "_name": "adam",
            "adam_betas": f"({first:g},{second:g})",
            "adam_eps": float(optimizer.eps),
            "weight_decay": float(optimizer.weight_decay),
            "lr": lr,
        },
        "lr_scheduler": {"_name": {"constant": "fixed"}.get(schedule.kind, schedule.kind), **schedules[schedule.kind]},
    }


def _phases(warmup: float, hold: float) -> list[float]:
    """Warm-up, hold and decay, which have to add up to 1 (fairseq asserts it in floating point)."""
    warmup = min(warmup, 1.0 - hold)
    return [warmup, hold, 1.0 - warmup - hold]


def with_training(config: Config, cfg: Mapping[str, Any]) -> Config:
    """`config` with optimizer and schedule of a fairseq cfg, where it has them; nothing that weights depend on."""
    optimization, adam = _section(cfg, "optimization"), _section(cfg, "optimizer")
    scheduler, steps = _section(cfg, "lr_scheduler"), None
    optimizer = config.optimizer
    if optimization.get("max_update"):
        steps = int(optimization["max_update"])
    if optimization.get("lr"):
        optimizer = replace(optimizer, lr=float(_first(optimization["lr"])))
    if optimization.get("clip_norm") is not None:
        optimizer = replace(optimizer, clip=float(optimization["clip_norm"]))
    if adam.get("_name") == "adam":
        betas = adam.get("adam_betas", "(0.9, 0.999)")
        first, second = ast.literal_eval(betas) if isinstance(betas, str) else betas
        optimizer = replace(
            optimizer,
            betas=(float(first), float(second)),
            eps=float(adam.get("adam_eps", 1e-8)),
            weight_decay=float(adam.get("weight_decay", 0.0)),
        )
    schedule = config.schedule
    if scheduler.get("_name") == "cosine":
        warmup = int(scheduler.get("warmup_updates", 0))
        schedule = replace(schedule, kind="cosine", warmup_steps=warmup, min_lr=float(scheduler.get("min_lr", 0.0)))
    elif scheduler.get("_name") == "tri_stage" and scheduler.get("phase_ratio") and steps:
        phases = scheduler["phase_ratio"]
        phases = ast.literal_eval(phases) if isinstance(phases, str) else phases
        schedule = replace(
            schedule, kind="tri_stage", warmup_steps=int(phases[0] * steps + 0.5), hold_fraction=float(phases[1])
        )
    return replace(config, optimizer=optimizer, schedule=schedule)


def _section(cfg: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = cfg.get(name)
    return found if isinstance(found, Mapping) else {}


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value

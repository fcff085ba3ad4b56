"""Learning rate and decay as functions of updates (spec 6.4; fairseq's schedulers, and the BEiT fork's cosine)."""

from __future__ import annotations

import math

from megad2v.config.schema import Config, ScheduleConfig
from megad2v.teacher.schedule import decay_at


def rates_at(config: Config, updates: int) -> tuple[float, float]:
    """Learning rate of the update that follows `updates`, and decay with which the average absorbs its result."""
    train, teacher = config.train, config.teacher
    rate = learning_rate(updates, peak=config.optimizer.lr, steps=train.steps, schedule=config.schedule)
    decay = decay_at(
        updates + 1,
        start=teacher.decay_start,
        end=teacher.decay_end,
        steps=train.steps if teacher.decay_steps is None else teacher.decay_steps,
    )
    return rate, decay


def learning_rate(update: int, *, peak: float, steps: int, schedule: ScheduleConfig) -> float:
    """Rate of the update that follows `update` updates, `steps` in all."""
    if schedule.kind == "tri_stage":
        return _tri_stage(update, peak=peak, steps=steps, schedule=schedule)
    warmup = schedule.warmup_steps
    if update < warmup:
        last = max(1, warmup - 1) if schedule.peak_in_warmup else warmup
        return schedule.start_lr + update * (peak - schedule.start_lr) / last
    if schedule.kind == "constant":
        return peak
    progress = min(1.0, (update - warmup) / max(1, steps - warmup))
    return schedule.min_lr + 0.5 * (peak - schedule.min_lr) * (1.0 + math.cos(math.pi * progress))


def _tri_stage(update: int, *, peak: float, steps: int, schedule: ScheduleConfig) -> float:
    """Linear from final_scale x peak, hold, exponential decay back to it."""
    warmup, hold = schedule.warmup_steps, int(schedule.hold_fraction * steps)
    decay = max(1, steps - warmup - hold)
    low = schedule.final_scale * peak
    if update < warmup:
        return low + update * (peak - low) / warmup
    if update < warmup + hold:
        return peak
    into = min(update - warmup - hold, decay)
    return peak * math.exp(math.log(schedule.final_scale) * into / decay)


def schedule_remarks(config: Config) -> list[str]:
    """A line where the run is too short for its schedule, as a recipe's is when only train.steps is lowered."""
    schedule, steps = config.schedule, config.train.steps
    hold = int(schedule.hold_fraction * steps) if schedule.kind == "tri_stage" else 0
    if schedule.warmup_steps + hold < steps:
        return []
    peak = "never reaches its peak" if schedule.warmup_steps >= steps else "never comes down"
    return [
        f"schedule: warm-up of {schedule.warmup_steps:,} of {steps:,} steps{f' and hold of {hold:,}' if hold else ''}: "
        f"the learning rate {peak}; lower schedule.warmup_steps"
    ]

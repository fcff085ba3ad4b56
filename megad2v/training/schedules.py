"""Learning rate as a function of updates taken (spec 6.4; fairseq's schedulers, and the BEiT fork's cosine)."""

from __future__ import annotations

import math

from megad2v.config.schema import ScheduleConfig


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

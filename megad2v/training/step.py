"""One optimizer step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megad2v.engine.distributed import World, sum_over
from megad2v.engine.gradients import both_finite
from megad2v.engine.guard import Guard
from megad2v.engine.setup import TrainingEngine
from megad2v.engine.watchdog import Watchdog
from megad2v.metrics.statistics import StepStatistics
from megad2v.modalities.batch import Batch
from megad2v.teacher.ema import ShardedTeacher
from megad2v.training.verdict import Verdict


@dataclass(frozen=True)
class StepCounts:
    """Global counts of one step, known before its first backward."""

    masked: int
    samples: int
    dropped: int
    positions: int
    """Of all samples, without padding."""
    squares: int
    """Sum over samples of their positions squared."""


def count_step(
    batches: Sequence[Batch], world: World, agree: Callable[[Sequence[int]], list[int]] | None = None
) -> StepCounts:
    """The step's counts over all data-parallel ranks: five integers, summed by `agree` along with what the guard
    compares, or without one in an all-reduce on the device."""
    counts = torch.zeros(5, dtype=torch.int64)
    for batch in batches:
        own = (batch.masked_count(), len(batch.sample_ids), len(batch.dropped), *batch.position_counts())
        counts += torch.tensor(own)
    if agree is not None:
        return StepCounts(*agree(counts.tolist()))
    return StepCounts(*sum_over(world.data, counts.to(world.device)).tolist())


def seed_forward(seed: int, step: int, micro_batch: int) -> None:
    """Seed dropout, drop path and shuffling from the micro-batch's place in the step, so that they depend neither on
    the number of ranks nor on restarts."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))


def take_step(
    engine: TrainingEngine,
    teacher: ShardedTeacher,
    batches: Sequence[Batch],
    counts: StepCounts,
    *,
    world: World,
    seed: int,
    step: int,
    learning_rate: float,
    decay: float,
    loss_weight: float = 1.0,
    statistics: StepStatistics | None,
    verdict: Verdict | None = None,
    losses: list[Tensor] | None = None,
    blocks: Collection[int] | None = None,
    guard: Guard | None = None,
    before_update: Callable[[], None] | None = None,
) -> bool:
    """Forward and backward of this rank's micro-batches (all of one modality), verdict, update, EMA. False where the
    step was refused: then neither weights nor moments nor teacher have changed. Collective, the same on every rank.

    `loss_weight` is a factor on the gradient alone: losses are judged and logged without it. Without a `verdict` every
    finite step is taken. `losses` takes in each micro-batch's summed loss, on the device.
    `blocks` of the student run (None: all); `guard` holds the forwards to what all ranks agreed on. `before_update` is
    called when the backwards are done and nothing that a checkpoint holds has changed yet.
    """
    losses = [] if losses is None else losses
    watch = guard.watch if guard is not None else Watchdog()
    for place, batch in enumerate(batches):
        seed_forward(seed, step, world.data.rank + place * world.data.size)
        batch = batch.to(world.device)
        with guard.forward(place) if guard is not None else nullcontext():
            loss_sum, prediction_nd, target_nd = engine.forward(
                batch.inputs, batch.mask_bmt, batch.padding_bt, blocks, batch.modality
            )
        watch.at("backward")
        engine.backward(loss_sum * loss_weight, counts.masked)
        losses.append(loss_sum.detach())
        if statistics is not None:
            statistics.add(loss_sum, prediction_nd, target_nd)
    if guard is not None:
        guard.finish()
    watch.at("update", samples=())
    if before_update is not None:
        before_update()
    loss = torch.stack(losses).double().sum() / max(1, counts.masked)
    judge = both_finite if verdict is None else partial(verdict.judge, batches[0].modality)
    taken = engine.step(learning_rate, loss, judge)
    if taken:
        watch.at("teacher")
        teacher.update(decay)
        teacher.refresh()
    return taken

"""Held-out validation: the objective, and whether predictions find their own targets."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch

from megad2v.engine.distributed import World, sum_over
from megad2v.engine.guard import Guard
from megad2v.engine.setup import TrainingEngine
from megad2v.metrics.statistics import StepStatistics, retrieval_hits
from megad2v.modalities.batch import Batch
from megad2v.training.proposal import propose


@torch.no_grad()
def validate(
    engine: TrainingEngine,
    batches: Iterable[Batch],
    *,
    world: World,
    width: int,
    guard: Guard | None = None,
    step: int = 0,
) -> dict[str, float]:
    """`valid_loss` per masked position, `valid_retrieval` (fraction of predictions nearest to their own target among
    the micro-batch's masked ones), its chance level, and the spread of predictions and targets.

    Collective: every rank brings the same number of micro-batches, all of one modality; ranks that run out bring
    rows of weight zero. `guard` compares and watches each forward, as in training; `step` is only for its words.
    """
    statistics = StepStatistics(width, world.device)
    hits = torch.zeros(3, dtype=torch.int64, device=world.device)  # hits, chance hits, rows
    engine.deepspeed.eval()
    for batch in batches:
        if guard is not None:
            guard.agree(propose([batch], kind="validation", step=step, updates=0, depth=guard.depth))
        batch = batch.to(world.device)
        with guard.forward(0) if guard is not None else nullcontext():
            loss_sum, prediction_nd, target_nd = engine.forward(
                batch.inputs, batch.mask_bmt, batch.padding_bt, None, batch.modality
            )
        statistics.add(loss_sum, prediction_nd, target_nd)
        hits[0] += retrieval_hits(prediction_nd, target_nd)
        hits[1] += int(len(prediction_nd) > 0)
        hits[2] += len(prediction_nd)
        if guard is not None:
            guard.watch.at("validation", samples=())
    engine.deepspeed.train()
    sum_over(world.data, statistics.sums)
    found, chance, rows = sum_over(world.data, hits).tolist()
    read = statistics.read()
    return {
        "valid_loss": read["loss"],
        "valid_retrieval": found / max(1, rows),
        "valid_retrieval_chance": chance / max(1, rows),
        "valid_target_std": read["target_std"],
        "valid_pred_std": read["pred_std"],
    }

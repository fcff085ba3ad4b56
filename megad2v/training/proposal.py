"""What this rank would do in a step, in the words that engine.guard compares."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megad2v.engine.guard import Plan, Proposal, Seen
from megad2v.modalities.batch import Batch


def shape_class(batch: Batch) -> str:
    """What all ranks must share of a micro-batch's shape.

    Not its sizes, nor whether anything is padded: ranks drop different samples and meet different lengths, and run
    the same modules on them.
    """
    kind = str(batch.inputs.dtype).removeprefix("torch.")
    return f"{kind} inputs of {batch.inputs.dim()} dimensions with {batch.mask_bmt.shape[1]} mask(s)"


def seen(batch: Batch) -> Seen:
    """What the ranks of a tensor-parallel group must share of a micro-batch: all of it."""
    padded = batch.padding_bt is not None
    dropped = tuple(sample for sample, _ in batch.dropped)  # reasons may hold addresses of objects
    rest = (tuple(batch.inputs.shape), tuple(batch.mask_bmt.shape), padded, batch.fingerprints, dropped)
    return Seen(batch.sample_ids, hashlib.sha256(repr(rest).encode()).hexdigest())


def propose(
    batches: Sequence[Batch], *, kind: str, step: int, updates: int, depth: int, blocks: Sequence[int] | None = None
) -> Proposal:
    """This rank's forwards of one step: `blocks` of the student's `depth`, None for all."""
    run = tuple(range(depth)) if blocks is None else tuple(blocks)
    return Proposal(
        step,
        updates,
        tuple(Plan(kind, batch.modality, shape_class(batch), run) for batch in batches),
        tuple(seen(batch) for batch in batches),
    )

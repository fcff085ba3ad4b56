"""Which samples make up a micro-batch: a pure function of the step number.

The stream of samples runs on over the epochs (position k is in epoch k // n), so there is no short last step and no
rank that runs dry, also when a step holds more samples than the set. A step is M micro-batches; data-parallel rank r
of R computes m = r, r + R, ... in that order, so any R that divides M computes the same step.
"""

from __future__ import annotations

import numpy as np

from megad2v.config.schema import DataConfig
from megad2v.data.order import SampleOrder
from megad2v.errors import UserError


class Plan:
    """Step s, micro-batch m -> samples; `samples` per micro-batch, `micro_batches` (M) per step."""

    def __init__(self, order: SampleOrder, *, samples: int, micro_batches: int) -> None:
        self.order = order
        self.samples = samples
        self.micro_batches = micro_batches

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.samples * self.micro_batches

    def micro_batch(self, step: int, m: int) -> list[tuple[int, int]]:
        """(epoch, sample index) of each row of micro-batch m (0..M-1) of a step (0, 1, ...)."""
        first = (step * self.micro_batches + m) * self.samples
        stream = np.arange(first, first + self.samples, dtype=np.int64)
        epochs, positions = np.divmod(stream, self.order.size)
        rows: list[tuple[int, int]] = []
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            rows += [(epoch, int(index)) for index in self.order.indices(epoch, positions[epochs == epoch])]
        return rows

    def numbered(self, number: int) -> list[tuple[int, int]]:
        """The micro-batch by its running number, step * M + m."""
        return self.micro_batch(*divmod(number, self.micro_batches))


def rank_share(micro_batches: int, rank: int, world: int) -> range:
    """The m that one of `world` data-parallel ranks computes in every step.

    Raises UserError when the micro-batches cannot be shared equally.
    """
    if micro_batches < 1 or micro_batches % world:
        raise UserError(
            f"train.micro_batches_per_step: {micro_batches} cannot be shared equally by {world} data-parallel ranks; "
            f"make it a multiple of {world}"
        )
    return range(rank, micro_batches, world)


def micro_batch_samples(data: DataConfig) -> int:
    """Rows of a micro-batch of images. Raises UserError for budgets that belong to other modalities."""
    budget = data.micro_batch
    for name in ("tokens", "seconds"):
        if getattr(budget, name) is not None:
            raise UserError(
                f"data.micro_batch.{name}: images are counted in samples, {name} are for other modalities; "
                f"set data.micro_batch.samples and data.micro_batch.{name} null"
            )
    if budget.samples is None or budget.samples < 1:
        raise UserError(f"data.micro_batch.samples: expected a whole number of at least 1, got {budget.samples}")
    return budget.samples

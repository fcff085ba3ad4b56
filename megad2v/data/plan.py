"""Which samples make up a micro-batch: a pure function of its running number, step * M + m.

A step is M micro-batches; data-parallel rank r of R computes m = r, r + R, ... in that order, so any R that divides M
computes the same step, and the state is the step number.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np

from megad2v.config.schema import Config
from megad2v.data.buckets import BucketPlan, LengthBudget, Lengths, grouped_in_order
from megad2v.data.order import KeyedPermutation, SampleOrder
from megad2v.data.shardset import Samples
from megad2v.errors import UserError
from megad2v.modalities.speech.geometry import sample_count
from megad2v.modalities.text.transforms import SHORTEST_ROW

LONGEST_KEYS = {"speech": ("recordings", "speech.max_seconds"), "text": ("rows", "text.max_tokens")}
"""What samples that differ in length are called, and the key with the longest."""

Row = tuple[int, int]
"""(epoch, sample index)."""


class Plan(Protocol):
    """Micro-batches without end."""

    epoch_size: int
    """Samples of an epoch."""

    def numbered(self, number: int) -> list[Row]:
        """The rows of micro-batch `number` (0, 1, ...)."""
        ...

    def epochs(self, micro_batches: int) -> dict[str, float]:
        """Epochs in the first so many micro-batches, by data set; one without a name is ""."""
        ...


class SamplePlan:
    """Micro-batches of equally many samples, for samples of one size.

    The stream of samples runs on over the epochs (position k is in epoch k // n), so there is no short last step and no
    rank that runs dry, also when a step holds more samples than the set.
    """

    def __init__(self, order: SampleOrder, samples: int) -> None:
        self.epoch_size = order.size
        self._order = order
        self._samples = samples

    def numbered(self, number: int) -> list[Row]:
        """(epoch, sample index) of each row of micro-batch `number` (0, 1, ..., over all epochs)."""
        stream = np.arange(number * self._samples, (number + 1) * self._samples, dtype=np.int64)
        epochs, positions = np.divmod(stream, self.epoch_size)
        rows: list[Row] = []
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            rows += [(epoch, int(index)) for index in self._order.indices(epoch, positions[epochs == epoch])]
        return rows

    def epochs(self, micro_batches: int) -> dict[str, float]:
        """As Plan.epochs."""
        return {"": micro_batches * self._samples / self.epoch_size}


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


def length_budget(config: Config) -> LengthBudget | None:
    """What a micro-batch holds, for modalities whose samples differ in length; None for images."""
    if config.modality == "vision":
        return None
    speech, budget = config.speech, config.data.micro_batch
    if config.modality == "text":
        longest = config.text.max_tokens
        return LengthBudget(SHORTEST_ROW, longest, samples=budget.samples, total=budget.tokens or 0)
    return LengthBudget(
        shortest=sample_count(speech.min_seconds),
        longest=sample_count(speech.max_seconds),
        samples=budget.samples,
        total=sample_count(budget.seconds or 0),
    )


def training_plan(config: Config, shards: Samples, key: str = "data.shards") -> tuple[Plan, list[str]]:
    """The micro-batches of a run, and what people should know of them; `key` is the configuration key that named the
    shards. Raises UserError when no sample is left."""
    data, seed, budget = config.data, config.train.seed, length_budget(config)
    if budget is None:
        assert data.micro_batch.samples is not None  # config.validate
        order = SampleOrder(shards.shard_sizes, seed=seed, window=data.window)
        return SamplePlan(order, data.micro_batch.samples), []
    plan = BucketPlan(
        partial(_shard_row_lengths, config.modality, shards),
        shards.shard_sizes,
        budget,
        ratio=data.bucket_ratio,
        seed=seed,
        window=data.window,
    )
    remarks = _left_out(key, config, plan.left_out, plan.unknown, len(shards))
    buckets = "1 length bucket" if plan.buckets == 1 else f"{plan.buckets} length buckets"
    if config.modality == "text":
        remarks += _text_remarks(key, plan, len(shards))
    remarks.append(f"{key}: {buckets}, {plan.epoch_micro_batches} micro-batches an epoch")
    return plan, remarks


def validation_plan(config: Config, shards: Samples) -> tuple[list[list[Row]], list[str]]:
    """Micro-batches that hold every sample once, in order, and what people should know of them.

    Raises UserError when no sample is left.
    """
    budget = length_budget(config)
    if budget is None:
        assert config.data.micro_batch.samples is not None  # config.validate
        return in_order(len(shards), config.data.micro_batch.samples), []
    lengths = row_lengths(config.modality, shards.lengths())
    short, unknown = np.count_nonzero(budget.cropped(lengths) == 0), np.count_nonzero(lengths == 0)
    remarks = _left_out("data.valid", config, short, unknown, len(lengths))
    return [[(0, index) for index in group] for group in grouped_in_order(lengths, budget)], remarks


def row_lengths(modality: str, lengths: Lengths) -> Lengths:
    """Lengths as the budget counts them, 0 where unknown: text has `<s>` before its tokens."""
    return np.where(lengths > 0, lengths + 1, 0) if modality == "text" else lengths


def _shard_row_lengths(modality: str, shards: Samples, shard: int) -> Lengths:
    return row_lengths(modality, shards.shard_lengths(shard))


def _text_remarks(key: str, plan: BucketPlan, rows: int) -> list[str]:
    """What an epoch holds, and what it does not."""
    remarks = [f"{key}: {rows:,} rows of text, {plan.total:,} tokens an epoch, `<s>` included"]
    if plan.longer:
        remarks.append(
            f"{key}: {plan.longer:,} of {rows:,} documents are longer than text.max_tokens: an epoch has a "
            "window of each, where text.blocks complete_doc has all of their tokens"
        )
    return remarks


def in_order(total: int, size: int) -> list[list[Row]]:
    """Samples 0..total-1, `size` to a micro-batch."""
    return [[(0, index) for index in range(start, min(start + size, total))] for start in range(0, total, size)]


def shuffled(total: int, size: int, *, epochs: int, seed: int) -> list[list[Row]]:
    """`epochs` times all samples, each time in another order; the last micro-batch of an epoch may be smaller."""
    plan: list[list[Row]] = []
    for epoch in range(epochs):
        order = KeyedPermutation(total, "labelled", seed, epoch)(np.arange(total)).tolist()
        plan += [[(epoch, index) for index in order[start : start + size]] for start in range(0, total, size)]
    return plan


def _left_out(key: str, config: Config, short: int, unknown: int, total: int) -> list[str]:
    """A line about the samples that are too short, one about those of unknown length, if any.

    Raises UserError when all are too short.
    """
    remarks = []
    if short:  # of speech alone: no row of text is
        seconds = config.speech.min_seconds
        if short == total:
            raise UserError(
                f"{key}: all {short} recordings are shorter than speech.min_seconds, {seconds:g}; lower it, or give "
                "others"
            )
        remarks.append(f"{key}: {short} of {total} recordings, shorter than {seconds:g} s, are left out")
    if unknown:
        what, longest = LONGEST_KEYS[config.modality]
        remarks.append(
            f"{key}: {unknown} of {total} {what} cannot be measured and count as {longest}; "
            f"tools/make_shards.py {config.modality} names what is wrong with them"
        )
    return remarks

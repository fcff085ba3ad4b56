"""From a configuration to micro-batches: training (endless, resumable by step number), validation, probes.

torch's DataLoader runs the workers. Its items are whole micro-batches, planned beforehand, so workers share no state
and the stream is the same for any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from megad2v.config.parts import JOINT, joint_key, modalities, of_modality
from megad2v.config.schema import Config
from megad2v.data.blocks import BlockSet
from megad2v.data.format import read_dataset
from megad2v.data.mix import MixedPlan, MixedSamples, whole_weights
from megad2v.data.plan import Plan, Row, in_order, rank_share, shuffled, training_plan, validation_plan
from megad2v.data.shardset import Readable, Samples, ShardSet, about_key, pattern_of
from megad2v.data.turns import training_turns
from megad2v.data.workers import JointMicroBatches, MicroBatches, Stream
from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.modalities.sample import Mode, Transform
from megad2v.modalities.speech.transforms import SpeechTransform
from megad2v.modalities.text.transforms import TextTransform
from megad2v.modalities.vision.transforms import VisionTransform

TRANSFORMS: Mapping[str, Callable[[Config, Mode], Transform[Any]]] = {
    "vision": VisionTransform,
    "speech": SpeechTransform,
    "text": TextTransform,
}
"""Worker side of each modality."""


class TrainingLoader:
    """This rank's micro-batches, one optimizer step after the other, for ever.

    `rank` and `world` are data-parallel. Iterating yields list[Batch] of M / world micro-batches in the order of m,
    beginning with step `start_step` (the number of updates already planned for: the whole state). A sample that cannot
    be decoded is absent from its micro-batch (see Batch.dropped) and nothing else moves. In a joint run a step's
    micro-batches are of one modality: those that a run of it alone has at the step of its own that `turn` says.
    Raises UserError for wrong keys, patterns or shards; `workers.WorkerDied` when a worker is killed or crashes.
    """

    def __init__(self, config: Config, *, rank: int, world: int, start_step: int) -> None:
        data, train = config.data, config.train
        if data.window < 1:
            raise UserError(f"data.window: expected at least 1 shard, got {data.window}")
        _check_workers(data.workers)
        self._micro_batches = train.micro_batches_per_step
        self._share = rank_share(self._micro_batches, rank, world)
        self._turns = training_turns(config)
        self._joint = config.modality == JOINT
        self.remarks: list[str] = []
        """Lines that people should know of: what was left out, how it is batched."""
        self._plans: dict[str, Plan] = {}
        parts: dict[str, MicroBatches] = {}
        for name in modalities(config):
            alone = of_modality(config, name)
            shards, plan, remarks = _training_samples(alone, f"data.shards.{name}" if self._joint else "data.shards")
            if self._joint:
                share = self._turns.weights[name] / sum(self._turns.weights.values())
                self.remarks.append(f"joint: {name} takes {share:.3%} of the updates, {len(shards):,} samples")
            self.remarks += [joint_key(config, name, remark) for remark in remarks]
            self._plans[name] = plan
            parts[name] = MicroBatches(shards, _transform(alone, "train"), plan.numbered)
        self.epoch_size = sum(plan.epoch_size for plan in self._plans.values())
        """Samples of an epoch of every data set and modality."""
        self._batches = (
            JointMicroBatches(parts, self._turns, self._micro_batches) if self._joint else parts[config.modality]
        )
        self._shards = self._batches.shards
        self.fingerprint = self._shards.fingerprint
        """Hash of what the order depends on; a resumed run with another one sees another order."""
        self._start_step = start_step
        self._workers = data.workers
        self._stream: Stream | None = None

    def __iter__(self) -> Iterator[list[Batch]]:
        """Start from `start_step`; an earlier iteration ends, since the workers are the loader's."""
        self.close()
        numbers = _Numbers(self._start_step, self._micro_batches, self._share)
        self._stream = stream = Stream(self._batches, numbers, self._workers, per_step=len(self._share))
        try:
            while True:
                yield [next(stream) for _ in self._share]
        finally:
            stream.close()

    def epochs(self, steps: int) -> dict[str, float]:
        """Epochs of each modality of a joint run, or of each data set of data.mix, in the first so many steps; where
        there is one set its name is ""."""
        epochs: dict[str, float] = {}
        for name, own_steps in self._turns.counts(steps).items():
            for part, value in self._plans[name].epochs(own_steps * self._micro_batches).items():
                epochs[name if self._joint else part] = value
        return epochs

    def turn(self, step: int) -> tuple[str, int]:
        """(modality, which of its own steps) of step `step`; in a run of one modality all steps are its own."""
        return self._turns.at(step)

    def close(self) -> None:
        """End the workers and close the shards. Iterating again is allowed."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._shards.close()

    def explain(self, error: BaseException) -> str | None:
        """What a worker was reading when it died, if `error` is torch's report of a dead worker, else None.

        torch raises that report from a signal handler, so it can come up anywhere in the training step.
        """
        return self._stream.explain(error) if self._stream is not None else None


class _Numbers:
    """Running numbers step * M + m of one rank's micro-batches, from a step on, without end."""

    def __init__(self, start_step: int, micro_batches: int, share: range) -> None:
        self._start_step, self._micro_batches, self._share = start_step, micro_batches, share

    def __iter__(self) -> Iterator[int]:
        for step in count(self._start_step):
            for m in self._share:
                yield step * self._micro_batches + m


class FiniteBatches:
    """A fixed list of micro-batches that can be gone through many times; `len` is known.

    Each pass starts its own workers and ends them, also when it is left early.
    """

    def __init__(self, shards: Samples, transform: Transform[Any], plan: list[list[Row]], workers: int) -> None:
        self.samples = sum(len(rows) for rows in plan)
        """Samples that this rank meets in one pass."""
        self.classes: tuple[str, ...] = ()
        """Class names by id (labelled_batches)."""
        self.labels: npt.NDArray[np.int32] = np.empty(0, np.int32)
        """(samples of the shards,) class ids, in their order (labelled_batches)."""
        self.remarks: list[str] = []
        """As TrainingLoader.remarks (validation_batches)."""
        self._plan = plan
        self._workers = min(workers, len(plan))
        self._batches = MicroBatches(shards, transform, plan.__getitem__)

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        stream = Stream(self._batches, range(len(self._plan)), self._workers, per_step=1)
        try:
            yield from stream
        finally:
            stream.close()


def validation_batches(config: Config, *, rank: int, world: int) -> FiniteBatches:
    """This rank's share of `data.valid`: the same number of micro-batches on every rank, each sample once over all.

    Micro-batch j goes to rank j % world; ranks without one get the row of zeros. Images are resized by the short side
    and cropped in the centre; speech is padded. Masks depend on (train.seed, sample id) alone.
    Raises UserError as TrainingLoader does.
    """
    _check_workers(config.data.workers)
    shards = _open_shards(config.data.valid, "data.valid", config)
    plan, remarks = validation_plan(config, shards)
    plan += [[]] * (-len(plan) % world)
    batches = FiniteBatches(shards, _transform(config, "valid"), plan[rank::world], config.data.workers)
    batches.remarks = remarks
    return batches


def labelled_batches(
    pattern: str, config: Config, batch_size: int, workers: int, *, epochs: int | None = None, seed: int = 0
) -> FiniteBatches:
    """Every sample of the shards once, in order, with labels, unmasked and not augmented; `.classes` has the names.
    With `epochs`: that many times, in orders that `seed` draws.

    Names come from dataset.json beside the shards; without one they are the ids themselves.
    Raises UserError when a sample has no label, or a label that dataset.json has no name for.
    """
    _check_workers(workers)
    if batch_size < 1:
        raise UserError(f"batch size: expected at least 1, got {batch_size}")
    shards = ShardSet(pattern, config.modality)
    labels = shards.labels()
    if labels.min() < 0:
        where = shards.sample_id(int(labels.argmin()))
        raise UserError(f"{where}: has no class id; probes need KEY.cls with a whole number in every sample")
    if epochs is None:
        plan = in_order(len(shards), batch_size)
    else:
        plan = shuffled(len(shards), batch_size, epochs=epochs, seed=seed)
    batches = FiniteBatches(shards, _transform(config, "probe"), plan, workers)
    batches.labels = labels
    batches.classes = _class_names(shards, int(labels.max()))
    return batches


def _class_names(shards: ShardSet, largest: int) -> tuple[str, ...]:
    names: set[tuple[str, ...]] = set()
    for folder in sorted({path.parent for path in shards.paths}):
        info = read_dataset(folder)
        names.add(info.classes if info is not None else ())
    if len(names) > 1:
        raise UserError(f"{shards.pattern}: the shards come from data sets with different classes; name one data set")
    found = names.pop()
    if not found:
        return tuple(str(label) for label in range(largest + 1))
    if largest >= len(found):
        raise UserError(
            f"{shards.pattern}: class id {largest} has no name among the {len(found)} of dataset.json; make them again"
        )
    return found


def _transform(config: Config, mode: Mode) -> Transform[Any]:
    return TRANSFORMS[config.modality](config, mode)


def _training_samples(config: Config, key: str) -> tuple[Readable, Plan, list[str]]:
    """The samples of data.shards, which messages call `key`, or of data.mix, their micro-batches, and what people
    should know of them."""
    mix = config.data.mix
    if mix is None:
        shards = _open_shards(config.data.shards, key, config)
        return shards, *training_plan(config, shards, key)
    weights = whole_weights({name: part.weight for name, part in mix.items()})
    sets: dict[str, Samples] = {}
    plans: dict[str, Plan] = {}
    remarks: list[str] = []
    for name, weight in weights.items():
        key = f"data.mix.{name}.shards"
        sets[name] = _open_shards(mix[name].shards, key, config)
        plans[name], own = training_plan(config, sets[name], key)
        share = weight / sum(weights.values())
        remarks += [f"data.mix: {name} is {share:.3%} of the micro-batches, {len(sets[name]):,} samples", *own]
    samples = MixedSamples(sets, weights)
    return samples, MixedPlan(plans, weights, samples.starts), remarks


def _open_shards(value: str | Mapping[str, str] | None, key: str, config: Config) -> Samples:
    """The rows of the shards that configuration key `key` names; what is wrong with them is said of the key."""
    with about_key(key):
        shards = ShardSet(pattern_of(value, key, config.modality), config.modality)
        if config.modality == "text" and config.text.blocks == "complete_doc":
            return BlockSet(shards, config.text.max_tokens)
        return shards


def _check_workers(workers: int) -> None:
    if workers < 0:
        raise UserError(f"data.workers: expected 0 or more, got {workers}")

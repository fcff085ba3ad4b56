"""The training loop, to be read aloud."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock
from torch import Tensor

from megad2v.checkpoint.background import BackgroundWriter, Saved
from megad2v.checkpoint.catalog import prune, step_directory, steps_present
from megad2v.checkpoint.writer import CheckpointError, write_checkpoint
from megad2v.config.parts import JOINT, loss_weight
from megad2v.config.schema import Config
from megad2v.data.loader import FiniteBatches, TrainingLoader
from megad2v.engine.distributed import World, sum_over, together
from megad2v.engine.guard import Guard
from megad2v.engine.setup import TrainingEngine
from megad2v.errors import BadNumericState, Preempted, UserError
from megad2v.metrics.logger import MetricsLogger
from megad2v.metrics.statistics import StepStatistics
from megad2v.metrics.throughput import Throughput
from megad2v.modalities.batch import Batch
from megad2v.teacher.ema import ShardedTeacher
from megad2v.training.evaluate import validate
from megad2v.training.layer_drop import kept_blocks
from megad2v.training.proposal import propose
from megad2v.training.records import BAD_STEPS, QUARANTINE, RunRecords, low_since
from megad2v.training.schedules import rates_at
from megad2v.training.signals import StopRequests, in_words
from megad2v.training.state import Progress, save, state_memory
from megad2v.training.step import StepCounts, count_step, take_step
from megad2v.training.verdict import Halt, Verdict

BAD_SAMPLES_GRACE = 1000
"""Samples seen before data.max_bad_fraction is held against the run."""


@dataclass
class Run:
    """What one training run holds on a rank."""

    config: Config
    world: World
    directory: Path
    engine: TrainingEngine
    teacher: ShardedTeacher
    loader: TrainingLoader
    valid: Mapping[str, FiniteBatches]
    """By modality, in the same order on every rank; empty without data.valid."""
    throughput: Mapping[str, Throughput]
    """By modality, whose steps cost and take otherwise than those of another."""
    records: RunRecords
    guard: Guard
    logger: MetricsLogger | None
    """Only on the main rank."""
    lock: FileLock | None
    """On the run directory; only on the main rank."""
    background: BackgroundWriter | None = None
    """With train.async_save."""
    extras: Mapping[str, bytes] = field(default_factory=dict)
    """Files that every checkpoint carries, by their path in it: text's tokenizer."""
    requests: StopRequests = field(default_factory=StopRequests)
    """Signals that came to this process, and its time."""
    progress: Progress = field(default_factory=Progress)
    prunes: bool = True
    """Whether the last save lets older checkpoints go, once it is committed."""
    saved: int | None = None
    """The step that was last saved, or started from."""

    def memory(self) -> list[Tensor]:
        """This rank's saved tensors, as views: masters, moments and averages."""
        return [memory for _, _, memory in state_memory(self.engine, self.teacher)]

    @property
    def joint(self) -> bool:
        """Whether the run has several modalities: one to a step, and words for people say which."""
        return self.config.modality == JOINT

    def close(self) -> None:
        """End workers, close logs, let go of the lock. What fails in that is only said: how the run ended counts."""
        parts = (self.loader, self.records, *([self.logger] if self.logger is not None else []))
        try:
            for part in parts:
                try:
                    part.close()
                except Exception as error:
                    print(f"pretrain: {type(part).__name__} was not closed: {error}", file=sys.stderr, flush=True)
        finally:
            if self.lock is not None:
                self.lock.release()


def train(run: Run) -> None:
    """From `run.progress` to train.steps. Every rank takes the same decisions from the same global counts.

    Raises Preempted, BadNumericState, UserError on every rank alike.
    """
    train, model, progress = run.config.train, run.config.model, run.progress
    watch = run.guard.watch
    run.requests.defer()  # before data workers are forked, which inherit the handlers
    steps = iter(run.loader)
    started_from = run.saved = progress.step
    verdict = Verdict(run.config.verdict, losses=progress.taken_losses, norms=progress.taken_norms, joint=run.joint)
    while progress.step < train.steps:
        started = time.perf_counter()
        watch.at("data", step=progress.step + 1, samples=())
        batches = next(steps)
        waited = time.perf_counter() - started
        blocks = kept_blocks(train.seed, progress.step, depth=model.depth, rate=model.layer_drop)
        counts = _agree(run, batches, blocks)
        if run.guard.leaving:
            _leave(run, started_from, delete_older=verdict.bad_in_a_row == 0)
        modality, own_step = run.loader.turn(progress.step)
        statistics = None
        if progress.step + 1 == train.steps or _divides(train.log_every, own_step + 1):
            statistics = StepStatistics(run.config.model.width, run.world.device)
        rate, decay = rates_at(run.config, progress.updates)
        losses: list[Tensor] = []
        taken = take_step(
            run.engine,
            run.teacher,
            batches,
            counts,
            world=run.world,
            seed=train.seed,
            step=progress.step,
            learning_rate=rate,
            decay=decay,
            loss_weight=loss_weight(run.config, modality),
            statistics=statistics,
            verdict=verdict,
            losses=losses,
            blocks=blocks,
            guard=run.guard,
            before_update=run.background.before_update if run.background is not None else None,
        )
        watch.started()
        progress.step += 1
        progress.updates += taken
        progress.modality_updates[modality] = progress.modality_updates.get(modality, 0) + taken
        progress.skipped += not taken
        run.records.consumed(progress.step, batches)
        _count_samples(run, counts)
        run.throughput[modality].add(
            counts.samples,
            counts.positions,
            counts.squares,
            step_seconds=time.perf_counter() - started,
            data_seconds=waited,
        )

        if run.background is not None and run.background.ready():
            finish_saving(run)  # before logs are written: on a full disk all ranks hear of this error
        halt = None if taken else _refuse(run, verdict, batches, losses)
        if statistics is not None:
            watch.at("log")
            watched = verdict.watches_std(progress.modality_updates[modality])
            read = _log(run, modality, statistics, counts, {"lr": rate, "ema_decay": decay}, on_all=watched)
            if taken and counts.masked > 1 and watched:
                halt = verdict.collapsed(read, progress.step, modality)
        if halt is not None:
            _stop(run, halt)
        if run.valid and _due(progress.step, train.eval_every, train.steps):
            _validate(run)
        if _due(progress.step, train.save_every, train.steps):
            save_checkpoint(run, delete_older=taken)  # of a streak of refused steps all checkpoints are alike
    finish_saving(run)
    _check_end(run, verdict)


def _check_end(run: Run, verdict: Verdict) -> None:
    """Raise BadNumericState where the run ends in refused steps; one at the very end spoils nothing."""
    step, refused = run.progress.step, verdict.bad_in_a_row
    if refused > (1 if run.progress.updates else 0):
        raise BadNumericState(
            f"the last {refused} of {step} steps were not taken: {verdict.latest.reason}; "
            f"{_way_back(run, step - refused + 1)}. Lower optimizer.lr"
        )


def _agree(run: Run, batches: Sequence[Batch], blocks: tuple[int, ...] | None) -> StepCounts:
    """The step's global counts, once all ranks have agreed on what its forwards run."""
    proposal = propose(
        batches,
        kind="training",
        step=run.progress.step + 1,
        updates=run.progress.updates,
        depth=run.config.model.depth,
        blocks=blocks,
    )
    leave = bool(run.requests.reason(run.config.train.max_minutes))
    return count_step(batches, run.world, partial(run.guard.agree, proposal, leave=leave))


def _leave(run: Run, started_from: int, *, delete_older: bool) -> NoReturn:
    """Some rank was asked to stop: save what was computed, and raise Preempted on every rank. Collective."""
    reason = run.requests.reason(run.config.train.max_minutes)
    reasons = together(lambda: reason, errors=(), raises=RuntimeError)  # on the main rank, who asked
    step = run.progress.step
    if step == started_from:
        said = "no step was taken, so there is nothing to save"
    else:
        finish_or_say(run)
        if run.saved != step:
            save_checkpoint(run, delete_older=delete_older)
        finish_saving(run)
        said = f"saved {step_directory(run.directory, step)}"
    raise Preempted(f"preempted at step {step} ({in_words(reasons)}): {said}; the same command goes on from there")


def _due(step: int, every: int, last: int) -> bool:
    return step == last or _divides(every, step)


def _divides(every: int, steps: int) -> bool:
    return every > 0 and steps % every == 0


def _count_samples(run: Run, counts: StepCounts) -> None:
    progress, limit = run.progress, run.config.data.max_bad_fraction
    progress.samples += counts.samples
    progress.dropped += counts.dropped
    seen = progress.samples + progress.dropped
    if seen >= BAD_SAMPLES_GRACE and progress.dropped > limit * seen:
        raise UserError(
            f"data.max_bad_fraction: {progress.dropped} of {seen} samples could not be used, more than {limit:g} "
            f"of them; {run.directory / QUARANTINE} names each"
        )


def _refuse(run: Run, verdict: Verdict, batches: Sequence[Batch], losses: Sequence[Tensor]) -> Halt | None:
    """A step was not taken: say so, name its samples, and decide whether that was one too many."""
    step, judgement = run.progress.step, verdict.latest
    means = [float(loss) / max(1, batch.masked_count()) for loss, batch in zip(losses, batches, strict=True)]
    run.records.refused(step, batches, means, judgement)
    if run.world.is_main:
        whose = f" ({batches[0].modality})" if run.joint else ""
        print(
            f"step {step}{whose} was not taken: {judgement.reason} (loss {judgement.loss:.4g}, gradient norm "
            f"{judgement.norm:.4g}); {verdict.bad_in_a_row} in a row; samples in {run.directory / BAD_STEPS}",
            flush=True,
        )
    return verdict.too_many_bad(step)


def _stop(run: Run, halt: Halt) -> NoReturn:
    """Save, delete nothing, and raise BadNumericState on every rank, with the newest checkpoint before the trouble."""
    step, since, run.prunes = run.progress.step, halt.since, False
    finish_or_say(run)
    try:
        save_checkpoint(run, delete_older=False)
        finish_saving(run)
        saved = f"Saved {step_directory(run.directory, step)}"
    except CheckpointError as error:  # on every rank; why the run stops is still to be told
        saved = f"Its state could not be saved ({error})"
    if halt.low is not None and run.logger is not None:  # the rank that will print it
        since = low_since(run.logger.path, *halt.low, step)
    raise BadNumericState(
        f"stopped at step {step}: {halt.what}; since step {since}. {saved}; {_way_back(run, since)}. {halt.advice}"
    )


def _way_back(run: Run, since: int) -> str:
    """The newest checkpoint from before the trouble, in words. What step number s was computed with is the state after
    s - 1: that one is no way back."""
    older = [number for number in steps_present(run.directory) if number < since - 1]
    if not older:
        return (
            "no checkpoint from before that is there: where the weights are to blame, start anew in another directory"
        )
    return f"the newest checkpoint from before that is {step_directory(run.directory, older[-1])} (--train.resume PATH)"


def _log(
    run: Run, modality: str, statistics: StepStatistics, counts: StepCounts, rates: dict[str, float], *, on_all: bool
) -> dict[str, float]:
    """Sum the statistics over data-parallel ranks and write the step's line; what was read, where it was.

    Every rank reads (`on_all`) once floors hold on the standard deviations, else the main one alone. All have the same
    bits: the sum goes over all ranks, so each micro-batch is in it as often as there are tensor-parallel ranks.
    """
    sum_over(run.world.all, statistics.sums).div_(run.world.tensor.size)
    speed = run.throughput[modality].read()
    progress = run.progress
    read = statistics.read() if run.logger is not None or on_all else {}
    if run.logger is None:
        return read
    norm = run.engine.gradient_norm()
    values: dict[str, Any] = {
        "epoch": progress.samples / max(1, run.loader.epoch_size),
        "samples": progress.samples,
        **{f"epoch_{name}": epochs for name, epochs in run.loader.epochs(progress.step).items() if name},
        **read,
        **rates,
        "grad_norm": norm,
        "masked": counts.masked,
        "skipped_steps": progress.skipped,
        "bad_samples": progress.dropped,
        **speed,
        "modality": modality,
    }
    run.logger.write(progress.step, values)
    shown = ("loss", "target_std", "pred_std", "grad_norm", "tokens_per_second", "mfu")
    run.logger.progress(progress.step, {key: values[key] for key in shown}, modality=modality)
    return read


def _validate(run: Run) -> None:
    step, width = run.progress.step, run.config.model.width
    for modality, batches in run.valid.items():
        run.guard.watch.at("validation")
        values = validate(run.engine, batches, world=run.world, width=width, guard=run.guard, step=step)
        if run.logger is not None:
            run.logger.write(step, {**values, "modality": modality})
            run.logger.progress(step, values, modality=modality)


def save_checkpoint(run: Run, *, delete_older: bool = True) -> None:
    """Save, then delete what train.keep_last and train.keep_every let go. Collective; raises CheckpointError.

    With train.async_save it returns while the checkpoint is being written; `finish_saving` waits for it.
    """
    finish_saving(run)
    begun, run.prunes = time.perf_counter(), delete_older
    directory = step_directory(run.directory, run.progress.step)
    background = run.background
    with run.guard.watch.patience("checkpoint"):
        save(
            directory,
            run.engine,
            run.teacher,
            run.progress,
            run.config,
            world=run.world,
            data_fingerprint=run.loader.fingerprint,
            write=write_checkpoint if background is None else partial(background.start, begun=begun),
            extras=run.extras,
        )
    run.saved = run.progress.step
    if background is None:
        seconds = time.perf_counter() - begun
        _committed(run, Saved(directory, seconds, seconds))


def finish_saving(run: Run) -> None:
    """Wait until what is being written in the background is committed, if anything is. Collective; raises
    CheckpointError with what went wrong there."""
    if run.background is not None and run.background.pending:
        with run.guard.watch.patience("checkpoint"):
            _committed(run, run.background.finish())


def finish_or_say(run: Run) -> None:
    """The same where the run ends: for the step at hand, or for an error that matters more. What was being written and
    could not be is only said. Collective."""
    try:
        finish_saving(run)
    except CheckpointError as error:
        run.saved = None
        if run.world.is_main:
            print(f"pretrain: {error}", file=sys.stderr, flush=True)


def _committed(run: Run, saved: Saved) -> None:
    """Delete what the new checkpoint lets go, and log what it cost."""
    if not run.world.is_main:
        return
    begun, train = time.perf_counter(), run.config.train
    if run.prunes:
        spare = Path(train.resume)  # a command that names it may be repeated; "auto" and "never" are no folders
        try:
            prune(run.directory, train.keep_last, train.keep_every, spare=spare)
        except OSError as error:  # the new one is safe; too many old ones are no reason to stop
            print(f"train.keep_last: older checkpoints could not be deleted: {error}", flush=True)
    if run.logger is not None:
        stall = saved.stall_seconds + time.perf_counter() - begun
        times = {"save_seconds": saved.save_seconds, "save_stall_seconds": stall}
        run.logger.write(run.progress.step, {"saved": saved.directory.name, **times})

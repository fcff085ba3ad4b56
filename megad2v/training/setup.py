"""Building a run: data, engine, teacher, logs, and what it resumes from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from megad2v.checkpoint.background import BackgroundWriter
from megad2v.checkpoint.catalog import (
    find_checkpoint_by_all,
    is_step,
    newest_valid_by_all,
    recover,
    run_of,
    set_aside_later,
    step_directory,
    steps_present,
)
from megad2v.checkpoint.layout import INDEX, Index
from megad2v.checkpoint.reader import Checkpoint
from megad2v.config.deepspeed_json import fill_deepspeed, zero_stage
from megad2v.config.load import to_yaml
from megad2v.config.parts import JOINT, joint_key, modalities, of_modality
from megad2v.config.schema import Config
from megad2v.config.tree import config_from_dict
from megad2v.data.format import TOKENIZER_FOLDER
from megad2v.data.loader import FiniteBatches, TrainingLoader, validation_batches
from megad2v.engine.distributed import (
    World,
    broadcast_text,
    collective_limit,
    limit_all_groups,
    on_gpu,
    together,
)
from megad2v.engine.fragments import own_numel, shapes
from megad2v.engine.guard import Guard
from megad2v.engine.hang import exchange_limit, set_aside
from megad2v.engine.setup import TrainingEngine, check_compiler, check_deepspeed
from megad2v.engine.watchdog import Watchdog
from megad2v.errors import UserError
from megad2v.metrics.flops import flops_per_sample, peak_flops
from megad2v.metrics.logger import MetricsLogger, drop_later_lines
from megad2v.metrics.report import joint_report, memory_estimate, start_up_report
from megad2v.metrics.throughput import SampleFlops, Throughput
from megad2v.modalities.build import HUGGING_FACE, build_student, build_teacher, copied_prefixes, positions
from megad2v.modalities.text.export import check_exportable
from megad2v.modalities.text.tokenizer import ABOUT_FILE
from megad2v.parallel.layers import layers_for
from megad2v.teacher.ema import ShardedTeacher
from megad2v.training.initial import initialise_from, initialised
from megad2v.training.loop import Run
from megad2v.training.records import BAD_STEPS, QUARANTINE, RunRecords
from megad2v.training.schedules import schedule_remarks
from megad2v.training.signals import StopRequests
from megad2v.training.state import check_resumable, load, objective_changes

T = TypeVar("T")
ORPHANS_S = 7.0
"""How long the data workers of a killed run may keep its lock."""


def set_up(
    config: Config,
    ds: dict[str, Any],
    world: World,
    *,
    recipe: str,
    watch: Watchdog | None = None,
    requests: StopRequests | None = None,
    extras: Mapping[str, bytes] | None = None,
) -> Run:
    """Everything of a run, resumed where train.resume says so; `extras` are files that its checkpoints carry (text: the
    tokenizer). Collective; raises UserError alike on every rank."""
    watch, extras = watch or Watchdog(), extras or {}
    precision = resolve_precision(config.train.precision)
    _check_ranks(config, world)
    filled = fill_deepspeed(ds, config, precision=precision, data_parallel=world.data.size)
    directory = Path(config.train.output_dir)
    _on_all(lambda: check_deepspeed(filled, world.topology))
    if config.train.compile:
        _on_all(check_compiler)
    lock, there = None, broadcast_text("a run" if (directory / "checkpoints").is_dir() else "")
    if there:
        lock = _on_all(lambda: _alone_in(directory) if world.is_main else None)
        _on_all(lambda: _clear_up(directory) if world.is_main else None)
    resumed = _find_resume(config, directory, world, extras)
    source = _find_init(config) if resumed is None else None
    start = resumed.index.step if resumed else 0

    loader = _on_all(lambda: TrainingLoader(config, rank=world.data.rank, world=world.data.size, start_step=start))
    valid = _on_all(lambda: _validation(config, world))
    if not there:  # not before all that can be wrong with a new run has been looked at
        lock = _on_all(lambda: _alone_in(directory, still_empty=True) if world.is_main else None)
    _on_all(lambda: _prepare_directory(config, filled, directory, start) if world.is_main else None)
    logger = _on_all(
        lambda: (
            MetricsLogger(
                directory, config.train, resumed_at=start, config=asdict(config), joint=config.modality == JOINT
            )
            if world.is_main
            else None
        )
    )
    engine = build_engine(config, filled, world)
    limit_all_groups(collective_limit(config.train.hang_timeout))
    peak, peak_source = peak_flops(world.device, precision)
    run = Run(
        config=config,
        world=world,
        directory=directory,
        engine=engine,
        teacher=ShardedTeacher(engine, copied=copied_prefixes(config)),
        loader=loader,
        valid=valid,
        throughput={
            modality: Throughput(
                flops=_sample_flops(of_modality(config, modality)), peak_flops=peak * world.size if peak else None
            )
            for modality in modalities(config)
        },
        records=RunRecords(directory, world, trace=config.data.trace, resumed_at=start, joint=config.modality == JOINT),
        guard=Guard(engine, world, watch, limit=config.train.hang_timeout),
        background=_background(config, watch),
        logger=logger,
        lock=lock,
        requests=requests or StopRequests(),
        extras=extras,
    )
    if world.is_main:
        print("\n".join(_report(run, ds, precision=precision, recipe=recipe, peak=peak_source)), flush=True)
    _restore(run, resumed, source)
    return run


def _validation(config: Config, world: World) -> dict[str, FiniteBatches]:
    """This rank's share of data.valid, by modality."""
    if config.data.valid is None:
        return {}
    return {
        modality: validation_batches(of_modality(config, modality), rank=world.data.rank, world=world.data.size)
        for modality in modalities(config)
    }


def _sample_flops(config: Config) -> SampleFlops:
    """Of one modality."""
    return SampleFlops(partial(flops_per_sample, config), positions(config))


def _background(config: Config, watch: Watchdog) -> BackgroundWriter | None:
    if not config.train.async_save:
        return None
    return BackgroundWriter(at=watch.at, timeout=exchange_limit(config.train.hang_timeout))


def _report(run: Run, ds: dict[str, Any], *, precision: str, recipe: str, peak: str) -> list[str]:
    """Lines for people: what runs, on what, and what of the settings has no effect."""
    engine, world, resident = run.engine, run.world, run.config.teacher.resident
    lines = start_up_report(
        modalities=modalities(run.config),
        world=world,
        precision=precision,
        stage=engine.state.stage,
        student=sum(shape.numel() for shape in shapes(engine.student).values()),
        teacher=sum(shape.numel() for shape in shapes(engine.teacher_module).values()),
        memory=memory_estimate(
            own_numel(engine.student),
            own_numel(engine.teacher_module),
            stage=engine.state.stage,
            ranks=world.data.size,
            low_precision=precision == "bf16",
            resident=resident,
        ),
        recipe=recipe,
        run=run.directory,
        peak=peak,
    )
    lines += joint_report(run.config) + run.loader.remarks
    lines += [remark for batches in run.valid.values() for remark in batches.remarks]
    lines += schedule_remarks(run.config)
    lines += _export_remarks(run.config, run.extras)
    if resident and engine.state.stage < 3:
        lines.append("teacher.resident: below ZeRO-3 the teacher's weights are whole anyway; it changes nothing")
    if zero_stage(ds) == 0:
        lines.append("ZeRO stage 0 keeps no float32 fragments and applies NaN steps: running it as stage 1")
    return lines


def _export_remarks(config: Config, extras: Mapping[str, bytes]) -> list[str]:
    """Why the run's model, or its tokenizer, will not be exported: said before it is trained."""
    checks = [
        (modality, partial(HUGGING_FACE[modality].check, of_modality(config, modality)))
        for modality in modalities(config)
    ]
    about = extras.get(f"{TOKENIZER_FOLDER}/{ABOUT_FILE}")
    if about is not None:
        checks.append(("text", partial(check_exportable, json.loads(about)["name"])))
    remarks = []
    for modality, check in checks:
        try:
            check()
        except UserError as error:
            what = f"this run's {modality}" if config.modality == JOINT else "this run"
            said = joint_key(config, modality, str(error))
            remarks.append(f"tools/convert_checkpoint.py --to hf will refuse {what}: {said}")
    return remarks


def build_engine(config: Config, filled: dict[str, Any], world: World) -> TrainingEngine:
    """Student and teacher under DeepSpeed, from a configuration and its filled DeepSpeed JSON. Collective."""
    optimizer = config.optimizer
    layers = layers_for(world.tensor, sequence=config.parallel.sequence)
    return TrainingEngine(
        lambda: build_student(config, layers),
        lambda: build_teacher(config, layers),
        filled,
        optimizer={
            "lr": optimizer.lr,
            "betas": tuple(optimizer.betas),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
        decay_all=optimizer.decay_all,
        seed=config.train.seed,
        device=world.device,
        topology=world.topology,
        resident_teacher=config.teacher.resident,
        compile_blocks=config.train.compile,
    )


def resolve_precision(asked: str) -> str:
    """auto: bf16 on GPUs that have it, else fp32."""
    if asked != "auto":
        return asked
    return "bf16" if on_gpu() and torch.cuda.is_bf16_supported() else "fp32"


def _on_all(action: Callable[[], T]) -> T:
    """`action` on every rank; if it fails on any, every rank raises the same UserError."""
    kept: list[T] = []
    together(lambda: kept.append(action()), errors=(OSError, UserError), raises=UserError)
    return kept[0]


def _check_ranks(config: Config, world: World) -> None:
    micro_batches = config.train.micro_batches_per_step
    ranks = world.data.size
    if micro_batches % ranks:
        fitting = list(range(ranks, micro_batches + ranks, ranks))
        raise UserError(
            f"train.micro_batches_per_step: {micro_batches} micro-batches cannot be shared evenly by {ranks} "
            f"data-parallel ranks; use a multiple of {ranks}, such as {fitting[-1]}"
        )


def _find_resume(config: Config, directory: Path, world: World, extras: Mapping[str, bytes]) -> Checkpoint | None:
    """The checkpoint to go on from, verified by all ranks together. Nothing is written yet."""
    asked = config.train.resume
    if asked == "never":
        if broadcast_text("taken" if steps_present(directory) else ""):
            raise UserError(
                f"train.resume: never, but {directory} has checkpoints; choose another train.output_dir or auto"
            )
        return None
    if asked != "auto":
        newest: Path | None = _find_repeated(config, directory, world) or find_checkpoint_by_all(Path(asked))
    else:
        newest, reasons = newest_valid_by_all(directory)
        for reason in reasons if world.is_main else ():
            print(f"passed over a checkpoint: {reason}", flush=True)
        if newest is None and reasons:
            raise UserError(
                f"train.resume: none of the checkpoints in {directory} is valid ({reasons[0]}); choose another "
                "train.output_dir to start anew"
            )
    if newest is None:
        return None
    checkpoint = _on_all(lambda: Checkpoint(newest, check_sizes=False))
    _on_all(lambda: check_resumable(checkpoint, config, extras))
    return checkpoint


def _find_repeated(config: Config, directory: Path, world: World) -> Path | None:
    """The newest valid checkpoint that this same command saved in `directory` after it had started from the path in
    train.resume: a job that is requeued repeats its command, and the path is where to start, not where to stay."""
    steps = _same_start(config, directory) if world.is_main else []
    newest, _ = newest_valid_by_all(directory, steps)
    if newest is not None and world.is_main:
        print(
            f"train.resume: this command has started from {config.train.resume} before, and goes on from what it saved "
            "since; for another start from there choose another train.output_dir",
            flush=True,
        )
    return newest


def _same_start(config: Config, directory: Path) -> list[int]:
    """Steps saved with the same train.resume and the same settings outside of train.*: one that goes back with another
    learning rate is another run."""
    asked, found = Path(config.train.resume).resolve(), []
    if not is_step(asked) and run_of(asked) == directory.resolve():
        return []  # this run's newest, whoever saved it
    now = json.loads(json.dumps(asdict(config)))
    for step in steps_present(directory):
        with contextlib.suppress(UserError):
            # Keys that are newer than the checkpoint have their defaults there.
            saved = config_from_dict(Index.load(step_directory(directory, step) / INDEX).config)
            same = json.loads(json.dumps(asdict(replace(saved, train=config.train)))) == now
            if same and Path(saved.train.resume).resolve() == asked:
                found.append(step)
    return found


def _find_init(config: Config) -> Checkpoint | None:
    """The checkpoint that train.init names, verified by all ranks together."""
    if config.train.init is None:
        return None
    directory = find_checkpoint_by_all(Path(config.train.init))
    return _on_all(lambda: Checkpoint(directory, check_sizes=False))


def _clear_up(directory: Path) -> None:
    """Behind a run that was killed while it saved."""
    for line in recover(directory):
        print(line, flush=True)


def _alone_in(directory: Path, *, still_empty: bool = False) -> FileLock:
    """Hold the run directory until the process ends. Two runs in one would mix their logs and delete each other's
    checkpoints. Raises UserError where another run has it (as far as the file system knows locks) and keeps it, or has
    left checkpoints where there were none when this one looked (`still_empty`).

    Processes that were forked inherit a lock (filelock before 4): data workers of a rank that was killed hold on to it
    until they notice, which takes torch 5 seconds.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=ORPHANS_S)
    except Timeout:
        raise UserError(
            f"train.output_dir: another run is writing to {directory}; end it, or choose another directory"
        ) from None
    if still_empty and steps_present(directory):
        lock.release()
        raise UserError(
            f"train.output_dir: another run was started in {directory} meanwhile; repeat the command to go on from it"
        )
    return lock


def _prepare_directory(config: Config, filled: dict[str, Any], directory: Path, start: int) -> None:
    """The run directory, its resolved configurations, and its logs cut back to the step that is resumed from."""
    for aside in set_aside_later(directory, start):
        print(f"set aside: {aside}", flush=True)
    set_aside(directory / "hang")
    (directory / "config.yaml").write_text(to_yaml(config))
    (directory / "ds_config.json").write_text(json.dumps(filled, indent=2) + "\n")
    for name in (QUARANTINE, BAD_STEPS):
        drop_later_lines(directory / name, start)


def _restore(run: Run, resumed: Checkpoint | None, source: Checkpoint | None) -> None:
    """Load what the run resumes from, or starts from, and say so."""
    say = run.world.is_main
    if resumed is not None:
        run.progress = load(resumed, run.engine, run.teacher)
        if say:
            print(f"resumed from {resumed.directory} (step {run.progress.step})", flush=True)
            if run.config.train.init is not None:
                print("train.init: it has no effect on a run that is resumed", flush=True)
            if resumed.index.state["data_fingerprint"] != run.loader.fingerprint:
                print("data.shards: not the shards that this run was started on, so its order changes", flush=True)
            for line in objective_changes(resumed, run.config):
                print(line, flush=True)
    elif source is not None:
        result = initialise_from(source, run.config, run.engine, run.teacher, run.config.train.init_teacher)
        if say:
            print("\n  ".join(initialised(source, run.config, result, run.extras)), flush=True)

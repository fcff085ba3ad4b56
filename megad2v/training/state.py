"""A run's state, out to a checkpoint and back in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megad2v.checkpoint.layout import Piece
from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.writer import write_checkpoint
from megad2v.config.schema import Config
from megad2v.data.format import TOKENIZER_FOLDER
from megad2v.data.mix import whole_weights
from megad2v.engine.distributed import World, broadcast_text, together
from megad2v.engine.fragments import MOMENTS, Fragment, adam_entries, shapes
from megad2v.engine.replicas import unify
from megad2v.engine.setup import TrainingEngine
from megad2v.errors import UserError
from megad2v.metrics.report import versions
from megad2v.modalities.build import build_student
from megad2v.modalities.text.tokenizer import ABOUT_FILE
from megad2v.teacher.ema import ShardedTeacher


@dataclass
class Progress:
    """Counters of a run. Order, masks, augmentation and dropout are pure functions of them and the seed."""

    step: int = 0
    """Steps of data consumed: the loader's whole state."""
    updates: int = 0
    """Updates really taken: what schedules and decay follow."""
    samples: int = 0
    dropped: int = 0
    skipped: int = 0
    """Steps that were refused: not finite, or a spike."""
    taken_losses: list[float] = field(default_factory=list)
    """Loss of the last verdict.window steps taken: what a spike is measured against."""
    taken_norms: list[float] = field(default_factory=list)
    """Their gradient norms."""


def state_memory(engine: TrainingEngine, teacher: ShardedTeacher) -> Iterator[tuple[str, Fragment, Tensor]]:
    """(kind, fragment, this rank's memory) of all that is saved; views, so a load writes through them."""
    entries = adam_entries(engine.deepspeed, engine.state)
    for fragment in engine.state.fragments:
        yield "student", fragment, fragment.master
        for moment in MOMENTS:
            yield moment, fragment, entries[fragment.partition][moment].narrow(0, fragment.offset, fragment.length)
    for fragment, average in zip(teacher.fragments, teacher.averages, strict=True):
        yield "teacher", fragment, average


def save(
    directory: Path,
    engine: TrainingEngine,
    teacher: ShardedTeacher,
    progress: Progress,
    config: Config,
    *,
    world: World,
    data_fingerprint: str,
    extras: Mapping[str, bytes] | None = None,
    write: Callable[..., None] = write_checkpoint,
) -> None:
    """Write a checkpoint into `directory`, with the small files `extras`; see `write_checkpoint`. Collective. `write`
    may be a `BackgroundWriter.start` instead, which returns before anything is written.

    Where tensor-parallel ranks' copies of a parameter have drifted apart, all get the first rank's, which is the one
    that is saved: a run that resumes goes on as this one does.
    """
    _unify_copies(engine, teacher, world)
    entries = adam_entries(engine.deepspeed, engine.state)
    write(
        directory,
        [
            Piece(kind, f.name, f.start, memory)
            for kind, f, memory in state_memory(engine, teacher)
            if f.split or world.tensor.rank == 0  # of equal copies one is saved
        ],
        step=progress.step,
        shapes={name: list(shape) for name, shape in shapes(engine.student).items()},
        state={
            "progress": asdict(progress),
            "adam_step": float(entries[0]["step"]),
            "data_fingerprint": data_fingerprint,
        },
        config=asdict(config),
        layout={"ranks": world.size, "zero_stage": engine.state.stage, "tensor_parallel": config.parallel.tensor},
        code=versions(config.modality),
        extras=extras,
    )


def _unify_copies(engine: TrainingEngine, teacher: ShardedTeacher, world: World) -> None:
    copies = [
        (f"{kind} {f.name}@{f.start}", memory) for kind, f, memory in state_memory(engine, teacher) if not f.split
    ]
    # One group may have found something and another nothing; what follows is collective over all ranks.
    differing = together(lambda: unify(copies, world), errors=(), raises=RuntimeError)
    names = sorted({name for rank in differing for name in rank})
    if broadcast_text("drifted" if names else ""):
        engine.state.publish()
        teacher.refresh()
    if names:
        print(
            f"tensor-parallel ranks' copies of {len(names)} tensors had drifted apart ({names[0]}, ...): all have the "
            "first rank's now",
            flush=True,
        )


@torch.no_grad()
def load(checkpoint: Checkpoint, engine: TrainingEngine, teacher: ShardedTeacher) -> Progress:
    """Put student, moments and teacher back, this rank's ranges only, whatever layout wrote them.

    Collective: one agreement that all ranks could read, then `publish` and `refresh`. Raises UserError on all ranks
    where any could not.
    """

    def read() -> None:
        for kind, fragment, memory in state_memory(engine, teacher):
            memory.copy_(checkpoint.read(kind, fragment.name, fragment.start, fragment.length))
        for entry in adam_entries(engine.deepspeed, engine.state):
            entry["step"].fill_(checkpoint.index.state["adam_step"])

    together(read, errors=READ_ERRORS, raises=UserError)
    engine.state.publish()
    teacher.refresh()
    return Progress(**checkpoint.index.state["progress"])


READ_ERRORS = (UserError, OSError, SafetensorError)
"""What reading a checkpoint can raise on one rank alone."""

SAME_STREAM = ("train.seed", "train.micro_batches_per_step", "data.micro_batch", "data.window")
"""Keys that a resumed run must share: the loader's state is a step number, whose samples these decide."""
SAME_LENGTHS = {
    "speech": ("data.bucket_ratio", "speech.min_seconds", "speech.max_seconds"),
    "text": ("data.bucket_ratio", "text.blocks", "text.max_tokens"),
}
"""The same for modalities whose micro-batches follow from lengths."""


def other_tokenizer(checkpoint: Checkpoint, extras: Mapping[str, bytes]) -> bool:
    """Whether a text checkpoint carries another tokenizer than `extras`; False where either has none."""
    name = f"{TOKENIZER_FOLDER}/{ABOUT_FILE}"
    if name not in extras or name not in checkpoint.extras:
        return False
    then, now = (json.loads(about)["fingerprint"] for about in (checkpoint.extra(name), extras[name]))
    return then != now


def check_resumable(checkpoint: Checkpoint, config: Config, extras: Mapping[str, bytes]) -> None:
    """Raise UserError where `checkpoint` is of another model, another tokenizer, or another stream of samples, than
    `config` and the run's `extras`."""
    if "progress" not in checkpoint.index.state:
        raise UserError(
            f"{checkpoint.directory}: holds imported weights and no run to resume; name it with train.init, and "
            "another train.output_dir"
        )
    if other_tokenizer(checkpoint, extras):
        raise UserError(
            f"text.tokenizer: the run in {checkpoint.directory} has another one, whose ids stand for other pieces; "
            "resume with the same, or choose another train.output_dir"
        )
    with torch.device("meta"):
        ours = {name: list(p.shape) for name, p in build_student(config).named_parameters()}
    saved: dict[str, Any] = checkpoint.index.shapes
    for name in (*ours, *saved):
        if saved.get(name) != ours.get(name):
            raise UserError(
                f"{checkpoint.directory}: holds {saved.get(name, 'nothing')} for {name}, the model has "
                f"{ours.get(name, 'nothing')}; resume with the configuration in the run's config.yaml, or choose "
                "another train.output_dir (and train.init to start from these weights)"
            )
    now = asdict(config)
    _check_weights(checkpoint, config)
    for key in SAME_STREAM + SAME_LENGTHS.get(config.modality, ()):
        section, leaf = key.split(".")
        then = checkpoint.index.config[section][leaf]
        if then != now[section][leaf]:
            raise UserError(
                f"{key}: the run in {checkpoint.directory} has {then}, not {now[section][leaf]}, and would see other "
                "samples from here on; resume with the same, or choose another train.output_dir"
            )


OBJECTIVE = ("mask", "targets", "loss", "teacher")
"""Sections of the configuration that say what is learned."""
TEXT_OBJECTIVE = ("teacher_sees", "loss_on")
NOT_LEARNED = ("teacher.resident",)
"""In these sections, but of memory and speed alone."""


def objective_changes(checkpoint: Checkpoint, config: Config) -> list[str]:
    """One line for each key by which a resumed run goes on to learn something else than its checkpoint did: allowed,
    but not without a word. Keys that the checkpoint is too old to know are passed over."""
    then, now = checkpoint.index.config, json.loads(json.dumps(asdict(config)))  # JSON has lists for tuples
    keys = [(section, leaf) for section in OBJECTIVE for leaf in now[section]]
    if config.modality == "text":
        keys += [("text", leaf) for leaf in TEXT_OBJECTIVE]
    return [
        f"{section}.{leaf}: {now[section][leaf]}, and {then[section][leaf]} before: the objective changes here"
        for section, leaf in keys
        if f"{section}.{leaf}" not in NOT_LEARNED
        and leaf in then.get(section, {})
        and then[section][leaf] != now[section][leaf]
    ]


def _check_weights(checkpoint: Checkpoint, config: Config) -> None:
    """The same for data.mix: its names and the ratios of its weights. Patterns may differ, as folders are moved; what
    they name is compared by fingerprint."""

    def ratios(mix: dict[str, Any] | None) -> dict[str, int]:
        return whole_weights({name: part["weight"] for name, part in mix.items()}) if mix else {}

    then, now = ratios(checkpoint.index.config["data"].get("mix")), ratios(asdict(config)["data"]["mix"])
    if then != now:
        first, second = (", ".join(f"{n} {w}" for n, w in one.items()) or "no mix" for one in (then, now))
        raise UserError(
            f"data.mix: the run in {checkpoint.directory} has {first}, not {second}, and would see other samples from "
            "here on; resume with the same, or choose another train.output_dir"
        )

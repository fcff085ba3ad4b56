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
from megad2v.config.parts import JOINT, MODALITIES, joint_key, modalities, of_modality
from megad2v.config.schema import Config
from megad2v.config.tree import config_from_dict
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
    taken_losses: dict[str, list[float]] = field(default_factory=dict)
    """By modality, loss of its last verdict.window steps taken: what a spike is measured against."""
    taken_norms: dict[str, list[float]] = field(default_factory=dict)
    """Their gradient norms."""
    modality_updates: dict[str, int] = field(default_factory=dict)
    """Updates really taken with each modality."""

    @classmethod
    def restored(cls, saved: Mapping[str, Any], modality: str) -> Progress:
        """From a checkpoint of a run of `modality` (joint: of several). Before there were joint runs, what is kept by
        modality now was a list of the run's one modality, and its updates were the run's."""
        values = dict(saved)
        for key in ("taken_losses", "taken_norms"):
            if isinstance(values.get(key), list):
                values[key] = {modality: values[key]}
        values.setdefault("modality_updates", {modality: values["updates"]})
        return cls(**values)


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
        code=versions(modalities(config)),
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
    return Progress.restored(checkpoint.index.state["progress"], checkpoint.index.config["modality"])


@torch.no_grad()
def initialise_from(
    checkpoint: Checkpoint, engine: TrainingEngine, teacher: ShardedTeacher, *, teacher_from: str = "teacher"
) -> dict[str, list[str]]:
    """Start a new schedule from the weights of `checkpoint`: student and teacher where names and shapes match.
    `teacher_from` "student" makes the teacher a copy of that student.

    Returns the names that were `matched`, `missing` from the checkpoint (they keep their fresh values; a missing
    teacher tensor starts as the student's) and `unused`. Collective, as `load`.
    """
    ours = {name: list(shape) for name, shape in shapes(engine.student).items()}
    saved = checkpoint.index.shapes
    matched = {name for name, shape in ours.items() if saved.get(name) == shape}
    averaged = set(checkpoint.names("teacher")) & matched if teacher_from == "teacher" else set()

    def read() -> None:
        for fragment in engine.state.fragments:
            if fragment.name in matched:
                fragment.master.copy_(checkpoint.read("student", fragment.name, fragment.start, fragment.length))
        for fragment, average in zip(teacher.fragments, teacher.averages, strict=True):
            kind = "teacher" if fragment.name in averaged else "student"
            if fragment.name in matched:
                average.copy_(checkpoint.read(kind, fragment.name, fragment.start, fragment.length))

    together(read, errors=READ_ERRORS, raises=UserError)
    engine.state.publish()
    teacher.refresh()
    return {
        "matched": sorted(matched),
        "missing": sorted(set(ours) - matched),
        "unused": sorted(set(saved) - matched),
    }


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
    _check_weights(checkpoint, config)
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
    _check_stream(checkpoint, config)


def _check_stream(checkpoint: Checkpoint, config: Config) -> None:
    """Raise UserError where a modality's samples would be others from here on."""
    for modality in modalities(config):
        then, now = (_alone(tree, modality) for tree in (checkpoint.index.config, asdict(config)))
        for key in SAME_STREAM + SAME_LENGTHS.get(modality, ()):
            section, leaf = key.split(".")
            first, second = then[section][leaf], now[section][leaf]
            if first != second:
                raise UserError(
                    f"{joint_key(config, modality, key)}: the run in {checkpoint.directory} has {first}, not {second}, "
                    "and would see other samples from here on; resume with the same, or choose another "
                    "train.output_dir"
                )


def _alone(tree: Mapping[str, Any], modality: str) -> Mapping[str, Any]:
    """A configuration as `modality` sees it (see `of_modality`), both as trees of JSON; one of a single modality as it
    is."""
    if tree["modality"] != JOINT:
        return tree
    alone: dict[str, Any] = json.loads(json.dumps(asdict(of_modality(config_from_dict(tree), modality))))
    return alone


OBJECTIVE = ("mask", "targets", "loss", "teacher")
"""Sections of the configuration that say what is learned."""
TEXT_OBJECTIVE = ("teacher_sees", "loss_on")
NOT_LEARNED = ("teacher.resident",)
"""In these sections, but of memory and speed alone."""


def objective_changes(checkpoint: Checkpoint, config: Config) -> list[str]:
    """One line for each key by which a resumed run goes on to learn something else than its checkpoint did: allowed,
    but not without a word. Keys that the checkpoint is too old to know are passed over; of a joint run's they have
    their defaults."""
    changes: dict[str, tuple[Any, Any]] = {}
    saved, ours = checkpoint.index.config, json.loads(json.dumps(asdict(config)))  # JSON has lists for tuples
    for modality in modalities(config):
        then, now = _alone(saved, modality), _alone(ours, modality)
        keys = [(section, leaf) for section in OBJECTIVE for leaf in now[section]]
        if modality == "text":
            keys += [("text", leaf) for leaf in TEXT_OBJECTIVE]
        for section, leaf in keys:
            if f"{section}.{leaf}" not in NOT_LEARNED and leaf in then.get(section, {}):
                # What the modalities share has one name, and is said once.
                changes[joint_key(config, modality, f"{section}.{leaf}")] = then[section][leaf], now[section][leaf]
        if config.modality == JOINT == saved["modality"]:
            weights = (tree["joint"][modality].get("loss_weight", 1.0) for tree in (saved, ours))
            changes[f"joint.{modality}.loss_weight"] = next(weights), next(weights)
    return [
        f"{key}: {second}, and {first} before: the objective changes here"
        for key, (first, second) in changes.items()
        if first != second
    ]


def _check_weights(checkpoint: Checkpoint, config: Config) -> None:
    """The same for the weights of a joint run's modalities and of data.mix: names and ratios. Patterns may differ, as
    folders are moved; what they name is compared by fingerprint."""

    def ratios(parts: Mapping[str, Any] | None) -> dict[str, int]:
        weights = {name: part["weight"] for name, part in (parts or {}).items() if part["weight"] > 0}
        return whole_weights(weights) if weights else {}

    def joint(tree: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if tree.get("modality") != JOINT:
            return None
        return {name: part for name, part in tree["joint"].items() if name in MODALITIES}

    saved, ours = checkpoint.index.config, asdict(config)
    for key, of, none in (
        ("joint.*.weight", joint, "one modality"),
        ("data.mix", lambda tree: tree["data"].get("mix"), "no mix"),
    ):
        then, now = ratios(of(saved)), ratios(of(ours))
        if then != now:
            first, second = (", ".join(f"{n} {w}" for n, w in one.items()) or none for one in (then, now))
            raise UserError(
                f"{key}: the run in {checkpoint.directory} has {first}, not {second}, and would see other samples from "
                "here on; resume with the same, or choose another train.output_dir"
            )

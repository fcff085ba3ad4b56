"""A run's state, out to a checkpoint and back in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megad2v.checkpoint.layout import Piece
from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.writer import write_checkpoint
from megad2v.config.schema import Config
from megad2v.engine.distributed import World, together
from megad2v.engine.fragments import MOMENTS, Fragment, adam_entries, shapes
from megad2v.engine.setup import TrainingEngine
from megad2v.errors import UserError
from megad2v.metrics.report import versions
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
    """Steps whose update was not finite."""


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
) -> None:
    """Write a checkpoint into `directory`; see `write_checkpoint`. Collective."""
    entries = adam_entries(engine.deepspeed, engine.state)
    write_checkpoint(
        directory,
        [Piece(kind, f.name, f.start, memory) for kind, f, memory in state_memory(engine, teacher)],
        step=progress.step,
        shapes={name: list(shape) for name, shape in shapes(engine.student).items()},
        state={
            "progress": asdict(progress),
            "adam_step": float(entries[0]["step"]),
            "data_fingerprint": data_fingerprint,
        },
        config=asdict(config),
        layout={"ranks": world.size, "zero_stage": engine.state.stage, "tensor_parallel": config.parallel.tensor},
        code=versions(),
    )


@torch.no_grad()
def load(checkpoint: Checkpoint, engine: TrainingEngine, teacher: ShardedTeacher) -> Progress:
    """Put student, moments and teacher back, this rank's ranges only, whatever layout wrote them. Collective.

    Raises UserError where the checkpoint is of another model.
    """

    def read() -> None:
        _check_shapes(checkpoint, engine)
        for kind, fragment, memory in state_memory(engine, teacher):
            memory.copy_(checkpoint.read(kind, fragment.name, fragment.start, fragment.length))
        for entry in adam_entries(engine.deepspeed, engine.state):
            entry["step"].fill_(checkpoint.index.state["adam_step"])

    together(read, errors=(UserError,), raises=UserError)
    engine.state.publish()
    teacher.refresh()
    return Progress(**checkpoint.index.state["progress"])


@torch.no_grad()
def initialise_from(checkpoint: Checkpoint, engine: TrainingEngine, teacher: ShardedTeacher) -> dict[str, list[str]]:
    """Start a new schedule from the weights of `checkpoint`: student and teacher where names and shapes match.

    Returns the names that were `matched`, `missing` from the checkpoint (they keep their fresh values; a missing
    teacher tensor starts as the student's) and `unused`. Collective.
    """
    ours = {name: list(shape) for name, shape in shapes(engine.student).items()}
    saved = checkpoint.index.shapes
    matched = {name for name, shape in ours.items() if saved.get(name) == shape}

    def read(kind: str, fragment: Fragment, memory: Tensor) -> None:
        memory.copy_(checkpoint.read(kind, fragment.name, fragment.start, fragment.length))

    for fragment in engine.state.fragments:
        if fragment.name in matched:
            read("student", fragment, fragment.master)
    engine.state.publish()
    teacher.copy_student()
    averaged = set(checkpoint.names("teacher")) & matched
    for fragment, average in zip(teacher.fragments, teacher.averages, strict=True):
        if fragment.name in averaged:
            read("teacher", fragment, average)
    teacher.refresh()
    return {
        "matched": sorted(matched),
        "missing": sorted(set(ours) - matched),
        "unused": sorted(set(saved) - matched),
    }


def _check_shapes(checkpoint: Checkpoint, engine: TrainingEngine) -> None:
    saved: dict[str, Any] = checkpoint.index.shapes
    for name, shape in shapes(engine.student).items():
        if saved.get(name) != list(shape):
            held = "nothing" if name not in saved else f"shape {saved[name]}"
            raise UserError(
                f"{checkpoint.directory}: holds {held} for {name}, the model has {list(shape)}; "
                "resume with the configuration in the run's config.yaml, or use train.init"
            )

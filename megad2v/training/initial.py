"""A new run from the weights of another one (train.init), be it of one modality or joint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.view import View
from megad2v.config.parts import JOINT
from megad2v.config.schema import Config
from megad2v.engine.distributed import together
from megad2v.engine.fragments import shapes
from megad2v.engine.setup import TrainingEngine
from megad2v.errors import UserError
from megad2v.modalities.build import part_of
from megad2v.teacher.ema import ShardedTeacher
from megad2v.training.state import READ_ERRORS, other_tokenizer


@dataclass(frozen=True)
class Matching:
    """Names of parameters: those that a run took from a checkpoint and those that this lacks, by their names in the
    run; those that had no place, by their names in the checkpoint."""

    matched: list[str]
    missing: list[str]
    unused: list[str]
    rebiased: list[str]
    """Of the matched those whose key biases became zeros, or were left out (see `View`)."""


@torch.no_grad()
def initialise_from(
    checkpoint: Checkpoint,
    config: Config,
    engine: TrainingEngine,
    teacher: ShardedTeacher,
    teacher_from: str,
) -> Matching:
    """Start a new schedule from the weights of `checkpoint`: student and teacher where names and shapes match, also
    between a joint model and one modality's (see `View`). `teacher_from` "student" makes the teacher a copy of that
    student.

    What is missing from the checkpoint keeps its fresh values, a missing teacher tensor starts as the student's.
    Collective, as `load`.
    """
    ours = {name: list(shape) for name, shape in shapes(engine.student).items()}
    view = View(checkpoint, config, ours)
    saved = view.index.shapes
    matched = {name for name, shape in ours.items() if saved.get(name) == shape}
    averaged = set(view.names("teacher")) & matched if teacher_from == "teacher" else set()

    def read() -> None:
        for fragment in engine.state.fragments:
            if fragment.name in matched:
                fragment.master.copy_(view.read("student", fragment.name, fragment.start, fragment.length))
        for fragment, average in zip(teacher.fragments, teacher.averages, strict=True):
            kind = "teacher" if fragment.name in averaged else "student"
            if fragment.name in matched:
                average.copy_(view.read(kind, fragment.name, fragment.start, fragment.length))

    together(read, errors=READ_ERRORS, raises=UserError)
    engine.state.publish()
    teacher.refresh()
    return Matching(
        matched=sorted(matched),
        missing=sorted(set(ours) - matched),
        unused=view.unused(matched),
        rebiased=sorted(matched & view.rebiased),
    )


def initialised(source: Checkpoint, config: Config, matching: Matching, extras: Mapping[str, bytes]) -> list[str]:
    """What became of the weights of `source` in the run of `config` and `extras`, for people: a headline, details."""
    then, now = source.index.config["modality"], config.modality
    lines = [f"weights from {source.directory}: {len(matching.matched)} parameters matched"]
    if then == JOINT != now:
        lines.append(f"of that joint model what all modalities share, and {now}'s own")
    if now == JOINT != then:
        lines.append(f"into what all modalities share, and {then}'s own; the others' own start new")
    planned = source.index.config["train"]["steps"]
    if source.index.step < planned:
        lines.append(f"that run has not ended: step {source.index.step:,} of {planned:,}")
    if other_tokenizer(source, extras):
        lines.append("text.tokenizer: not that run's: the rows of its table stood for other pieces")
    if matching.rebiased:
        before, after = source.index.config["model"]["qkv_bias"], config.model.qkv_bias
        lines.append(
            f"model.qkv_bias: {before} there, {after} here; biases of keys, which change no attention, are "
            f"{'zeros' if after == 'full' else 'left out'} in {len(matching.rebiased)} parameters"
        )
    ours = [*matching.matched, *matching.missing]
    for kind, names, among in (
        ("missing", matching.missing, ours),
        ("unused", matching.unused, list(source.index.shapes)),
    ):
        if names:
            lines.append(f"{kind}: {', '.join(_by_modality(names, among))}")
    return lines


def _by_modality(names: Sequence[str], among: Sequence[str]) -> list[str]:
    """`names`, some of the parameters `among`, with one word for a modality of a joint model where all of its own are
    there: nobody reads 80 names."""
    groups, of_all = Counter(map(part_of, names)), Counter(map(part_of, among))
    whole = [part for part, count in groups.items() if part is not None and count == of_all[part]]
    words = [f"all {groups[part]} of {part}'s own" for part in whole]
    return words + [name for name in names if part_of(name) not in whole]

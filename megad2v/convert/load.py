"""From a checkpoint to a model on one CPU process, tensor by tensor, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megad2v.checkpoint.catalog import find_checkpoint
from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.view import View
from megad2v.config.parts import JOINT, joint_key, modalities, of_modality
from megad2v.config.schema import Config
from megad2v.config.tree import config_from_dict
from megad2v.convert.foreign import parameter_shapes
from megad2v.convert.streamed import Source, load_weights, parameters_on_meta
from megad2v.data.format import TOKENIZER_FOLDER, read_dataset
from megad2v.data.shardset import resolve
from megad2v.errors import UserError
from megad2v.modalities.build import build_student
from megad2v.modalities.text.tokenizer import ABOUT_FILE, Tokenizer
from megad2v.models.data2vec import Student

Weights = Literal["student", "teacher"]
WEIGHTS: tuple[Weights, ...] = ("student", "teacher")
"""student: what the optimizer trained, and what the released data2vec files hold. teacher: its moving average."""


def open_checkpoint(path: Path, modality: str | None = None) -> Checkpoint:
    """The checkpoint that `path` means (a run, or one of its checkpoints/step_XXXXXXXX), every checksum compared; of a
    joint run what it holds of `modality`, as if a run of this modality alone had left it.

    Raises UserError where there is none, or it is damaged, or not of `modality`, or of several and none is named.
    """
    directory = find_checkpoint(path)
    checkpoint = Checkpoint(directory)
    if directory == path:  # find_checkpoint has compared them in a run directory
        checkpoint.verify()
    return _one_modality(checkpoint, modality)


def _one_modality(checkpoint: Checkpoint, modality: str | None) -> Checkpoint:
    config = checkpoint_config(checkpoint)
    if config.modality != JOINT:
        if modality not in (None, config.modality):
            raise UserError(f"--modality {modality}: {checkpoint.directory} is of {config.modality} alone")
        return checkpoint
    there = modalities(config)
    if modality is None:
        raise UserError(
            f"{checkpoint.directory}: holds a joint model of {', '.join(there)}; choose one of them with --modality "
            f"{'|'.join(there)} (in Python modality=)"
        )
    if modality not in there:
        raise UserError(f"--modality {modality}: the joint model in {checkpoint.directory} has {', '.join(there)}")
    alone = of_modality(config, modality)
    return View(checkpoint, alone, {name: list(value.shape) for name, value in parameter_shapes(alone).items()})


def checkpoint_config(checkpoint: Checkpoint) -> Config:
    """The configuration of the run that wrote the checkpoint. Raises UserError when this version cannot read it."""
    try:
        return config_from_dict(checkpoint.index.config)
    except UserError as error:
        raise UserError(f"{checkpoint.directory}: its configuration is of another version ({error})") from None


def run_config(checkpoint: Checkpoint) -> Config:
    """The configuration of the whole run, where `checkpoint` is one modality of it."""
    return checkpoint_config(checkpoint.source if isinstance(checkpoint, View) else checkpoint)


@contextmanager
def named_as_in_the_run(checkpoint: Checkpoint) -> Iterator[None]:
    """Errors about the configuration of one modality name the keys that a joint run has for them."""
    try:
        yield
    except UserError as error:
        run = run_config(checkpoint)
        raise UserError(joint_key(run, checkpoint_config(checkpoint).modality, str(error))) from None


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer that a text checkpoint carries; None where it carries none, and for another modality of a joint
    run. Raises UserError for a damaged one."""
    if checkpoint.index.config["modality"] != "text" or f"{TOKENIZER_FOLDER}/{ABOUT_FILE}" not in checkpoint.extras:
        return None
    where = f"{checkpoint.directory}/{TOKENIZER_FOLDER}"
    return Tokenizer.of_files(lambda name: checkpoint.extra(f"{TOKENIZER_FOLDER}/{name}"), where)


def check_tokenizer(tokenizer: Tokenizer | None, option: str, pattern: str) -> None:
    """Ids of another vocabulary would be other words. Raises UserError where shards `pattern` have one; `option` named
    them."""
    for folder in sorted({path.parent for path in resolve(pattern)}) if tokenizer is not None else ():
        info = read_dataset(folder)
        if info is not None and info.tokenizer and info.tokenizer["fingerprint"] != tokenizer.fingerprint:
            raise UserError(
                f"{option} {folder}: made with another tokenizer than the checkpoint's run; make them again with "
                "make_shards --tokenizer, the folder `tokenizer` beside the shards that it was trained on"
            )


def usable_device(name: str) -> torch.device:
    """The device that --device names; "auto" is a GPU where there is one. Raises UserError where it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    return device


def open_encoder(checkpoint: Checkpoint, weights: Weights) -> tuple[Student, Source]:
    """The model of a checkpoint in eval mode, without gradients and without weights (its parameters are on the meta
    device; buffers are there), and what reads ranges of its weights.

    "teacher" replaces what the teacher averages (the encoder, and the front end where teacher.scope is "model"); the
    rest, the regression head included, is the student's: the front end that the teacher saw in training is the
    student's own. Raises UserError when the checkpoint does not fit its own configuration.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights}")
    config = checkpoint_config(checkpoint)
    with parameters_on_meta():
        student = build_student(config).eval().requires_grad_(False)
    shapes = checkpoint.index.shapes
    parameters = dict(student.named_parameters())
    if parameters.keys() != shapes.keys():
        odd = ", ".join(sorted(parameters.keys() ^ shapes.keys())[:3])
        raise UserError(f"{checkpoint.directory}: its parameters are not those of its configuration ({odd}, ...)")
    for name, parameter in parameters.items():
        if list(parameter.shape) != shapes[name]:
            raise UserError(
                f"{checkpoint.directory}: {name} has shape {shapes[name]}, its configuration says "
                f"{list(parameter.shape)}"
            )
    averaged = _averaged(checkpoint, config, student) if weights == "teacher" else set()

    def read(name: str, start: int, length: int) -> Tensor:
        return checkpoint.read("teacher" if name in averaged else "student", name, start, length)

    return student, read


def load_encoder(checkpoint: Checkpoint, weights: Weights) -> Student:
    """The same with its weights, float32 on the CPU. Memory: the model and one tensor."""
    student, source = open_encoder(checkpoint, weights)
    load_weights(student, source)
    return student


def _averaged(checkpoint: Checkpoint, config: Config, student: Student) -> set[str]:
    """Names of what the teacher averages, all of which the checkpoint has to hold."""
    parts = ("encoder.", "front_end.") if config.teacher.scope == "model" else ("encoder.",)
    names = {name for name, _ in student.named_parameters() if name.startswith(parts)}
    missing = sorted(names - set(checkpoint.names("teacher")))
    if missing:
        raise UserError(f"{checkpoint.directory}: holds no teacher weights of {missing[0]}; use weights student")
    return names

"""From another program's file to a checkpoint for `--train.init`, certified before it gets its name.

OUTPUT/
  checkpoints/step_XXXXXXXX/   a checkpoint as training writes it, without the optimizer's state
  parity.json                  the certificate
  import.json                  where it came from, and what the file lacked
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megad2v.checkpoint.catalog import step_directory
from megad2v.checkpoint.layout import Piece
from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.stream import sha256_of
from megad2v.checkpoint.writer import CheckpointError, write_alone
from megad2v.convert.certificate import SEED, CertificateError, compare_layers, versions
from megad2v.convert.foreign import BUFFERS, differing
from megad2v.convert.hf import CERTIFICATE, check_output, written_aside
from megad2v.convert.hf_incoming import read_hugging_face
from megad2v.convert.incoming import Incoming, read_beit, read_fairseq
from megad2v.convert.load import open_encoder
from megad2v.convert.streamed import stream_weights
from megad2v.data.format import TOKENIZER_FOLDER
from megad2v.errors import UserError
from megad2v.modalities.build import HUGGING_FACE, build_student, build_teacher
from megad2v.modalities.keys import Example
from megad2v.models.initialise import initial_value, initialisers

ABOUT = "import.json"


def import_weights(
    program: str, source: Path, output: Path, *, tokenizer: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write `output` from `source`, a file or folder of `program` (hf, fairseq, beit); returns its certificate, with
    the lines for people under "report". All of it appears at once, and only when the certificate holds.

    Raises UserError when `output` is in use or `source` is not what it should be; CertificateError when our model
    computes something else than the file's; OSError when the disk refuses.
    """
    check_output(output, overwrite=overwrite)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    found = _read(program, source, tokenizer)
    student, teacher, lines = completed(found)
    with written_aside(output) as aside:
        _write(aside, found, student, teacher, source)
        del student, teacher
        checkpoint = Checkpoint(step_directory(aside, found.step))
        parity = {
            **certify_import(checkpoint, found),
            "step": found.step,
            "from": found.program,
            "report": [*found.report, *lines],
        }
        (aside / CERTIFICATE).write_text(json.dumps(parity, indent=2) + "\n", encoding="utf-8")
        about = {"from": found.program, "file": source.name, "report": parity["report"]}
        if source.is_file():
            about["sha256"] = sha256_of(source)
        (aside / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return parity


def _read(program: str, source: Path, tokenizer: Path | None) -> Incoming:
    if program == "beit":
        if tokenizer is not None:
            raise UserError("--tokenizer: is for text; the BEiT fork's models are of images")
        return read_beit(_file(source, program))
    if program == "fairseq":
        return read_fairseq(_file(source, program), tokenizer)
    if not source.is_dir():
        raise UserError(f"{source}: --from hf takes a folder with config.json and weights")
    return read_hugging_face(source, tokenizer)


def _file(source: Path, program: str) -> Path:
    """A folder means its one checkpoint."""
    if source.is_file():
        return source
    found = sorted(path for path in source.iterdir() if path.suffix in (".pt", ".pth"))
    if len(found) != 1:
        raise UserError(f"{source}: --from {program} takes a .pt or .pth file; here are {len(found)}")
    return found[0]


Tensors = dict[str, Tensor]


def completed(found: Incoming) -> tuple[Tensors, Tensors, list[str]]:
    """Student and teacher with all of their parameters, in the model's order, and a line for each that the file lacks:
    what is missing starts as in a new model of that recipe, a missing teacher as the student."""
    config, lines = found.config, []
    seed = config.train.seed
    with torch.device("meta"):
        model, averaged = build_student(config), build_teacher(config)
    student: Tensors = {}
    new = []
    for name, parameter, initialiser in initialisers(model):
        if name in found.student:
            student[name] = found.student[name]
        else:
            student[name] = initial_value(seed, name, parameter.shape, initialiser)
            new.append(name)
    for name in new:
        lines.append(f"{name}: not in the file; starts new (model.init {config.model.init}, train.seed {seed})")
    names = [name for name, _ in averaged.named_parameters()]
    teacher = {name: found.teacher.get(name, student[name]) for name in names}
    if not found.teacher:
        lines.append(f"teacher: not in the file; all {len(names)} parameters start as the student's")
    else:
        lines += [
            f"{name}: not in the file's teacher; starts as the student's" for name in names if name not in found.teacher
        ]
    if found.config.modality == "text" and found.tokenizer is None:
        lines.append("tokenizer: none; the model can be trained, and a run stores the one of its shards")
    return student, teacher, lines


def _write(aside: Path, found: Incoming, student: Tensors, teacher: Tensors, source: Path) -> None:
    pieces = [Piece("student", name, 0, value.flatten()) for name, value in student.items()]
    pieces += [Piece("teacher", name, 0, value.flatten()) for name, value in teacher.items()]
    files = found.tokenizer.files if found.tokenizer is not None else {}
    directory = step_directory(aside, found.step)
    directory.parent.mkdir(parents=True)
    try:
        write_alone(
            directory,
            pieces,
            extras={f"{TOKENIZER_FOLDER}/{name}": content for name, content in files.items()},
            step=found.step,
            shapes={name: list(value.shape) for name, value in student.items()},
            state={"imported": found.program},
            config=dataclasses.asdict(found.config),
            layout={"imported from": source.name},
            code=versions(),
        )
    except CheckpointError as error:
        raise OSError(str(error)) from error


def certify_import(checkpoint: Checkpoint, found: Incoming) -> dict[str, Any]:
    """Compare what the checkpoint holds with the file: every tensor to the bit, and every hidden state, student's and,
    where the file has one, teacher's. Raises CertificateError."""
    config = found.config
    example = HUGGING_FACE[config.modality].example(config, torch.Generator().manual_seed(SEED))
    if "front_end.mask_token" not in found.student and config.modality != "text":
        masks = ("bool_masked_pos", "mask_time_indices")
        arguments = {name: value for name, value in example.arguments.items() if name not in masks}
        example = example._replace(mask_bt=None, arguments=arguments, description=f"{example.description}; no mask")
    student = stream_weights(*open_encoder(checkpoint, "student"))
    parity = _compared(student, found.forward, example, found.program, found.rounded)
    if found.teacher_forward is not None:
        teacher = stream_weights(*open_encoder(checkpoint, "teacher"))
        parity["teacher"] = _compared(
            teacher, found.teacher_forward, example, f"the teacher in {found.program}", found.rounded
        )
    return {**parity, "round_trip": _round_trip(checkpoint, found), "versions": versions()}


def _round_trip(checkpoint: Checkpoint, found: Incoming) -> dict[str, int]:
    """What is stored, in the file's own names again: every tensor to the bit, the head's too, which no hidden state
    depends on. Raises CertificateError."""
    assert found.to_theirs is not None
    compared = 0
    for kind, ours, theirs in (
        ("student", found.student, found.tensors),
        ("teacher", found.teacher, found.teacher_tensors),
    ):
        back = found.to_theirs({name: checkpoint.full(kind, name) for name in ours}, found.config)
        kept = {name: value for name, value in back.items() if name in theirs and not name.endswith(BUFFERS)}
        for name in differing(kept, theirs):
            raise CertificateError(f"{name} of the {kind} does not come back as it was in {found.program}")
        compared += len(kept)
    return {"tensors": compared, "differing": 0}


def _compared(model: Any, forward: Callable[..., Any], example: Example, what: str, rounded: bool) -> dict[str, Any]:
    with torch.no_grad():
        # Hugging Face's text model adds its one kind of segment to padding as well; ours has no place for that.
        return compare_layers(model, forward, example, what, padding=False, rounded=rounded)

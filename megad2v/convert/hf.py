"""From a checkpoint to a folder that Hugging Face loads, certified before it gets its name.

OUTPUT/
  model.safetensors          weights, float32
  config.json                what AutoModel builds
  preprocessor_config.json   what AutoImageProcessor does to an image, AutoFeatureExtractor to a waveform
  tokenizer.json, tokenizer_config.json   text instead: what AutoTokenizer does
  parity.json                the certificate: differences per layer, tolerances, versions; text: tokens compared
  README.md                  the model card
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.stream import TensorFile, write_whole
from megad2v.config.schema import Config
from megad2v.convert.card import model_card
from megad2v.convert.certificate import CertificateError, certify, require_transformers
from megad2v.convert.load import Weights, checkpoint_config, load_tokenizer, named_as_in_the_run, open_encoder
from megad2v.convert.streamed import Source, stream_weights
from megad2v.convert.tokens import certify_tokenizer
from megad2v.errors import UserError
from megad2v.modalities.build import HUGGING_FACE

CERTIFICATE, WEIGHTS_FILE = "parity.json", "model.safetensors"


def export(
    checkpoint: Checkpoint, output: Path, *, weights: Weights = "student", overwrite: bool = False
) -> dict[str, Any]:
    """Write `output` and return its certificate. All of it appears at once, and only when the certificate holds.

    Weights pass from the checkpoint to the file one by one, and both models of the certificate read them back layer by
    layer: memory is that of the largest tensor (in float64) and of the hidden states.

    Raises UserError when `output` is in use, transformers is missing, or the model or its tokenizer has no counterpart
    there; CertificateError when the loaded export computes something else; OSError when the disk refuses.
    """
    check_output(output, overwrite=overwrite)
    require_transformers()
    config = checkpoint_config(checkpoint)
    keys = HUGGING_FACE[config.modality]
    with named_as_in_the_run(checkpoint):
        keys.check(config)
    tokenizer = load_tokenizer(checkpoint)
    processor = keys.processor_files(config, tokenizer)
    student, source = open_encoder(checkpoint, weights)
    with written_aside(output) as aside:
        _write_json(aside / "config.json", keys.model_config(config))
        parameters, digest = write_weights(aside / WEIGHTS_FILE, student, source, keys, config)
        for name, content in processor.items():
            (aside / name).write_text(content, encoding="utf-8")
        compared = compare_weights(aside / WEIGHTS_FILE, student, source, keys, config)
        parity = {
            **certify(aside, stream_weights(student, source), keys, config),
            "stored": {"tensors": compared, "differing": 0},
            **({"tokenizer": certify_tokenizer(aside, tokenizer)} if tokenizer is not None else {}),
            "weights": weights,
            "step": checkpoint.index.step,
            "sha256": {WEIGHTS_FILE: digest},
        }
        _write_json(aside / CERTIFICATE, parity)
        card = model_card(checkpoint, config, keys, weights, parameters, parity)
        (aside / "README.md").write_text(card, encoding="utf-8")
    return parity


def write_weights(path: Path, student: nn.Module, source: Source, keys: ModuleType, config: Config) -> tuple[int, str]:
    """model.safetensors, one of our tensors after the other; how many values, and the file's SHA-256. `student` may be
    without weights. Raises OSError."""
    shapes: dict[str, torch.Size] = {}
    for name, parameter in student.named_parameters():
        shapes |= {n: t.shape for n, t in keys.to_hugging_face({name: parameter.to("meta")}, config).items()}

    def mapped() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in student.named_parameters():
            if name.startswith("head."):
                continue
            values = source(name, 0, parameter.numel()).view(parameter.shape)
            yield from keys.to_hugging_face({name: values}, config).items()

    digest = write_whole(path, shapes, mapped(), {"format": "pt"})
    return sum(shape.numel() for shape in shapes.values()), digest


def compare_weights(path: Path, student: nn.Module, source: Source, keys: ModuleType, config: Config) -> int:
    """Read model.safetensors back and compare every value with the checkpoint's, tensor by tensor; how many there are.
    Hidden states show a wrong map, but not the rows of tables that the certificate's input has no use for.

    Raises CertificateError for the first tensor that differs.
    """
    file, compared = TensorFile(path), 0
    for name, parameter in student.named_parameters():
        values = source(name, 0, parameter.numel()).view(parameter.shape)
        for theirs, expected in keys.to_hugging_face({name: values}, config).items():
            if not torch.equal(_bits(file.read(theirs, 0, expected.numel())), _bits(expected)):
                raise CertificateError(f"{theirs} in the exported file is not the checkpoint's {name}")
            compared += 1
    return compared


def _bits(values: Tensor) -> Tensor:
    """Flat; as integers, of which NaN equals itself."""
    return values.flatten().view(torch.int32)


def check_output(output: Path, *, overwrite: bool, mark: str = CERTIFICATE) -> None:
    """Raises UserError unless `output` is new, an empty folder, or (with `overwrite`) an earlier result, which file
    `mark` in it says."""
    parent = _existing_parent(Path(os.path.abspath(output)))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{output}: cannot be made, since {parent} is not a folder that may be written to")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / mark).is_file():
        raise UserError(f"{output}: exists and is not an export of ours; name a new folder")
    if not overwrite:
        raise UserError(f"{output}: an earlier export lies there; name a new folder, or give --overwrite to replace it")


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes it when the block ends well, and vanishes when it does not."""
    output = Path(os.path.abspath(output))
    anchor = _existing_parent(output)  # so that a failure leaves no empty parents behind either
    aside = anchor / f".writing_{output.name}_{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        output.parent.mkdir(parents=True, exist_ok=True)
        if not output.exists():
            aside.rename(output)
            return
        replaced = anchor / f".replaced_{output.name}_{os.getpid()}"
        output.rename(replaced)
        aside.rename(output)
        shutil.rmtree(replaced)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

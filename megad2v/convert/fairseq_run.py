"""fairseq itself on an export of ours, where it can be imported: its own loader, its own modules."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from megad2v.config.schema import Config
from megad2v.convert.certificate import SEED, TOLERANCE, CertificateError, hidden_states, versions
from megad2v.modalities.build import HUGGING_FACE
from megad2v.modalities.keys import Example
from megad2v.models.data2vec import Student


def run_fairseq(file: Path, student: Student, config: Config) -> dict[str, Any]:
    """What parity.json says of fairseq: that it is not here, or the largest difference of its hidden states.

    `file` is one that we wrote: fairseq's loader unpickles. Its modules compute some norms in float32 whatever they are
    given, so float64 would show nothing more. Raises CertificateError where it computes something else.
    """
    fairseq, why = import_fairseq()
    if fairseq is None:
        return {"run": False, "why": why}
    try:
        model = load_model(file)
    except Exception as error:  # whatever its loader raises
        raise CertificateError(f"fairseq does not load the file ({type(error).__name__}: {error})") from error
    example = HUGGING_FACE[config.modality].example(config, torch.Generator().manual_seed(SEED))
    if config.modality == "text":  # fairseq zeroes what padding holds: the first row has none
        example = example._replace(inputs=example.inputs[:1], padding_bt=None)
    worst = 0.0
    for number, (ours, theirs) in enumerate(
        zip(hidden_states(student.eval(), example), fairseq_states(model, example, config), strict=True)
    ):
        difference = float((ours - theirs).abs().max()) / max(1.0, float(ours.abs().max()))
        if not difference <= TOLERANCE:
            raise CertificateError(f"fairseq computes another hidden state {number}: {difference:.1e} relative")
        worst = max(worst, difference)
    return {"run": True, "relative": worst, "versions": versions(fairseq)}


def import_fairseq() -> tuple[ModuleType | None, str]:
    """fairseq with examples/data2vec, or None and why not: it has none of its own for today's Python."""
    try:
        with silent():
            fairseq = importlib.import_module("fairseq")
            importlib.import_module("fairseq.checkpoint_utils")
            places = [Path(fairseq.__file__).parent, Path(fairseq.__file__).parent.parent]
            folder = next((p / "examples/data2vec" for p in places if (p / "examples/data2vec").is_dir()), None)
            if folder is None:
                return None, "fairseq is installed without examples/data2vec"
            importlib.import_module("fairseq.utils").import_user_module(argparse.Namespace(user_dir=str(folder)))
            _mend(importlib.import_module("fairseq.models").MODEL_REGISTRY)
    except Exception as error:  # whatever importing another program raises: it is not usable here
        return None, f"fairseq cannot be imported ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    return fairseq, ""


def _mend(registry: dict[str, type]) -> None:
    """At 3d262bb data2vec_text cannot load any checkpoint, its own included: its loader asks the encoder for a
    `target_model` that nothing sets (docs/convert.md)."""
    module = importlib.import_module(registry["data2vec_text"].__module__)
    if not hasattr(module.Data2VecTextEncoder, "target_model"):
        module.Data2VecTextEncoder.target_model = None


def load_model(file: Path) -> nn.Module:
    """The model of a checkpoint of ours, by fairseq's `load_model_ensemble_and_task`, in eval mode."""
    utils = importlib.import_module("fairseq.checkpoint_utils")
    with silent():
        (model,), _, _ = utils.load_model_ensemble_and_task([str(file)], arg_overrides={"data": str(file.parent)})
    return model.eval()


@torch.no_grad()
def fairseq_states(model: nn.Module, example: Example, config: Config) -> list[Tensor]:
    """Of fairseq's own forward: what enters the first block, what leaves each, the encoder's output, (B, T, D)."""
    if config.modality == "vision":
        return _vision_states(model, example)
    layers = model.encoder.layers if config.modality == "speech" else model.encoder.sentence_encoder.layers
    with caught(layers) as caught_states:
        if config.modality == "speech":
            padding = ~example.arguments["attention_mask"].bool()
            arguments = {"padding_mask": padding, "mask_indices": example.mask_bt}
            output = model(example.inputs, **arguments, mask=True, features_only=True)["x"]
        else:
            output = model(example.inputs[:, 0], features_only=True)[0]
    length = output.shape[1]  # fairseq lengthens odd sequences by a frame
    return [*(state.transpose(0, 1)[:, :length] for state in caught_states), output]


def _vision_states(model: nn.Module, example: Example) -> list[Tensor]:
    assert example.mask_bt is not None
    grid = round(example.mask_bt.shape[1] ** 0.5)
    model.make_mask = lambda *_: example.mask_bt.view(-1, grid, grid).long()
    outputs: list[Tensor] = []
    hook = model.encoder.norm.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        with caught(model.encoder.blocks) as states, silent():
            model(example.inputs)
    finally:
        hook.remove()
        del model.make_mask
    return [*states, outputs[0]]


@contextlib.contextmanager
def caught(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """What enters the first of `layers` and what leaves each, as the next one gets it."""
    states: list[Tensor] = []

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    hooks = [layers[0].register_forward_pre_hook(lambda _, arguments: states.append(arguments[0].clone()))]
    hooks += [
        layer.register_forward_hook(lambda _, __, output: states.append(first(output).clone())) for layer in layers
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what the port prints on every forward (spec 8.13), and without fairseq's log."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)

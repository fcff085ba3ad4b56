"""Conversions at the released sizes: there and back to the bit, and in Hugging Face's classes for tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.convert import vocabulary_of_letters
from megad2v.convert.load import load_encoder, open_checkpoint
from megad2v.modalities.build import HUGGING_FACE, build_student, build_teacher
from tests.checkpoints import perturb_, write_small_checkpoint
from tests.cli.conversions import assert_bit_equal, base, convert, there_and_back
from tests.tolerances import HUGGING_FACE as TOLERANCE

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

RECIPES = ("speech_base", "text_base_fairseq", "vision_base_d2v1", "vision_base")
TASKS: dict[str, tuple[tuple[str, dict[str, Any], set[str]], ...]] = {
    "speech": (("AutoModelForCTC", {"vocab_size": 32}, {"lm_head.weight", "lm_head.bias"}),),
    "text": (
        (
            "AutoModelForSequenceClassification",
            {"num_labels": 5},
            {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")},
        ),
    ),
    "vision": (
        ("AutoModelForImageClassification", {"num_labels": 5}, {"classifier.weight", "classifier.bias"}),
        (
            "AutoModelForImageClassification",
            {"num_labels": 5, "use_mean_pooling": True},
            {"classifier.weight", "classifier.bias"}
            | {f"data2vec_vision.pooler.layernorm.{kind}" for kind in ("weight", "bias")},
        ),
    ),
}
"""Class, what it is told, and the parameters that it starts anew: the task's alone, the norm behind the mean too."""


@pytest.fixture(params=RECIPES)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run of a released recipe with random weights, student and teacher different everywhere."""
    config, extras = base(request.param), None
    if config.modality == "text":
        files = vocabulary_of_letters(tmp_path / "vocabulary").core_files
        extras = {f"tokenizer/{name}": content for name, content in files.items()}
    models = {"student": perturb_(build_student(config), 1, 0.01), "teacher": perturb_(build_teacher(config), 2, 0.01)}
    state = {kind: dict(model.named_parameters()) for kind, model in models.items()}
    write_small_checkpoint(tmp_path / request.param, config, state, extras=extras)
    return tmp_path / request.param


def test_base_there_and_back(run: Path, tmp_path: Path) -> None:
    """Through fairseq or the BEiT fork everything, through Hugging Face the encoder, student's and teacher's."""
    back = there_and_back(run, tmp_path, "beit" if run.name == "vision_base" else "fairseq")
    assert_bit_equal(open_checkpoint(run), back)
    for weights in ("student", "teacher"):
        folder = tmp_path / weights
        found = dict(there_and_back(run, folder, "hf", "--weights", weights).tensors("student"))
        expected = load_encoder(open_checkpoint(run), weights)
        for name, value in expected.named_parameters():
            assert name.startswith("head.") or torch.equal(value, found[name]), name


def test_base_in_classes_for_tasks(run: Path, tmp_path: Path) -> None:
    """They start their heads anew and nothing else, and their encoder computes what ours does."""
    folder = tmp_path / "hf"
    assert convert("--checkpoint", run, "--to", "hf", "--output", folder) == 0
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["relative"] < 1e-5 and 0 <= parity["relative_float64"] < 1e-12
    checkpoint = open_checkpoint(run)
    student, config = load_encoder(checkpoint, "student"), base(run.name)
    example = HUGGING_FACE[config.modality].example(config, torch.Generator().manual_seed(7))
    inputs = {k: v for k, v in example.arguments.items() if k not in ("bool_masked_pos", "mask_time_indices")}
    with torch.no_grad():
        expected = student.features(example.inputs, example.padding_bt)
    for name, told, new in TASKS[config.modality]:
        model, info = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **told
        )
        pooled = told.get("use_mean_pooling", False)  # which leaves the norm behind the encoder out
        assert set(info["missing_keys"]) == new
        assert set(info["unexpected_keys"]) == ({"layernorm.weight", "layernorm.bias"} if pooled else set())
        model.eval()
        with torch.no_grad():
            found = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state
            found = student.encoder.norm(found) if pooled else found
            assert (found - expected).abs().max() < TOLERANCE * max(1.0, float(expected.abs().max()))
            assert model(**inputs).logits.isfinite().all()

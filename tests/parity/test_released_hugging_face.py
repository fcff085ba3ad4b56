"""Hugging Face's models in every released configuration, with random weights: imported and exported with equal outputs.

No released file is at hand (nothing is fetched). The configurations are those that its own conversion scripts left: the
defaults of its classes, but for what each entry says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megad2v.convert.certificate import quiet
from megad2v.convert.load import checkpoint_config, load_encoder, open_checkpoint
from megad2v.modalities.build import HUGGING_FACE
from tests.tolerances import HUGGING_FACE as TOLERANCE
from tests.unit.test_tokenizer import corpus, roberta
from tools import convert_checkpoint

transformers = pytest.importorskip("transformers")

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
# convert_data2vec_vision...py: the class's defaults (eps 1e-12, no mask token) and these.
VISION = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True, "use_mean_pooling": False}
# convert_data2vec_text...py: RoBERTa's tables and the norms' epsilon that it passes.
TEXT = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
RELEASED: dict[str, tuple[str, dict[str, Any]]] = {
    "audio base": ("Data2VecAudioModel", {}),
    "audio large": ("Data2VecAudioModel", LARGE),
    "audio base, for CTC": ("Data2VecAudioForCTC", {"vocab_size": 32}),
    "vision base": ("Data2VecVisionModel", VISION),
    "vision large": ("Data2VecVisionModel", VISION | LARGE),
    "text base": ("Data2VecTextModel", TEXT),
    "text base, with a language model's head": ("Data2VecTextForMaskedLM", TEXT),
}
SHRUNK = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
SMALLER = {
    "Audio": {"conv_dim": [32] * 7, "num_conv_pos_embedding_groups": 4},
    "Vision": {"image_size": 64},
    "Text": {"vocab_size": 801, "max_position_embeddings": 66},
}
"""The released configurations, at a size that takes no time."""


def random_model(kind: str, settings: dict[str, Any]) -> nn.Module:
    """Of transformers' own initialisation, then off it: norms of one and biases of zero hide mistakes."""
    torch.manual_seed(0)
    family = kind.removeprefix("Data2Vec").split("For")[0].removesuffix("Model")
    model = getattr(transformers, kind)(getattr(transformers, f"Data2Vec{family}Config")(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
            if "embeddings" in name and parameter.dim() == 2 and family == "Text" and "token_type" not in name:
                parameter[1] = 0.0  # padding
    return model


def cases(shrink: bool) -> list[Any]:
    """pytest's parameters; at full size they are slow."""
    found = []
    for name, (kind, settings) in RELEASED.items():
        family = next(family for family in SMALLER if family in kind)
        small = SHRUNK | SMALLER[family] if shrink else {}
        found.append(pytest.param(kind, {**settings, **small}, id=name, marks=[] if shrink else [pytest.mark.slow]))
    return found


def check(kind: str, settings: dict[str, Any], tmp_path: Path) -> list[str]:
    """Import, compare on a fresh input, export, compare; returns the import's report."""
    theirs = random_model(kind, settings)
    theirs.save_pretrained(tmp_path / "theirs")
    arguments = ["--from", "hf", "--input", tmp_path / "theirs", "--output", tmp_path / "ours"]
    assert convert_checkpoint.main([str(argument) for argument in arguments]) == 0
    checkpoint = open_checkpoint(tmp_path / "ours")
    config, student = checkpoint_config(checkpoint), load_encoder(checkpoint, "student")
    keys = HUGGING_FACE[config.modality]
    example = keys.example(config, torch.Generator().manual_seed(7))
    inputs = {k: v for k, v in example.arguments.items() if k not in ("bool_masked_pos", "mask_time_indices")}
    with quiet(transformers):
        model = transformers.AutoModel.from_pretrained(tmp_path / "theirs", local_files_only=True).eval()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        ours = student.features(example.inputs, example.padding_bt)
    assert 0.1 < expected.abs().max() < 50
    real = slice(None) if example.padding_bt is None else ~example.padding_bt
    assert (ours - expected)[real].abs().max() < TOLERANCE
    state = keys.to_hugging_face(dict(student.named_parameters()), config)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(keys.model_config(config)))
    with quiet(transformers):
        again = transformers.AutoModel.from_pretrained(tmp_path, local_files_only=True).eval()
    with torch.no_grad():
        assert (again(**inputs).last_hidden_state - expected)[real].abs().max() < TOLERANCE
    originals = {n.split(".", 1)[1] if n.startswith("data2vec_") else n: v for n, v in theirs.state_dict().items()}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        if name in originals and not name.endswith(("position_embeddings.weight", "token_type_embeddings.weight")):
            assert torch.equal(value, originals[name]), name
    return json.loads((tmp_path / "ours" / "import.json").read_text())["report"]


@pytest.mark.parametrize(("kind", "settings"), cases(shrink=True))
def test_released_configurations(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Equal outputs both ways, and the report names what each file lacks."""
    report = "\n".join(check(kind, settings, tmp_path))
    assert "teacher: not in the file" in report
    parity = json.loads((tmp_path / "ours" / "parity.json").read_text())
    assert parity["round_trip"]["tensors"] > 40 and parity["round_trip"]["differing"] == 0
    assert ("head.weight" in report) != ("Text" in kind)
    if "Text" in kind:
        assert "head.0.weight: not in the file; starts new (model.init bert" in report
    if "Vision" in kind:
        assert "front_end.mask_token: not in the file; starts new (model.init beit" in report
        assert "model.norm_eps 1e-12, as its config.json says" in report
    # Data2VecTextModel comes with a pooler, and models for a task with their head.
    assert ("belong to a task: " in report) == ("For" in kind or "Text" in kind)


@pytest.mark.parametrize(("kind", "settings"), cases(shrink=False))
def test_released_sizes(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    check(kind, settings, tmp_path)


def test_mean_pooling(tmp_path: Path) -> None:
    """Fine-tuned classifiers with one shared table: the norm behind the encoder starts new, the classifier is left."""
    settings = {**VISION, **SHRUNK, **SMALLER["Vision"], "use_mean_pooling": True, "use_mask_token": True}
    model = random_model("Data2VecVisionForImageClassification", settings)
    model.save_pretrained(tmp_path / "theirs")
    arguments = ["--from", "hf", "--input", tmp_path / "theirs", "--output", tmp_path / "ours"]
    assert convert_checkpoint.main([str(argument) for argument in arguments]) == 0
    report = "\n".join(json.loads((tmp_path / "ours" / "import.json").read_text())["report"])
    for words in ("encoder.norm.weight: not in the file", "classifier.weight", "pooler.layernorm.weight"):
        assert words in report


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json", "named"])
def test_text_brings_its_tokenizer(files: str, tmp_path: Path) -> None:
    """A byte-level BPE as the released model's, beside the weights or named."""
    made = roberta(tmp_path / "bpe", corpus())
    vocabulary = len(json.loads((made / "vocab.json").read_text()))
    settings = {**TEXT, **SHRUNK, **SMALLER["Text"], "vocab_size": vocabulary}
    random_model("Data2VecTextModel", settings).save_pretrained(tmp_path / "theirs")
    sources = {
        "tokenizer.json": [made / "json/tokenizer.json"],
        "vocab.json": [made / "vocab.json", made / "merges.txt"],
    }
    for source in sources.get(files, []):
        (tmp_path / "theirs" / source.name).write_bytes(source.read_bytes())
    arguments = ["--from", "hf", "--input", tmp_path / "theirs", "--output", tmp_path / "ours"]
    arguments += ["--tokenizer", made / "json"] if files == "named" else []
    assert convert_checkpoint.main([str(argument) for argument in arguments]) == 0
    checkpoint = open_checkpoint(tmp_path / "ours")
    assert "tokenizer/tokenizer.json" in checkpoint.extras
    # And on to Hugging Face with it, which certifies the tokens too.
    arguments = ["--checkpoint", tmp_path / "ours", "--to", "hf", "--output", tmp_path / "again"]
    assert convert_checkpoint.main([str(argument) for argument in arguments]) == 0


def test_a_tokenizer_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = roberta(tmp_path / "bpe", corpus())
    random_model("Data2VecTextModel", {**TEXT, **SHRUNK, **SMALLER["Text"]}).save_pretrained(tmp_path / "theirs")
    arguments = ["--from", "hf", "--input", tmp_path / "theirs", "--output", tmp_path / "ours"]
    assert convert_checkpoint.main([str(argument) for argument in (*arguments, "--tokenizer", made / "json")]) == 2
    assert "ids, the model 801" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()

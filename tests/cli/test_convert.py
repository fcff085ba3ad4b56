"""tools/convert_checkpoint.py --to hf: a checkpoint in fragments becomes a certified folder of Hugging Face's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megad2v.config.load import parse_command_line
from megad2v.convert.certificate import TOLERANCE
from megad2v.convert.hf import check_output, export, written_aside
from megad2v.convert.load import load_encoder, open_checkpoint
from megad2v.convert.provenance import data_counts, recipe_of
from megad2v.data.format import DatasetInfo, ShardInfo, write_dataset
from megad2v.modalities.build import build_student
from megad2v.modalities.text.synthetic import demo_story
from megad2v.modalities.text.train import TrainingOptions, train_tokenizer
from tests.checkpoints import (
    small_config,
    small_speech_config,
    small_state,
    small_text_config,
    write_small_checkpoint,
)
from tests.cli.conversions import convert, text_checkpoint
from tests.distributed.harness import REPOSITORY
from tests.tolerances import HUGGING_FACE

transformers = pytest.importorskip("transformers")

FILES = {"README.md", "config.json", "model.safetensors", "parity.json", "preprocessor_config.json"}


def last_state(folder: Path, images: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        return model(images).last_hidden_state


def test_command_exports_offline_without_deepspeed(vision_run: Path, tmp_path: Path) -> None:
    """A new process, as a person starts it, in another folder, with no network to fall back on."""
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('DEEPSPEED' if 'deepspeed' in sys.modules else 'WITHOUT')"
    )
    tool = REPOSITORY / "tools" / "convert_checkpoint.py"
    arguments = ["--checkpoint", vision_run, "--to", "hf", "--output", "a/b/hf"]
    completed = subprocess.run(
        [sys.executable, "-c", program, tool, *arguments],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines()[-1] == "WITHOUT"
    assert "student weights of step 7; every hidden state equals ours" in completed.stdout
    assert {path.name for path in (tmp_path / "a" / "b" / "hf").iterdir()} == FILES
    assert len({path.stat().st_mode for path in (tmp_path / "a" / "b" / "hf").iterdir()}) == 1


@pytest.mark.parametrize(
    ("scope", "weights"),
    [("encoder", "student"), ("encoder", "teacher"), ("model", "teacher")],
    ids=["student", "teacher of the encoder", "teacher of all"],
)
def test_the_weights_asked_for(scope: str, weights: str, tmp_path: Path) -> None:
    """A shared front end stays the student's; a teacher that averages the whole model brings its own."""
    config = small_config(scope=scope)
    state = small_state(config)
    averaged = {"encoder"} if scope == "encoder" else {"encoder", "front_end"}
    assert {name.split(".")[0] for name in state["teacher"]} == averaged
    write_small_checkpoint(tmp_path / "run", config, state)
    assert (
        convert("--checkpoint", tmp_path / "run", "--to", "hf", "--output", tmp_path / "hf", "--weights", weights) == 0
    )
    expected = build_student(config).eval()
    expected.load_state_dict(state["student"] | (state["teacher"] if weights == "teacher" else {}), strict=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = expected.features(images) - last_state(tmp_path / "hf", images)
    assert difference.abs().max() < HUGGING_FACE
    loaded = load_encoder(open_checkpoint(tmp_path / "run"), weights)
    assert all(torch.equal(p, dict(expected.named_parameters())[name]) for name, p in loaded.named_parameters())


def test_certificate_and_card(vision_run: Path, tmp_path: Path) -> None:
    parity = export(open_checkpoint(vision_run), tmp_path / "hf")
    assert parity == json.loads((tmp_path / "hf" / "parity.json").read_text())
    assert [layer["name"] for layer in parity["layers"]] == ["input", "block 1", "block 2", "block 3", "output"]
    assert parity["max_abs"] < HUGGING_FACE
    assert parity["tolerance"] == TOLERANCE == HUGGING_FACE
    assert parity["relative_float64"] < 1e-12
    assert parity["weights"] == "student"
    assert parity["step"] == 7
    card = (tmp_path / "hf" / "README.md").read_text()
    for words in (
        "library_name: transformers",
        "7 of 1,000",
        "1.25",
        "0.375",
        "megad2v test",
        '"width": 24',
        "16 samples",
    ):
        assert words in card, words
    assert "99.0" not in card  # a later step's
    assert "| recipe | its own; " in card and "| data |" not in card
    assert str(tmp_path) not in card


def test_the_card_knows_recipe_and_data(tmp_path: Path) -> None:
    """A recipe with two keys changed, and shards that still lie where they lay; of two of three shards no hours."""
    text = ["--deepspeed", "none", "--config", "speech_tiny", "--train.steps", "12", "--model.dropout", "0.25"]
    shards = [ShardInfo(f"speech-{n}.tar", 5, 1, "") for n in range(3)]
    write_dataset(tmp_path, DatasetInfo(("speech",), 15, tuple(shards), totals={"hours": 1.25}))
    for shard in shards:
        (tmp_path / shard.name).touch()
    for pattern, expected in (
        (str(tmp_path), "15 samples, 1.25 hours, 3 shards"),
        (f"{tmp_path}/speech-{{0..1}}.tar", "10 samples, 2 shards"),
        (str(tmp_path / "gone"), ""),
    ):
        config = parse_command_line([*text, "--data.shards", pattern]).config
        assert data_counts(config) == expected
        assert recipe_of(config, ("model", "speech", "mask")) == (
            "`speech_tiny` with `train.steps` 12, `model.dropout` 0.25"
        )


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_speech(weights: str, tmp_path: Path) -> None:
    """Of a speech run: a certified folder whose card, extractor and fine-tuning class work without a network."""
    config = small_speech_config()
    state = small_state(config)
    write_small_checkpoint(tmp_path / "run", config, state)
    arguments = ("--checkpoint", tmp_path / "run", "--to", "hf", "--output", tmp_path / "hf", "--weights", weights)
    assert convert(*arguments) == 0
    assert {path.name for path in (tmp_path / "hf").iterdir()} == FILES
    parity = json.loads((tmp_path / "hf" / "parity.json").read_text())
    assert parity["max_abs"] < HUGGING_FACE and parity["relative_float64"] < 1e-12
    assert "27 with padding behind" in parity["input"]
    expected = build_student(config).eval()
    expected.load_state_dict(state["student"] | (state["teacher"] if weights == "teacher" else {}), strict=True)
    waveform = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "hf", local_files_only=True)
    inputs = extractor(waveform[0].numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf", local_files_only=True).eval()(**inputs)
        difference = expected.features(inputs["input_values"]) - theirs.last_hidden_state
    assert difference.abs().max() < HUGGING_FACE
    model, info = transformers.AutoModelForCTC.from_pretrained(
        tmp_path / "hf", vocab_size=31, local_files_only=True, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"lm_head.weight", "lm_head.bias"} and not info["unexpected_keys"]
    assert model(**inputs).logits.shape[2] == 31
    card = (tmp_path / "hf" / "README.md").read_text()
    for words in ("pipeline_tag: feature-extraction", "- data2vec-audio", "data2vec speech encoder", "AutoModelForCTC"):
        assert words in card, words
    assert '"conv_layers"' in card and '"patch_size"' not in card and '"jitter"' not in card


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_text(weights: str, tmp_path: Path) -> None:
    """Of a text run: a certified folder whose tokenizer, model and fine-tuning classes work without a network."""
    pytest.importorskip("sentencepiece")
    lines = [line for number in range(200) for line in demo_story(number, 1)]
    tokenizer = train_tokenizer(lines, TrainingOptions(700))
    state = text_checkpoint(tmp_path / "run", tokenizer)
    folder = tmp_path / "hf"
    assert convert("--checkpoint", tmp_path / "run", "--to", "hf", "--output", folder, "--weights", weights) == 0
    names = FILES - {"preprocessor_config.json"} | {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["max_abs"] < HUGGING_FACE and parity["relative_float64"] < 1e-12
    assert "32 random ids, and 22 with padding behind" in parity["input"]
    assert parity["tokenizer"]["texts"] > 2_500 and parity["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    expected = build_student(small_text_config(text={"vocabulary": 700})).eval()
    expected.load_state_dict(state["student"] | (state["teacher"] if weights == "teacher" else {}), strict=True)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs = theirs(lines[:3], padding=True, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape[1] <= 32
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True).eval()
    padding_bt = inputs["attention_mask"] == 0
    with torch.no_grad():
        ours = expected.features(inputs["input_ids"][:, None], padding_bt)
        assert (ours - model(**inputs).last_hidden_state).abs().max() < HUGGING_FACE
    for kind, new in (
        ("SequenceClassification", {"classifier.dense", "classifier.out_proj"}),
        ("TokenClassification", {"classifier"}),
    ):
        tuned, info = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
            folder, num_labels=5, local_files_only=True, output_loading_info=True
        )
        assert {name.rpartition(".")[0] for name in info["missing_keys"]} == new and not info["unexpected_keys"]
        assert tuned(**inputs).logits.shape[-1] == 5
    card = (folder / "README.md").read_text()
    for words in ("pipeline_tag: feature-extraction", "- data2vec-text", "data2vec text encoder", "AutoTokenizer"):
        assert words in card, words
    assert '"teacher_sees"' in card and '"conv_layers"' not in card and str(tmp_path) not in card


def test_fine_tuning_class_lacks_only_its_classifier(vision_run: Path, tmp_path: Path) -> None:
    export(open_checkpoint(vision_run), tmp_path / "hf")
    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "hf", num_labels=5, local_files_only=True, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", local_files_only=True)
    pixels = processor(torch.zeros(3, 40, 60, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert model(pixels).logits.shape == (1, 5)


def test_overwriting_has_to_be_asked_for(vision_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "hf"
    output.mkdir()  # empty: taken as new
    arguments = ("--checkpoint", vision_run, "--to", "hf", "--output", output)
    assert convert(*arguments) == 0
    student = load_file(output / "model.safetensors")
    assert convert(*arguments, "--weights", "teacher") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert convert(*arguments, "--weights", "teacher", "--overwrite") == 0
    teacher = load_file(output / "model.safetensors")
    assert student.keys() == teacher.keys()
    assert not torch.equal(student["layernorm.weight"], teacher["layernorm.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with written_aside(tmp_path / "a" / "b") as aside:
            (aside / "model.safetensors").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    check_output(tmp_path / "a" / "b", overwrite=False)


def test_without_transformers(
    vision_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert convert("--checkpoint", vision_run, "--to", "hf", "--output", tmp_path / "hf") == 2
    error = capsys.readouterr().err
    assert "megad2v[hf]" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())

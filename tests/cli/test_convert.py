"""tools/convert_checkpoint.py: a checkpoint in fragments becomes a certified Hugging Face folder, or nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megad2v.config.load import parse_command_line
from megad2v.config.schema import Config
from megad2v.convert.certificate import TOLERANCE, CertificateError, certify
from megad2v.convert.hf import check_output, export, written_aside
from megad2v.convert.load import checkpoint_config, load_encoder, open_checkpoint
from megad2v.convert.provenance import data_counts, recipe_of
from megad2v.data.format import DatasetInfo, ShardInfo, write_dataset
from megad2v.errors import UserError
from megad2v.modalities.build import build_student
from megad2v.modalities.speech import hf_keys as speech_keys
from megad2v.modalities.text import hf_keys as text_keys
from megad2v.modalities.text.synthetic import demo_story
from megad2v.modalities.text.tokenizer import Tokenizer
from megad2v.modalities.text.train import TrainingOptions, train_tokenizer
from megad2v.modalities.vision import hf_keys
from tests.checkpoints import (
    small_config,
    small_speech_config,
    small_state,
    small_text_config,
    write_small_checkpoint,
)
from tests.tolerances import HUGGING_FACE
from tools import convert_checkpoint

transformers = pytest.importorskip("transformers")

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = {"README.md", "config.json", "model.safetensors", "parity.json", "preprocessor_config.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint, as three ranks left it, and metrics beside it."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    config = small_config(head_layers=1)
    write_small_checkpoint(run, config, small_state(config), step=7)
    lines = [
        {"step": 7, "loss": 1.25, "target_std": 0.5, "samples": 224},
        {"step": 7, "valid_loss": 1.5, "valid_retrieval": 0.375},
        {"step": 8, "loss": 99.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
    return run


def convert(*arguments: object) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def last_state(folder: Path, images: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        return model(images).last_hidden_state


def test_command_exports_offline_without_deepspeed(run: Path, tmp_path: Path) -> None:
    """A new process, as a person starts it, in another folder, with no network to fall back on."""
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('DEEPSPEED' if 'deepspeed' in sys.modules else 'WITHOUT')"
    )
    tool = REPOSITORY / "tools" / "convert_checkpoint.py"
    arguments = ["--checkpoint", run, "--to", "hf", "--output", "a/b/hf"]
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


def test_certificate_and_card(run: Path, tmp_path: Path) -> None:
    parity = export(open_checkpoint(run), tmp_path / "hf")
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


def test_any_wrong_speech_parameter_fails_the_certificate(tmp_path: Path) -> None:
    """One element of any parameter, off by little; only what a key's bias adds to all logits alike may differ."""
    config = small_speech_config()
    write_small_checkpoint(tmp_path / "run", config, small_state(config))
    student = load_encoder(open_checkpoint(tmp_path / "run"), "student")
    parameters = dict(student.named_parameters())
    kinds = [name for name in parameters if not name.startswith(("head.", "encoder.blocks"))]
    kinds += [name for name in parameters if name.startswith("encoder.blocks.1.")]
    assert len(kinds) == 1 + 3 * 3 + 2 + 2 + 2 * 2 + 2 + 12
    (tmp_path / "config.json").write_text(json.dumps(speech_keys.model_config(config)))
    for name in [None, *kinds]:
        damaged = {**parameters}
        if name is not None:
            damaged[name] = parameters[name].clone()
            damaged[name].view(-1)[parameters[name].numel() - 1] += 1e-3
        state = speech_keys.to_hugging_face(damaged, config)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CertificateError, match="differs from ours") if name is not None else nullcontext():
            certify(tmp_path, student, speech_keys, config)


def text_checkpoint(run: Path, tokenizer: Tokenizer | None, **text: object) -> dict[str, dict[str, torch.Tensor]]:
    """A text run with one checkpoint that carries `tokenizer`; returns its tensors."""
    vocabulary = 261 if tokenizer is None else tokenizer.vocabulary
    config = small_text_config(text={"vocabulary": vocabulary, "tokenizer": str(run / "elsewhere"), **text})
    files = tokenizer.core_files if tokenizer is not None else {}
    state = small_state(config)
    write_small_checkpoint(run, config, state, extras={f"tokenizer/{name}": files[name] for name in files})
    return state


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


def test_any_wrong_text_parameter_fails_the_certificate(tmp_path: Path) -> None:
    """One element of any parameter, off by little; of the table of tokens a row that the input holds."""
    text_checkpoint(tmp_path / "run", Tokenizer("bytes", 261, name="bytes"), max_tokens=128)
    checkpoint = open_checkpoint(tmp_path / "run")
    config, student = checkpoint_config(checkpoint), load_encoder(checkpoint, "student")
    parameters = dict(student.named_parameters())
    kinds = [name for name in parameters if not name.startswith(("head.", "encoder.blocks"))]
    kinds += [name for name in parameters if name.startswith("encoder.blocks.1.")]
    assert len(kinds) == 2 + 2 + 12
    (tmp_path / "config.json").write_text(json.dumps(text_keys.model_config(config)))
    for name in [None, *kinds]:
        damaged = {**parameters}
        if name is not None:
            damaged[name] = parameters[name].clone()
            damaged[name].view(-1)[parameters[name].numel() - 1] += 1e-3
        state = text_keys.to_hugging_face(damaged, config)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CertificateError, match="differs from ours") if name is not None else nullcontext():
            certify(tmp_path, student, text_keys, config)


def test_a_wrong_tokenizer_fails_its_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cuts a space off, one that finds "<mask>" in texts, one without an id: nothing is written."""
    text_checkpoint(tmp_path / "run", Tokenizer("bytes", 261, name="bytes"))
    right = text_keys.hugging_face_files

    def stripped(settings: dict[str, Any], tokenizer: dict[str, Any]) -> None:
        tokenizer["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": False}

    def finds_masks(settings: dict[str, Any], tokenizer: dict[str, Any]) -> None:
        settings["split_special_tokens"] = False

    def lacks_an_id(settings: dict[str, Any], tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"].pop("<0xFF>")

    for spoil, expected in (
        (stripped, r"gives \[0, 2\] for ' ', ours \[0, 36, 2\]"),
        (finds_masks, "for '<s> <pad> </s> <unk> <mask>"),
        (lacks_an_id, "the exported tokenizer has 260 ids"),
    ):

        def wrong(tokenizer: Tokenizer, longest: int, spoil: Any = spoil) -> dict[str, str]:
            files = {name: json.loads(content) for name, content in right(tokenizer, longest).items()}
            spoil(files["tokenizer_config.json"], files["tokenizer.json"])
            return {name: json.dumps(content) for name, content in files.items()}

        monkeypatch.setattr(text_keys, "hugging_face_files", wrong)
        with pytest.raises(CertificateError, match=expected):
            export(open_checkpoint(tmp_path / "run"), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_text_that_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sentencepiece")
    lines = [line for number in range(50) for line in demo_story(number, 1)]
    unigram = train_tokenizer(lines, TrainingOptions(400, model="unigram"))
    text_checkpoint(tmp_path / "without", None)
    text_checkpoint(tmp_path / "unigram", unigram)
    text_checkpoint(tmp_path / "other", Tokenizer("bytes", 261, name="bytes"), vocabulary=262)
    for name, expected in (
        ("without", "the checkpoint holds no tokenizer"),
        ("unigram", "a unigram vocabulary cannot be exported"),
        ("other", "text.vocabulary: 262, but the checkpoint's tokenizer has 261 ids"),
    ):
        assert convert("--checkpoint", tmp_path / name, "--to", "hf", "--output", tmp_path / "hf") == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    assert not (tmp_path / "hf").exists()


def test_fine_tuning_class_lacks_only_its_classifier(run: Path, tmp_path: Path) -> None:
    export(open_checkpoint(run), tmp_path / "hf")
    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "hf", num_labels=5, local_files_only=True, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", local_files_only=True)
    pixels = processor(torch.zeros(3, 40, 60, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert model(pixels).logits.shape == (1, 5)


def test_any_wrong_parameter_fails_the_certificate(run: Path, tmp_path: Path) -> None:
    """One element of any parameter, off by little: float32 would not see most of them behind a layer scale."""
    checkpoint = open_checkpoint(run)
    config, student = checkpoint_config(checkpoint), load_encoder(checkpoint, "student")
    parameters = dict(student.named_parameters())
    kinds = [name for name in parameters if name.startswith(("front_end.", "encoder.")) and "blocks" not in name]
    kinds += [name for name in parameters if name.startswith("encoder.blocks.1.")]
    assert len(kinds) == 7 + 14
    (tmp_path / "config.json").write_text(json.dumps(hf_keys.model_config(config)))
    for name in [None, *kinds]:
        damaged = {**parameters}
        if name is not None:
            damaged[name] = parameters[name].clone()
            damaged[name].view(-1)[parameters[name].numel() // 2] += 1e-3
        save_file(hf_keys.to_hugging_face(damaged, config), tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CertificateError, match="differs from ours") if name is not None else nullcontext():
            certify(tmp_path, student, hf_keys, config)


def test_a_flipped_weight_leaves_no_output(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = hf_keys.to_hugging_face

    def wrong(parameters: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
        state = right(parameters, config)
        if (name := "encoder.layer.2.output.dense.weight") in state and not state[name].is_meta:
            state[name][3, 5] *= -1
        return state

    monkeypatch.setattr(hf_keys, "to_hugging_face", wrong)
    assert convert("--checkpoint", run, "--to", "hf", "--output", tmp_path / "new" / "hf") == 1
    assert "differs from ours from block 3 on" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_failed_certificate_is_one_line_and_leaves_the_old_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export(open_checkpoint(run), tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    config = hf_keys.model_config
    monkeypatch.setattr(hf_keys, "model_config", lambda c: {**config(c), "layer_norm_eps": 1e-12})
    assert convert("--checkpoint", run, "--to", "hf", "--output", tmp_path / "hf", "--overwrite") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("convert_checkpoint: the exported model differs from ours from block 1 on: ")
    assert captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before


def test_parameters_that_they_do_not_know_fail_the_certificate(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hf_keys.model_config
    for key, value in {"use_mean_pooling": True, "use_mask_token": False, "layer_scale_init_value": 0.0}.items():
        monkeypatch.setattr(hf_keys, "model_config", lambda c, k=key, v=value: {**config(c), k: v})
        with pytest.raises(CertificateError, match="unexpected_keys"):
            export(open_checkpoint(run), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_overwriting_has_to_be_asked_for(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "hf"
    output.mkdir()  # empty: taken as new
    arguments = ("--checkpoint", run, "--to", "hf", "--output", output)
    assert convert(*arguments) == 0
    student = load_file(output / "model.safetensors")
    assert convert(*arguments, "--weights", "teacher") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert convert(*arguments, "--weights", "teacher", "--overwrite") == 0
    teacher = load_file(output / "model.safetensors")
    assert student.keys() == teacher.keys()
    assert not torch.equal(student["layernorm.weight"], teacher["layernorm.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_bad_input_is_one_line_and_exit_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    good = {"--checkpoint": run, "--to": "hf", "--output": tmp_path / "out"}
    for change, expected in (
        ({"--to": "onnx"}, "--to onnx: cannot be written; expected hf or fairseq or beit"),
        ({"--weights": "best"}, "--weights best: expected student or teacher"),
        ({"--checkpoint": tmp_path / "nowhere"}, "no checkpoint here"),
        ({"--checkpoint": tmp_path / "step_00000001"}, "not a checkpoint"),
        ({"--output": tmp_path / "mine"}, "is not an export of ours"),
        ({"--output": tmp_path / "mine", "--overwrite": None}, "is not an export of ours"),
        ({"--output": tmp_path / "file" / "out"}, "not a folder"),
        ({"--output": tmp_path / "file"}, "is not an export of ours"),
    ):
        words = [word for pair in (good | change).items() for word in pair if word is not None]
        assert convert(*words) == 2, change
        captured = capsys.readouterr()
        assert expected in captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "file"}
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_damaged_or_foreign_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config()
    state = small_state(config)
    flipped = write_small_checkpoint(tmp_path / "flipped", config, state)
    data = bytearray((flipped / "rank00001.safetensors").read_bytes())
    data[-5] ^= 1
    (flipped / "rank00001.safetensors").write_bytes(data)
    deeper = small_config(depth=4)
    other = write_small_checkpoint(tmp_path / "other", deeper, state)
    post = small_config(norm="post")
    write_small_checkpoint(tmp_path / "post", post, state)
    without = {"student": state["student"], "teacher": {"encoder.norm.bias": state["teacher"]["encoder.norm.bias"]}}
    write_small_checkpoint(tmp_path / "without", config, without)
    future = {**dataclasses.asdict(config), "flux": {"capacitor": 1}}
    write_small_checkpoint(tmp_path / "future", config, state)
    for checkpoint, expected in (
        (flipped, "rank00001.safetensors does not match its checksum"),
        (tmp_path / "flipped", "rank00001.safetensors does not match its checksum"),
        (other, "its parameters are not those of its configuration (encoder.blocks.3."),
        (tmp_path / "post", "model.norm"),
        (tmp_path / "without", "holds no teacher weights of encoder."),
    ):
        assert (
            convert("--checkpoint", checkpoint, "--to", "hf", "--output", tmp_path / "o", "--weights", "teacher") == 2
        )
        captured = capsys.readouterr()
        assert expected in captured.err
        assert captured.err.count("\n") == 1
    checkpoint = open_checkpoint(tmp_path / "future")
    checkpoint.index.config.clear()
    checkpoint.index.config.update(future)
    with pytest.raises(UserError, match=r"another version \(flux: unknown key"):
        load_encoder(checkpoint, "student")
    assert not (tmp_path / "o").exists()


def test_without_transformers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert convert("--checkpoint", run, "--to", "hf", "--output", tmp_path / "hf") == 2
    error = capsys.readouterr().err
    assert "megad2v[hf]" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_full_disk_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megad2v.convert.hf.write_whole", full)
    assert convert("--checkpoint", run, "--to", "hf", "--output", tmp_path / "hf") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with written_aside(tmp_path / "a" / "b") as aside:
            (aside / "model.safetensors").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    check_output(tmp_path / "a" / "b", overwrite=False)

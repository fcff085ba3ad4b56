"""tools/convert_checkpoint.py: what is wrong is one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megad2v.config.schema import Config
from megad2v.convert.fairseq import BEIT_FILE, FILE
from megad2v.convert.load import load_encoder, open_checkpoint
from megad2v.errors import UserError
from megad2v.modalities.text.synthetic import demo_story
from megad2v.modalities.text.tokenizer import Tokenizer
from megad2v.modalities.text.train import TrainingOptions, train_tokenizer
from tests.checkpoints import (
    small_config,
    small_speech_config,
    small_state,
    small_text_config,
    write_small_checkpoint,
)
from tests.cli.conversions import PUBLISHED, SPEECH, assert_refused, convert, text_checkpoint, written

transformers = pytest.importorskip("transformers")


def test_bad_input_is_one_line_and_exit_2(vision_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    good = {"--checkpoint": vision_run, "--to": "hf", "--output": tmp_path / "out"}
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


@pytest.mark.parametrize("target", ["hf", "beit"])
def test_full_disk_is_one_line(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file may not grow beyond 30 KB, as on a disk that has no more."""
    run = written(tmp_path, small_config(**PUBLISHED))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        code = convert("--checkpoint", run, "--to", target, "--output", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert code == 1 and error.count("\n") == 1 and ("File too large" in error or "not written" in error), error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("config", "target", "words"),
    [
        (small_config(**PUBLISHED), "fairseq", "model.head_layers: fairseq's data2vec_vision compares"),
        (small_config(scope="model", mlp_ratio=4.0), "fairseq", "teacher.scope: fairseq's data2vec_vision shares"),
        (small_config(mlp_ratio=4.0, norm_eps=1e-6), "fairseq", "model.norm_eps"),
        (small_config(), "fairseq", "model.mlp_ratio"),
        (small_config(mlp_ratio=4.0), "beit", "model.norm_eps: the BEiT fork norms with 1e-06"),
        (SPEECH, "beit", "--to beit: is of images, the checkpoint of speech"),
        (small_speech_config(deep_norm=True), "fairseq", "model.deep_norm"),
        (small_speech_config(norm="pre"), "fairseq", "model.norm:"),
        (small_text_config(head_layers=0), "fairseq", "model.head_layers"),
    ],
)
def test_what_the_other_program_cannot_compute(
    config: Config, target: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path, config)
    assert_refused(capsys, words, "--checkpoint", run, "--to", target, "--output", tmp_path / "out")


class Malicious:
    """Runs a command wherever it is unpickled without restrictions."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one line that names the file, and what is wrong in its own names."""
    run = written(tmp_path, SPEECH)
    assert convert("--checkpoint", run, "--to", "fairseq", "--output", tmp_path / "good") == 0
    capsys.readouterr()
    good = torch.load(tmp_path / "good" / FILE, weights_only=True)  # noqa: TID251 - ours

    def refused(words: str, change: Callable[[dict[str, Any]], Any], *, program: str = "fairseq") -> None:
        content = torch.load(tmp_path / "good" / FILE, weights_only=True)  # noqa: TID251 - ours
        change(content)
        torch.save(content, tmp_path / "bad.pt")
        assert_refused(capsys, words, "--from", program, "--input", tmp_path / "bad.pt", "--output", tmp_path / "out")

    lost = "encoder.layers.1.fc1.weight"
    refused(f"{lost} is missing", lambda c: c["model"].pop(lost))
    refused(f"_ema: {lost.removeprefix('encoder.')}"[:6], lambda c: c["model"]["_ema"].pop("layers.1.fc1.weight"))
    refused("has shape (24, 24)", lambda c: c["model"].update({lost: torch.zeros(24, 24)}))
    refused(
        "quantizer.vars: our speech model has no such", lambda c: c["model"].update({"quantizer.vars": torch.ones(1)})
    )
    refused("holds fairseq's wav2vec2;", lambda c: c["cfg"]["model"].update(_name="wav2vec2"))
    refused("data2vec 2.0", lambda c: c["cfg"]["model"].update(_name="data2vec_multi"))
    refused("neither cfg nor args", lambda c: c.update(cfg=None))
    refused("conv_feature_layers", lambda c: c["cfg"]["model"].update(conv_feature_layers="__import__('os').getcwd()"))
    refused("is no model of the BEiT fork", lambda c: None, program="beit")
    refused("layer_norm_first", lambda c: c["cfg"]["model"].update(layer_norm_first=True))
    marker = tmp_path / "marker"
    refused("system), and building that could run code", lambda c: c.update(extra=Malicious(f"touch {marker}")))
    assert not marker.exists()
    whole = (tmp_path / "good" / FILE).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    cut = ("--from", "fairseq", "--input", tmp_path / "cut.pt", "--output", tmp_path / "out")
    assert_refused(capsys, "not a whole file of torch.save", *cut)
    (tmp_path / "cut.pt").write_text("<html>404 Not Found</html>")
    assert_refused(capsys, "not a whole file of torch.save", *cut)
    assert good["cfg"]["model"]["_name"] == "data2vec_audio"


def test_bad_folders_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    folder, out = tmp_path / "hf", ("--output", tmp_path / "out")
    folder.mkdir()
    assert_refused(capsys, "it has no config.json", "--from", "hf", "--input", folder, *out)
    (folder / "config.json").write_text('{"model_type": "wav2vec2"}')
    assert_refused(capsys, "holds a model of type wav2vec2", "--from", "hf", "--input", folder, *out)
    (folder / "config.json").write_text('{"model_type": "data2vec-audio"}')
    assert_refused(capsys, "no weights here", "--from", "hf", "--input", folder, *out)
    (folder / "config.json").write_text('{"model_type": "data2vec-vision", "use_relative_position_bias": true}')
    assert_refused(capsys, "use_relative_position_bias", "--from", "hf", "--input", folder, *out)
    assert_refused(capsys, "no such file or folder", "--from", "hf", "--input", tmp_path / "nowhere", *out)
    assert_refused(capsys, "takes a .pt or .pth file; here are 0", "--from", "fairseq", "--input", folder, *out)
    assert_refused(capsys, "give --checkpoint with --to, or --input with --from", *out)
    assert_refused(capsys, "give --checkpoint with --to", "--from", "hf", "--to", "hf", "--input", folder, *out)
    assert_refused(capsys, "--from onnx: cannot be read", "--from", "onnx", "--input", folder, *out)
    assert_refused(capsys, "goes with --input", "--from", "hf", *out)
    assert_refused(capsys, "goes with --checkpoint", "--to", "fairseq", "--input", folder, *out)
    assert_refused(capsys, "no checkpoint here", "--to", "fairseq", "--checkpoint", folder, *out)


def test_odd_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers that are none, and models that cannot be, of every program: anybody may have written the file."""
    pytest.importorskip("transformers")
    write_small_checkpoint(tmp_path / "beit_run", small_config(**PUBLISHED), small_state(small_config(**PUBLISHED)))
    write_small_checkpoint(tmp_path / "run", SPEECH, small_state(SPEECH))
    for run, target in (("run", "fairseq"), ("run", "hf"), ("beit_run", "beit")):
        assert convert("--checkpoint", tmp_path / run, "--to", target, "--output", tmp_path / target) == 0
    capsys.readouterr()
    out = ("--output", tmp_path / "out")
    nonsense, impossible = "not the settings of a data2vec model", "describes a model that cannot be"

    def spoilt(program: str, words: str, change: Callable[[dict[str, Any]], Any]) -> None:
        file = tmp_path / program / (BEIT_FILE if program == "beit" else FILE)
        content = torch.load(file, weights_only=True)  # noqa: TID251 - ours
        change(content)
        torch.save(content, tmp_path / "odd.pt")
        assert_refused(capsys, words, "--from", program, "--input", tmp_path / "odd.pt", *out)

    for words, section, key, value in (
        (nonsense, "model", "encoder_attention_heads", "many"),
        (nonsense, "model", "encoder_embed_dim", 0),
        (nonsense, "optimizer", "adam_betas", "(0.9"),
        (impossible, "model", "encoder_attention_heads", 5),
        (impossible, "model", "encoder_attention_heads", 0),
        (impossible, "model", "dropout", 2),
        (impossible, "model", "ema_decay", float("nan")),
        (impossible, "model", "conv_feature_layers", "[(0, 10, 5)]"),
    ):
        spoilt("fairseq", words, lambda c, s=section, k=key, v=value: c["cfg"][s].update({k: v}))
    spoilt("fairseq", nonsense, lambda c: c.update(optimizer_history=[{"num_updates": "many"}]))
    spoilt("fairseq", nonsense, lambda c: c["cfg"].update(task=[1]))
    lost = "encoder.layers.0.fc1.weight"
    spoilt("fairseq", f"{lost} holds values that are not finite", lambda c: c["model"][lost].fill_(float("nan")))
    spoilt("beit", nonsense, lambda c: c["model"].update({"blocks.x.y": torch.ones(1)}))
    spoilt("beit", nonsense, lambda c: c["args"].update(target_layers="many"))
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    for words, changed in (
        (nonsense, {"hidden_size": "big"}),
        (nonsense, {"conv_dim": [1, 2]}),
        (impossible, {"num_attention_heads": 5}),
        ("holds a model of type ['x']", {"model_type": ["x"]}),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(settings | changed))
        assert_refused(capsys, words, "--from", "hf", "--input", tmp_path / "hf", *out)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"sampling_rate": 8000}')
    words = "preprocessor_config.json, sampling_rate: 8000; our model knows 16000 alone"
    assert_refused(capsys, words, "--from", "hf", "--input", tmp_path / "hf", *out)

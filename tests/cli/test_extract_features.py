"""Data2VecEncoder and tools/extract_features.py: features equal the probe's, and what transformers makes of exports."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor

import megad2v
from megad2v import Data2VecEncoder
from megad2v.convert.hf import export
from megad2v.convert.load import load_encoder, open_checkpoint
from megad2v.data.loader import labelled_batches
from megad2v.errors import UserError
from megad2v.metrics.probe import extract
from megad2v.modalities.text.tokenizer import Tokenizer
from tests.checkpoints import (
    small_config,
    small_speech_config,
    small_state,
    small_text_config,
    write_small_checkpoint,
)
from tests.tolerances import HUGGING_FACE
from tools import extract_features

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = {
    "vision": small_config(),
    "speech": small_speech_config(speech={"min_seconds": 0.01, "max_seconds": 0.3}),
    "text": small_text_config(text={"vocabulary": 261}),
}


@dataclass
class Place:
    """A run, and a folder of three good samples and a bad one."""

    modality: str
    run: Path
    files: Path
    raw: list[Any]
    """The good ones as a person has them in Python."""


@pytest.fixture(scope="module", params=CONFIGS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    modality, folder = request.param, tmp_path_factory.mktemp(request.param)
    config, files = CONFIGS[modality], folder / "files"
    tokenizer = Tokenizer("bytes", 261, b"", "bytes")
    extras = {f"tokenizer/{n}": data for n, data in tokenizer.core_files.items()} if modality == "text" else {}
    write_small_checkpoint(folder / "run", config, small_state(config), extras=extras)
    (files / "below").mkdir(parents=True)
    rng, raw = np.random.default_rng(0), []
    if modality == "vision":
        for number, name in enumerate(("a.png", "below/b.png", "c.png")):
            raw.append(Image.fromarray(rng.integers(0, 256, (32 + 7 * number, 32, 3), dtype=np.uint8)))
            raw[-1].save(files / name)
        (files / "bad.png").write_bytes(b"no picture")
    elif modality == "speech":
        soundfile = pytest.importorskip("soundfile")
        for number, name in enumerate(("a.wav", "below/b.wav", "c.wav")):
            wave = (0.1 * rng.standard_normal(1000 + 700 * number)).astype(np.float32)
            soundfile.write(files / name, wave, 16_000, subtype="FLOAT")
            raw.append((wave, 16_000))
        (files / "bad.wav").write_bytes(b"RIFF")
    else:
        raw = ["One sentence.", ("Two of them.", "Or so"), "three"]
        for text, name in zip(raw, ("a.txt", "below/b.txt", "c.txt"), strict=True):
            (files / name).write_text(text if isinstance(text, str) else "\n\n".join(text) + "\n")
        (files / "bad.txt").write_bytes(b"\xff\xfe")
    return Place(modality, folder / "run", files, raw)


def call(place: Place, output: Path, *more: object, source: tuple[object, ...] | None = None) -> int:
    source = source or ("--input", place.files)
    words = ["--checkpoint", place.run, *source, "--output", output, "--device", "cpu", *more]
    return extract_features.main([str(word) for word in words])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def theirs(place: Place, weights: Any, folder: Path) -> list[list[Tensor]]:
    """What transformers computes of the export: for each sample its hidden states and the output, without CLS."""
    transformers = pytest.importorskip("transformers")
    export(open_checkpoint(place.run), folder, weights=weights)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    found = []
    for sample in place.raw:
        if place.modality == "vision":
            # Theirs rounds where it cuts images that are not square: the same pixels go in.
            inputs = {"pixel_values": Data2VecEncoder.from_checkpoint(place.run).prepare(sample).inputs.float()}
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
            inputs["pixel_values"] = (inputs["pixel_values"] / 255 - mean) / std
        elif place.modality == "speech":
            wave = sample[0].astype(np.float64)
            values = ((wave - wave.mean()) / np.sqrt(wave.var() + 1e-5)).astype(np.float32)
            inputs = {"input_values": torch.from_numpy(values)[None]}
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            parts = (sample,) if isinstance(sample, str) else sample
            ids = [tokenizer.bos_token_id]
            for part in parts:
                ids += tokenizer(part)["input_ids"][1:]
            inputs = {"input_ids": torch.tensor([ids])}
        with torch.no_grad():
            result = model(**inputs, output_hidden_states=True)
        prefix = 1 if place.modality == "vision" else 0
        found.append([x[0, prefix:] for x in (*result.hidden_states, result.last_hidden_state)])
    return found


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_equal_to_hugging_face(place: Place, weights: Any, tmp_path: Path) -> None:
    """From Python and from the program, each layer of each sample, in batches with padding."""
    states = theirs(place, weights, tmp_path / "hf")
    encoder = Data2VecEncoder.from_checkpoint(place.run, weights)
    for layer, which in ((None, -1), (1, 1), (3, 3)):
        together = encoder.features(place.raw, layer)
        pooled = encoder.embed(place.raw, layer)
        for ours_td, mean_d, state in zip(together, pooled, states, strict=True):
            assert ours_td.shape == state[which].shape
            assert (ours_td - state[which]).abs().max() < HUGGING_FACE
            assert (mean_d - state[which].mean(dim=0)).abs().max() < HUGGING_FACE
    assert call(place, tmp_path / "out", "--weights", weights, "--layer", 1, "output", "--pool", "none") == 0
    index = {line["id"]: line for line in lines(tmp_path / "out" / "index.jsonl")}
    assert [name.split(".")[0] for name in index] == ["a", "below/b", "c"]
    for name, which in (("layer_01", 1), ("output", -1)):
        values = torch.from_numpy(np.load(tmp_path / "out" / f"{name}.npy"))
        assert len(values) == sum(line["length"] for line in index.values())
        for line, state in zip(index.values(), states, strict=True):
            part = values[line["start"] : line["start"] + line["length"]]
            assert (part - state[which]).abs().max() < HUGGING_FACE


def test_files_are_as_described(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Budgets change nothing but rounding; a bad sample is named; a folder appears whole, and is replaced on demand."""
    out = tmp_path / "out"
    assert call(place, out, "--layer", 2, 2) == 0
    assert "3 samples, 1 skipped (skipped.jsonl), 3 rows of 24 from layer_02" in capsys.readouterr().out
    about = json.loads((out / "features.json").read_text())
    assert (about["samples"], about["skipped"], about["step"], about["weights"]) == (3, 1, 7, "student")
    assert [line["id"].startswith("bad.") and bool(line["reason"]) for line in lines(out / "skipped.jsonl")] == [True]
    values = np.load(out / "layer_02.npy")
    assert values.shape == (3, 24) and values.dtype == np.float32
    assert call(place, out, "--layer", 2) == 2 and "--overwrite" in capsys.readouterr().err
    assert call(place, out, "--layer", 2, "--budget", 1, "--format", "safetensors", "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == {
        "features.safetensors",
        "index.jsonl",
        "skipped.jsonl",
        "features.json",
    }
    one_by_one = load_file(out / "features.safetensors")["layer_02"]
    assert np.abs(one_by_one - values).max() < HUGGING_FACE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_equal_to_the_probe_on_shards(tmp_path: Path) -> None:
    place = Place("vision", tmp_path / "run", tmp_path, [])
    write_small_checkpoint(place.run, CONFIGS["vision"], small_state(CONFIGS["vision"]))
    rng = np.random.default_rng(1)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(7):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(buffer, "PNG")
            data = b"no picture" if number == 2 else buffer.getvalue()
            for extension, content in (("png", data), ("cls", b"0")):
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    source = ("--shards", tmp_path / "a.tar")
    for weights in ("student", "teacher"):
        out = tmp_path / weights
        assert call(place, out, "--weights", weights, "--layer", 2, "output", "--budget", 33, source=source) == 0
        assert [line["id"] for line in lines(out / "index.jsonl")] == [f"a.tar/{n}" for n in (0, 1, 3, 4, 5, 6)]
        assert [line["id"] for line in lines(out / "skipped.jsonl")] == ["a.tar/2"]
        model = load_encoder(open_checkpoint(place.run), weights)
        for name, layer in (("layer_02", 2), ("output", None)):
            found = extract({"it": model}, labelled_batches(str(source[1]), CONFIGS["vision"], 3, 0), layer=layer)
            assert np.abs(np.load(out / f"{name}.npy") - found.by_model["it"]).max() < HUGGING_FACE


def test_bad_input_is_one_line_and_exit_2(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    only_bad = next(place.files.glob("bad.*"))
    for source, more, expected in (
        (("--input", tmp_path / "nowhere"), (), "no such file or folder"),
        (("--input", tmp_path / "empty"), (), "check --input"),
        (("--input", only_bad), (), "none of 1 samples could be used; the first"),
        (("--shards", tmp_path / "empty"), (), "empty"),
        (("--input", place.files, "--shards", "x"), (), "either --shards or --input"),
        (None, ("--layer", 4), "--layer 4: expected output, or a block from 1 to 3"),
        (None, ("--layer", 0), "--layer 0"),
        (None, ("--weights", "best"), "--weights best: expected student or teacher"),
        (None, ("--pool", "max"), "--pool max"),
        (None, ("--budget", 0), "--budget 0"),
        (None, ("--device", "tpu9"), "--device tpu9: not usable here"),
    ):
        assert call(place, tmp_path / "out", *more, source=source) == 2, (source, more)
        captured = capsys.readouterr()
        assert expected in captured.err and captured.err.count("\n") == 1, captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_it_is_a_module_to_fine_tune(place: Place) -> None:
    """Gradients reach front end and encoder; features do not follow the training mode, nor change it."""
    encoder = Data2VecEncoder.from_checkpoint(place.run)
    batch = encoder.prepare(place.raw)
    assert batch.padding_bt is None or batch.padding_bt.any()
    output = encoder(batch.inputs, batch.padding_bt)
    assert output.shape == (3, encoder.prefix_tokens + batch.mask_bmt.shape[2], 24)
    assert len(encoder.layers(batch.inputs, batch.padding_bt)) == 3
    output.square().sum().backward()
    lacking = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert lacking == ([] if place.modality == "text" else ["front_end.mask_token"])
    before = encoder.embed(place.raw)
    encoder.train()
    assert torch.equal(encoder.embed(place.raw), before) and encoder.training
    with pytest.raises(ValueError, match="layer 4: expected 1 to 3"):
        encoder(batch.inputs, layer=4)


def test_samples_that_are_none(place: Place) -> None:
    encoder = Data2VecEncoder.from_checkpoint(place.run)
    bad = next(place.files.glob("bad.*"))
    assert [name for name, _ in encoder.prepare([place.raw[0], bad]).dropped] == ["1"]
    with pytest.raises(UserError, match="sample 1: "):
        encoder.embed([place.raw[0], bad])
    for wrong in (3, {"a": 1}, np.zeros((2, 2))):
        with pytest.raises(UserError, match="is a"):
            encoder.embed(wrong)
    with pytest.raises(UserError, match="no sample"):
        encoder.embed([])


def test_raw_samples_of_every_kind(place: Place) -> None:
    """A path, bytes and what is in memory are the same sample."""
    encoder = Data2VecEncoder.from_checkpoint(place.run)
    expected = encoder.embed(place.raw[0])
    name = next(place.files.glob("a.*"))
    assert torch.equal(encoder.embed(name), expected)
    if place.modality == "vision":
        several = encoder.embed([str(name), name.read_bytes(), np.asarray(place.raw[0])])
        # Products of other batch sizes may round otherwise where there are several threads.
        torch.testing.assert_close(several, expected.expand(3, -1), rtol=1e-5, atol=1e-6)
    if place.modality == "speech":
        wave, rate = place.raw[0]
        assert torch.equal(encoder.embed((np.stack([wave, wave], 1), rate)), expected)
        longer = Data2VecEncoder.from_checkpoint(place.run, max_seconds=10.0)
        noise = (np.random.default_rng(0).standard_normal(16_000).astype(np.float32), 16_000)
        assert len(longer.features(noise)[0]) > len(encoder.features(noise)[0])


def test_importing_the_package_stays_light() -> None:
    """And asking for the encoder imports no DeepSpeed."""
    program = (
        "import sys, megad2v; assert 'torch' not in sys.modules; megad2v.Data2VecEncoder; "
        "assert 'torch' in sys.modules and 'deepspeed' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'Data3VecEncoder'"):
        megad2v.Data3VecEncoder  # noqa: B018


@pytest.mark.parametrize("place", ["vision"], indirect=True)
def test_the_readme_snippet(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n([^`]*Data2VecEncoder.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(place.run)
    place.raw[0].save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["vectors"].shape == (1, 24) and names["patches"].shape == (16, 24)

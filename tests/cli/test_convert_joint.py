"""A joint checkpoint, one modality of it at a time: exports, round trips, probes, features, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megad2v import Data2VecEncoder
from megad2v.checkpoint.view import View
from megad2v.config.load import load_config
from megad2v.config.parts import of_modality
from megad2v.convert.encoder import position_lengths
from megad2v.convert.load import checkpoint_config, load_encoder, load_tokenizer, open_checkpoint
from megad2v.data.format import DatasetInfo, ShardInfo, write_dataset
from megad2v.metrics.probe import layer_outputs
from megad2v.modalities.build import build_student, build_teacher, joint_name
from megad2v.modalities.text.tokenizer import Tokenizer
from megad2v.models.data2vec import Student
from tests.checkpoints import (
    small_config,
    small_joint_config,
    small_speech_config,
    small_state,
    write_small_checkpoint,
)
from tests.tolerances import HUGGING_FACE
from tools import convert_checkpoint, extract_features, inspect_checkpoint, probe

MODALITIES = ("vision", "speech", "text")
CONFIG = small_joint_config(data__shards={name: f"gone/{name}" for name in MODALITIES})
STATE = small_state(CONFIG)
TOKENIZER = Tokenizer("bytes", 261, name="bytes")
FILES = {f"tokenizer/{name}": data for name, data in TOKENIZER.files.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint run of three ranks, with metrics of two of its modalities."""
    run = tmp_path_factory.mktemp("runs") / "joint"
    write_small_checkpoint(run, CONFIG, STATE, extras=FILES)
    lines = [
        {"step": 6, "modality": "vision", "loss": 1.25, "samples": 192},
        {"step": 6, "modality": "vision", "valid_loss": 1.5, "valid_retrieval": 0.375},
        {"step": 7, "modality": "text", "loss": 55.5, "samples": 224},
        {"step": 7, "modality": "text", "valid_loss": 66.5, "valid_retrieval": 0.625},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def convert(*arguments: object) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def own_model(modality: str, weights: str, config: Any = CONFIG, state: Any = STATE) -> Student:
    """The modality's own model with the joint tensors, put together here by name and by nothing of the export's."""
    alone = of_modality(config, modality)
    student, teacher = build_student(alone).eval(), build_teacher(alone)
    averaged = {name for name, _ in teacher.named_parameters()} if weights == "teacher" else set()
    values = {}
    for name, _ in student.named_parameters():
        kind = "teacher" if name in averaged else "student"
        values[name] = state[kind][joint_name(modality, name, state["student"])]
    student.load_state_dict(values, strict=True)
    return student


def pretend_input(modality: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Ours, and transformers'."""
    generator = torch.Generator().manual_seed(0)
    if modality == "vision":
        images = torch.randn(2, 3, 32, 32, generator=generator)
        return images, {"pixel_values": images}
    if modality == "speech":
        waves = torch.randn(2, 500, generator=generator)
        return waves, {"input_values": waves}
    ids = torch.randint(4, 260, (2, 20), generator=generator)
    ids[:, 0], ids[:, -1] = 0, 2
    return ids[:, None], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


TASKS = {
    "vision": ("AutoModelForImageClassification", {"num_labels": 5}, {"classifier"}),
    "speech": ("AutoModelForCTC", {"vocab_size": 31}, {"lm_head"}),
    "text": ("AutoModelForSequenceClassification", {"num_labels": 5}, {"classifier.dense", "classifier.out_proj"}),
}
"""Class, its arguments, modules that are new in it."""


@pytest.mark.parametrize(("modality", "weights"), [("vision", "teacher"), ("speech", "student"), ("text", "teacher")])
def test_to_hugging_face(modality: str, weights: str, run: Path, tmp_path: Path) -> None:
    """What transformers loads computes what the joint model computes for that modality; only heads of tasks are new; a
    key's bias, which the joint model has not, is there as zeros; and back it is the same model to the bit."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "hf"
    arguments = ("--checkpoint", run, "--modality", modality, "--weights", weights)
    assert convert(*arguments, "--to", "hf", "--output", folder) == 0
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["max_abs"] < HUGGING_FACE and parity["relative_float64"] < 1e-12
    ours, theirs = pretend_input(modality)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    expected = own_model(modality, weights)
    with torch.no_grad():
        difference = expected.features(ours) - model(**theirs).last_hidden_state
    assert difference.abs().max() < HUGGING_FACE
    kind, how, new = TASKS[modality]
    _, info = getattr(transformers, kind).from_pretrained(
        folder, **how, local_files_only=True, output_loading_info=True
    )
    missing = {name.rpartition(".")[0] for name in info["missing_keys"]}
    assert new <= missing <= new | {"data2vec_vision.pooler.layernorm"} and not info["unexpected_keys"]
    if modality != "vision":
        biases = [p for n, p in model.named_parameters() if n.endswith((".key.bias", ".k_proj.bias"))]
        assert len(biases) == CONFIG.model.depth and not any(bias.any() for bias in biases)
    assert convert("--from", "hf", "--input", folder, "--output", tmp_path / "back") == 0
    back = open_checkpoint(tmp_path / "back")
    assert checkpoint_config(back).model.qkv_bias == "no_key"
    found = dict(back.tensors("student"))
    for name, value in expected.named_parameters():
        assert name.startswith("head.") or torch.equal(value, found[name]), name


@pytest.mark.parametrize(("modality", "program"), [("vision", "beit"), ("speech", "fairseq"), ("text", "fairseq")])
def test_there_and_back(modality: str, program: str, run: Path, tmp_path: Path) -> None:
    """Student and teacher, heads too, to the bit, in the other program's names and in ours again."""
    arguments = ("--checkpoint", run, "--modality", modality)
    assert convert(*arguments, "--to", program, "--output", tmp_path / program) == 0
    assert convert("--from", program, "--input", tmp_path / program, "--output", tmp_path / "back") == 0
    back, alone = open_checkpoint(tmp_path / "back"), of_modality(CONFIG, modality)
    for kind, build in (("student", build_student), ("teacher", build_teacher)):
        found = dict(back.tensors(kind))
        names = [name for name, _ in build(alone).named_parameters()]
        assert found.keys() == set(names)
        for name in names:
            assert torch.equal(found[name], STATE[kind][joint_name(modality, name, STATE["student"])]), (kind, name)
    theirs = checkpoint_config(back)
    for key in ("norm", "norm_eps", "relative_bias", "head_layers", "qkv_bias"):
        assert getattr(theirs.model, key) == getattr(alone.model, key), key
    assert (theirs.model.layer_scale is None) == (alone.model.layer_scale is None)
    assert theirs.targets.layers == alone.targets.layers and theirs.loss.kind == alone.loss.kind
    tokenizer = load_tokenizer(back)
    assert (tokenizer is not None) == (modality == "text")
    parity = json.loads((tmp_path / program / "parity.json").read_text())
    assert parity["passed"] and parity["teacher"]["passed"] and parity["teacher"]["relative_float64"] < 1e-12


def test_the_card_is_of_that_modality(run: Path, tmp_path: Path) -> None:
    """Its metrics, its shards, and that it was not trained alone."""
    pytest.importorskip("transformers")
    info = DatasetInfo(("vision",), 15, (ShardInfo("v-0.tar", 15, 1, ""),))
    write_dataset(tmp_path, info)
    (tmp_path / "v-0.tar").touch()
    shards = {"vision": str(tmp_path), "speech": "gone", "text": "gone"}
    config = load_config("joint_tiny", train__steps=12, text__vocabulary=261, data__shards=shards)
    write_small_checkpoint(tmp_path / "run", config, small_state(config), extras=FILES)
    (tmp_path / "run" / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    arguments = ("--checkpoint", tmp_path / "run", "--modality", "vision")
    assert convert(*arguments, "--to", "hf", "--output", tmp_path / "hf") == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    for words in (
        "trained jointly with speech and text",
        "data2vec's paper trains each modality apart",
        "| recipe | `joint_tiny` with `train.steps` 12 |",
        "| data | 15 samples, 1 shards |",
        "7 of 12, of all modalities together",
        "33.3% vision, 33.3% speech, 33.3% text",
        "1.25",
        "0.375",
    ):
        assert words in card, words
    for words in ("55.5", "66.5", "samples (training", "conv_layers", str(tmp_path)):
        assert words not in card, words


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refusal; exit code 2."""
    capsys.readouterr()
    assert convert(*arguments) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    return said.err


def test_what_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the modalities, or the key of the joint run; nothing is written."""
    to = ("--to", "hf", "--output", tmp_path / "out")
    said = refused(capsys, "--checkpoint", run, *to)
    assert "holds a joint model of vision, speech, text; choose one of them with --modality vision|speech|text" in said
    assert "--modality sound: the joint model in" in refused(capsys, "--checkpoint", run, "--modality", "sound", *to)
    write_small_checkpoint(tmp_path / "images", small_config(), small_state(small_config()))
    single = ("--checkpoint", tmp_path / "images", "--to", "fairseq", "--output", tmp_path / "single")
    assert "--modality text: " in refused(capsys, *single, "--modality", "text")
    assert "is of vision alone" in refused(capsys, *single, "--modality", "speech")
    vision = ("--checkpoint", run, "--modality", "vision", "--output", tmp_path / "out")
    assert "joint.vision.head_layers: fairseq's data2vec_vision" in refused(capsys, *vision, "--to", "fairseq")
    text = ("--checkpoint", run, "--modality", "text", "--output", tmp_path / "out")
    assert "--to beit: is of images, the checkpoint of text" in refused(capsys, *text, "--to", "beit")
    hf = ("--from", "hf", "--input", run, "--output", tmp_path / "out", "--modality", "text")
    assert "neither --checkpoint, --weights nor --modality" in refused(capsys, *hf)
    with pytest.raises(Exception, match="holds a joint model of vision, speech, text"):
        Data2VecEncoder.from_checkpoint(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_shared_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pre-norm for all: images go to Hugging Face; what is post-norm there is refused by the key that says so here."""
    pytest.importorskip("transformers")
    config = small_joint_config(joint__norms="shared", joint__text__copied=[])
    state = small_state(config)
    write_small_checkpoint(tmp_path / "run", config, state, extras=FILES)
    arguments = ("--checkpoint", tmp_path / "run", "--to", "hf", "--output")
    assert convert(*arguments, tmp_path / "vision", "--modality", "vision") == 0
    loaded = dict(load_encoder(open_checkpoint(tmp_path / "run", "vision"), "teacher").named_parameters())
    expected = own_model("vision", "teacher", config, state)
    assert all(torch.equal(value, loaded[name]) for name, value in expected.named_parameters())
    for modality, model in (("speech", "Audio"), ("text", "Text")):
        said = refused(capsys, *arguments, tmp_path / "no", "--modality", modality)
        assert f"model.norm: Hugging Face's Data2Vec{model}Model is post-norm" in said
    own = small_joint_config(joint__speech__norm="pre")
    write_small_checkpoint(tmp_path / "own", own, small_state(own), extras=FILES)
    said = refused(
        capsys, "--checkpoint", tmp_path / "own", "--modality", "speech", "--to", "hf", "--output", tmp_path / "no"
    )
    assert "joint.speech.norm: Hugging Face's Data2VecAudioModel is post-norm" in said
    assert not (tmp_path / "no").exists()


def test_modality_of_a_single_run(tmp_path: Path) -> None:
    """May be said where it is the only one."""
    config = small_speech_config()
    write_small_checkpoint(tmp_path / "run", config, small_state(config))
    checkpoint = open_checkpoint(tmp_path / "run", "speech")
    assert not isinstance(checkpoint, View) and checkpoint_config(checkpoint).modality == "speech"


def test_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(run / "checkpoints" / "step_00000007")
    assert inspect_checkpoint.main([directory, "--verify", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    sizes: dict[str, int] = {}
    for name, value in STATE["student"].items():
        owner = next((m for m in MODALITIES if f"parts.{m}." in name), "shared")
        sizes[owner] = sizes.get(owner, 0) + value.numel()
    assert facts["modality"] == "joint" and facts["modalities"] == sizes
    assert inspect_checkpoint.main([directory]) == 0
    said = capsys.readouterr().out
    assert f"model joint: shared {sizes['shared']:,}, vision {sizes['vision']:,}, speech {sizes['speech']:,}" in said


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder: Path, samples: int) -> Path:
    """Images of three colours with noise."""
    rng = np.random.default_rng(samples)
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(samples):
            pixels = np.full((40, 40, 3), 40)
            pixels[..., number % 3] += 150
            image = png(pixels + rng.integers(-30, 30, pixels.shape))
            for extension, content in (("png", image), ("cls", b"%d" % (number % 3))):
                info = tarfile.TarInfo(f"{number:03d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def test_probe(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = shards(tmp_path / "train", 30), shards(tmp_path / "test", 12)
    arguments = ["--checkpoint", str(run), "--train", str(train), "--test", str(test), "--workers", "0"]
    assert probe.main(arguments) == 2
    assert "choose one of them with --modality" in capsys.readouterr().err
    assert probe.main([*arguments, "--modality", "vision", "--output", str(tmp_path / "out.json")]) == 0
    rows = {row["weights"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert list(rows) == ["random", "student", "teacher"] and rows["student"]["knn"] == 1.0
    tuned = ["--modality", "vision", "--fine-tune", "--seeds", "1", "--epochs", "1", "--weights", "student"]
    assert probe.main([*arguments, *tuned]) == 0


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_features(weights: Any, run: Path, tmp_path: Path) -> None:
    """Of images, recordings and texts, from Python and from the program, by the model that is put together here."""
    rng = np.random.default_rng(0)
    raw: dict[str, Any] = {
        "vision": Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)),
        "speech": ((0.1 * rng.standard_normal(1000)).astype(np.float32), 16_000),
        "text": ("Two sentences.", "Or so."),
    }
    for modality, sample in raw.items():
        encoder = Data2VecEncoder.from_checkpoint(run, weights, modality=modality)
        assert encoder.modality == modality
        found, batch = encoder.features(sample, 2)[0], encoder.prepare(sample)
        with torch.no_grad():
            (expected,) = layer_outputs(own_model(modality, weights), batch.inputs, batch.padding_bt, [2])
        (length,) = position_lengths(batch)
        assert torch.equal(found, expected[0, encoder.prefix_tokens :][:length]) and length > 3
    (tmp_path / "a.txt").write_text("\n".join(raw["text"]) + "\n")
    words = ["--checkpoint", run, "--modality", "text", "--weights", weights, "--input", tmp_path / "a.txt"]
    words += ["--pool", "none", "--layer", 2, "--output", tmp_path / "out", "--device", "cpu"]
    assert extract_features.main([str(word) for word in words]) == 0
    assert np.allclose(np.load(tmp_path / "out" / "layer_02.npy"), found.numpy(), atol=1e-6)
    assert json.loads((tmp_path / "out" / "features.json").read_text())["modality"] == "text"

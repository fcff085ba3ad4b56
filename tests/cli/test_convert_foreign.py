"""tools/convert_checkpoint.py: to fairseq and the BEiT fork, and from them and Hugging Face to a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megad2v.checkpoint.reader import Checkpoint
from megad2v.config.load import load_config
from megad2v.config.schema import Config
from megad2v.convert.fairseq import BEIT_FILE, FILE
from megad2v.convert.incoming import FAIRSEQ
from megad2v.convert.load import checkpoint_config, load_encoder, load_tokenizer, open_checkpoint
from megad2v.modalities.build import build_student, build_teacher
from megad2v.modalities.keys import KeyMap
from megad2v.modalities.speech import fairseq_keys as speech_keys
from megad2v.modalities.text.tokenizer import Tokenizer
from megad2v.modalities.vision import beit_keys
from tests.checkpoints import (
    perturb_,
    small_config,
    small_speech_config,
    small_state,
    small_text_config,
    write_small_checkpoint,
)
from tests.cli.conftest import TINY
from tests.distributed.harness import REPOSITORY, run_command
from tools import convert_checkpoint

_SPEECH = small_speech_config()
_GROUP = replace(_SPEECH.speech, extractor_norm="group", conv_bias=True)
_PUBLISHED = {"scope": "model", "head_layers": 1, "norm_eps": 1e-6, "init": "beit"}
SMALL: dict[str, Config] = {
    "speech": _SPEECH,
    "speech, group norm": replace(_SPEECH, speech=_GROUP, teacher=replace(_SPEECH.teacher, copied=())),
    "speech, other objective": replace(
        _SPEECH,
        targets=replace(_SPEECH.targets, layers=3, layer_norm="layer", average_norm="instance"),
        loss=replace(_SPEECH.loss, kind="smooth_l1", beta=0.5, scale="mean"),
    ),
    "text": small_text_config(),
    "text, all averaged": replace(
        small_text_config(head_layers=1), teacher=replace(small_text_config().teacher, scope="model", copied=())
    ),
    "vision": small_config(mlp_ratio=4.0),
}
BASE = ("speech_base", "text_base_fairseq", "vision_base_d2v1", "vision_base")


def base(recipe: str) -> Config:
    """A recipe at its full size."""
    config = load_config(recipe)
    return replace(config, text=replace(config.text, vocabulary=50_265)) if config.modality == "text" else config


def convert(*arguments: object) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Student and teacher."""
    return {f"{kind} {name}": value for kind in ("student", "teacher") for name, value in checkpoint.tensors(kind)}


def there_and_back(run: Path, folder: Path, program: str, *more: object) -> Checkpoint:
    """`run` to `program` and from it."""
    assert convert("--checkpoint", run, "--to", program, "--output", folder / program, *more) == 0
    assert convert("--from", program, "--input", folder / program, "--output", folder / "back") == 0
    return open_checkpoint(folder / "back")


def assert_bit_equal(first: Checkpoint, second: Checkpoint) -> None:
    ours, back = tensors(first), tensors(second)
    assert ours.keys() == back.keys()
    for name, value in ours.items():
        assert torch.equal(value, back[name]), name


def written(folder: Path, config: Config) -> Path:
    write_small_checkpoint(folder / "run", config, small_state(config))
    return folder / "run"


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
def test_fairseq_there_and_back(config: Config, tmp_path: Path) -> None:
    """Student and teacher to the bit, and every setting that the model and its objective depend on."""
    run = written(tmp_path, config)
    back = there_and_back(run, tmp_path, "fairseq")
    assert_bit_equal(open_checkpoint(run), back)
    ours, theirs = dataclasses.asdict(config), dataclasses.asdict(checkpoint_config(back))
    theirs["teacher"]["decay_steps"] = None  # resolved: train.steps
    if config.modality == "text":
        for key in ("loss_on", "teacher_sees"):  # fairseq's program does it one way
            ours["text"][key] = theirs["text"][key]
    for section in ("modality", "model", "speech", "text", "vision", "targets", "loss", "teacher", "optimizer"):
        if section == "model":
            ours["model"]["init"] = theirs["model"]["init"]  # no file says how it began
        assert ours[section] == theirs[section], section
    assert back.index.step == 7
    for folder in ("fairseq", "back"):
        parity = json.loads((tmp_path / folder / "parity.json").read_text())
        assert parity["round_trip"]["tensors"] >= len(tensors(back)) and parity["round_trip"]["differing"] == 0
        for part in (parity, parity["teacher"]):
            assert part["passed"] and part["relative"] < 1e-5 and part["relative_float64"] < 1e-12


def test_beit_there_and_back(tmp_path: Path) -> None:
    run = written(tmp_path, small_config(**_PUBLISHED))
    back = there_and_back(run, tmp_path, "beit")
    assert_bit_equal(open_checkpoint(run), back)
    model, expected = checkpoint_config(back).model, small_config(**_PUBLISHED).model
    for key in ("width", "depth", "heads", "mlp_ratio", "norm_eps", "head_layers"):
        assert getattr(model, key) == getattr(expected, key), key
    content = torch.load(tmp_path / "beit" / BEIT_FILE, weights_only=True)  # noqa: TID251 - ours, and restricted
    assert content["model"].keys() == content["model_ema"].keys()
    assert "lm_head.weight" in content["model"] and "rel_pos_bias.relative_position_index" in content["model"]


@pytest.mark.parametrize("weights", ["student", "teacher"])
@pytest.mark.parametrize("modality", ["speech", "vision", "text"])
def test_hugging_face_there_and_back(modality: str, weights: str, tmp_path: Path) -> None:
    """What such a folder holds: the encoder of student or teacher, to the bit; the head is new, the teacher a copy."""
    pytest.importorskip("transformers")
    tokenizer = Tokenizer("bytes", 261, name="bytes")
    config = {
        "speech": _SPEECH,
        "vision": small_config(**_PUBLISHED),
        "text": small_text_config(text={"vocabulary": 261}),
    }[modality]
    files = {f"tokenizer/{name}": data for name, data in tokenizer.files.items()} if modality == "text" else None
    write_small_checkpoint(tmp_path / "run", config, small_state(config), extras=files)
    back = there_and_back(tmp_path / "run", tmp_path, "hf", "--weights", weights)
    expected = dict(load_encoder(open_checkpoint(tmp_path / "run"), weights).named_parameters())
    found, teacher = dict(back.tensors("student")), dict(back.tensors("teacher"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]) != name.startswith("head."), name
    assert all(torch.equal(value, found[name]) for name, value in teacher.items())
    report = json.loads((tmp_path / "back" / "import.json").read_text())["report"]
    assert sum(line.startswith("head.") for line in report) == len([n for n in expected if n.startswith("head.")])
    assert any(line.startswith("teacher: not in the file") for line in report)
    if modality == "text":
        theirs = load_tokenizer(back)
        assert theirs is not None and theirs.vocabulary == 261
        assert theirs.encode("a b<s>\u00e9").tolist() == tokenizer.encode("a b<s>\u00e9").tolist()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", BASE)
def test_base_there_and_back(recipe: str, tmp_path: Path) -> None:
    """The same at the released size, through fairseq or the BEiT fork, and through Hugging Face."""
    config = base(recipe)
    models = {"student": perturb_(build_student(config), 1, 0.01), "teacher": perturb_(build_teacher(config), 2, 0.01)}
    state = {kind: dict(model.named_parameters()) for kind, model in models.items()}
    write_small_checkpoint(tmp_path / "run", config, state)
    del state, models
    back = there_and_back(tmp_path / "run", tmp_path, "beit" if recipe == "vision_base" else "fairseq")
    assert_bit_equal(open_checkpoint(tmp_path / "run"), back)
    if recipe != "text_base_fairseq":  # the export wants a tokenizer, of which this one has none
        folder = tmp_path / "second"
        found = dict(there_and_back(tmp_path / "run", folder, "hf", "--weights", "teacher").tensors("student"))
        expected = load_encoder(open_checkpoint(tmp_path / "run"), "teacher")
        for name, value in expected.named_parameters():
            assert name.startswith("head.") or torch.equal(value, found[name]), name


@pytest.mark.parametrize("modality", ["speech", "text", "vision"])
def test_names_and_values_are_fairseqs_own(modality: str, reference: Path, tmp_path: Path) -> None:
    """The state dicts that fairseq itself left, through our checkpoint and out again: every tensor to the bit."""
    from tests.parity.programs import PROGRAMS
    from tests.parity.test_reference import BUFFERS, _section, vectors

    description, numbers = vectors(reference, modality)
    program, (case, *_) = PROGRAMS[modality], description["cases"]
    config = program.config(description, _section(numbers, f"cases.{case}.inputs."))
    config = replace(config, teacher=replace(config.teacher, scope="encoder"))
    unused = set(description["cases"][case]["no_grad_params"])
    theirs = {name: value for name, value in _section(numbers, "student.").items() if name not in unused}
    prefix = f"{description['teacher_of']}."
    average = {prefix + name: value for name, value in _section(numbers, "teacher.").items()}
    names = {name for name, _ in build_teacher(config).named_parameters()}
    state = {
        "student": program.keys.from_fairseq(theirs, config),
        "teacher": {n: v for n, v in program.keys.from_fairseq(average, config).items() if n in names},
    }
    write_small_checkpoint(tmp_path / "run", config, state)
    assert convert("--checkpoint", tmp_path / "run", "--to", "fairseq", "--output", tmp_path / "out") == 0
    content = torch.load(tmp_path / "out" / FILE, weights_only=True)  # noqa: TID251 - ours: no class in it
    model, ema = content["model"], content["model"].pop(FAIRSEQ[modality].EMA)
    assert model.keys() == set(_section(numbers, "student."))
    for name, value in theirs.items():
        assert torch.equal(model[name], value) or name.endswith(BUFFERS), name
    assert ema.keys() == set(_section(numbers, "teacher."))
    assert all(value.dtype in (torch.float32, torch.int64) for value in ema.values())
    encoder = {name: value for name, value in _section(numbers, "teacher.").items() if not name.startswith("embed_")}
    for name, value in encoder.items():
        assert torch.equal(ema[name], value) or name.endswith(BUFFERS), name
    told, described = content["cfg"]["model"], description["config"]
    for key in ("average_top_k_layers", "loss_beta", "loss_scale", "layer_norm_targets", "layer_norm_target_layer"):
        assert told[key] == described[key], key


def plain(value: Any) -> bool:
    """Whether it is made of what every unpickler knows."""
    if isinstance(value, dict):
        return type(value) is dict and all(isinstance(key, str) and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or isinstance(value, Tensor) or type(value) in (str, int, float, bool)


@pytest.mark.parametrize("modality", ["speech", "text", "vision"])
def test_the_file_is_plain(modality: str, tmp_path: Path) -> None:
    run = written(tmp_path, SMALL[modality])
    assert convert("--checkpoint", run, "--to", "fairseq", "--output", tmp_path / "out", "--weights", "teacher") == 0
    content = torch.load(tmp_path / "out" / FILE, weights_only=True)  # noqa: TID251 - ours
    assert plain(content)
    assert content["optimizer_history"][-1]["num_updates"] == 7
    sections = {"common", "task", "model", "criterion", "optimization", "optimizer", "lr_scheduler", "dataset"}
    assert sections <= content["cfg"].keys()
    for ours, theirs in (
        FAIRSEQ[modality]
        .from_fairseq(
            {
                n: v
                for n, v in content["model"].items()
                if isinstance(v, Tensor) and not n.startswith("final_proj.unused")
            },
            SMALL[modality],
        )
        .items()
    ):
        if ours.startswith("encoder."):
            assert torch.equal(theirs, small_state(SMALL[modality])["teacher"][ours]), ours
    if modality == "text":
        lines = (tmp_path / "out" / "dict.txt").read_text().splitlines()
        assert lines == [f"{number} 1" for number in range(4, 100)]


def test_text_keeps_its_tokenizer(tmp_path: Path) -> None:
    config, tokenizer = small_text_config(text={"vocabulary": 261}), Tokenizer("bytes", 261, name="bytes")
    files = {f"tokenizer/{name}": data for name, data in tokenizer.files.items()}
    write_small_checkpoint(tmp_path / "run", config, small_state(config), extras=files)
    back = load_tokenizer(there_and_back(tmp_path / "run", tmp_path, "fairseq"))
    assert back is not None and back.fingerprint == tokenizer.fingerprint


# --- what is refused


def assert_refused(capsys: pytest.CaptureFixture[str], words: str, *arguments: object, code: int = 2) -> None:
    """One line with `words`, and nothing written."""
    output = next(Path(str(b)) for a, b in pairwise(arguments) if a == "--output")
    before = sorted(output.parent.iterdir())
    assert convert(*arguments) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(output.parent.iterdir()) == before and not output.exists()


@pytest.mark.parametrize(
    ("config", "target", "words"),
    [
        (small_config(**_PUBLISHED), "fairseq", "model.head_layers: fairseq's data2vec_vision compares"),
        (small_config(scope="model", mlp_ratio=4.0), "fairseq", "teacher.scope: fairseq's data2vec_vision shares"),
        (small_config(mlp_ratio=4.0, norm_eps=1e-6), "fairseq", "model.norm_eps"),
        (small_config(), "fairseq", "model.mlp_ratio"),
        (small_config(mlp_ratio=4.0), "beit", "model.norm_eps: the BEiT fork norms with 1e-06"),
        (_SPEECH, "beit", "--to beit: is of images, the checkpoint of speech"),
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
    run = written(tmp_path, _SPEECH)
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
    refused("could run code from the file", lambda c: c.update(extra=Malicious(f"touch {marker}")))
    assert not marker.exists()
    whole = (tmp_path / "good" / FILE).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    cut = ("--from", "fairseq", "--input", tmp_path / "cut.pt", "--output", tmp_path / "out")
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


# --- files as older programs left them


def test_half_precision_flat_arguments_and_numpy(tmp_path: Path) -> None:
    """What a run of fairseq's in fp16 leaves, with arguments as before hydra, and a NumPy number among its meters."""
    run = written(tmp_path, _SPEECH)
    assert convert("--checkpoint", run, "--to", "fairseq", "--output", tmp_path / "out") == 0
    content = torch.load(tmp_path / "out" / FILE, weights_only=True)  # noqa: TID251 - ours
    model, task = (dict(content["cfg"][section]) for section in ("model", "task"))
    content["args"] = argparse.Namespace(**{**task, **model, "arch": model.pop("_name")})
    content["cfg"] = None
    content["extra_state"]["best"] = np.float64(1.5)
    halves = {n: v.half() for n, v in content["model"].items() if isinstance(v, Tensor)}
    content["model"] |= halves
    torch.save(content, tmp_path / "old.pt")
    assert convert("--from", "fairseq", "--input", tmp_path / "old.pt", "--output", tmp_path / "back") == 0
    back, state = open_checkpoint(tmp_path / "back"), small_state(_SPEECH)
    for name, value in back.tensors("student"):
        assert torch.equal(value, state["student"][name].half().float()), name
    for name, value in back.tensors("teacher"):
        assert torch.equal(value, state["teacher"][name]), name  # in float32 all along


def test_released_text_has_another_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RoBERTa's head in place of the regression head (fairseq issue 4535), old names, and no teacher."""
    run = written(tmp_path, small_text_config())
    assert convert("--checkpoint", run, "--to", "fairseq", "--output", tmp_path / "out") == 0
    content = torch.load(tmp_path / "out" / FILE, weights_only=True)  # noqa: TID251 - ours
    model = {n: v for n, v in content["model"].items() if "regression_head" not in n and not n.endswith("_ema")}
    model |= {"encoder.lm_head.dense.weight": torch.ones(24, 24), "encoder.lm_head.bias": torch.ones(101)}
    old = {name.replace(".layernorm_embedding.", ".emb_layer_norm."): value for name, value in model.items()}
    content["model"] = {"decoder." + name.removeprefix("encoder."): value for name, value in old.items()}
    torch.save(content, tmp_path / "old.pt")
    capsys.readouterr()
    assert convert("--from", "fairseq", "--input", tmp_path / "old.pt", "--output", tmp_path / "back") == 0
    said = capsys.readouterr().out
    for words in (
        "left out, since data2vec does not use them: encoder.lm_head.dense.weight, encoder.lm_head.bias",
        "head.0.weight: not in the file; starts new (model.init bert",
        "teacher: not in the file; all 38 parameters start as the student's",
    ):
        assert words in said, said
    back, state = open_checkpoint(tmp_path / "back"), small_state(small_text_config())
    for name, value in back.tensors("student"):
        assert name.startswith("head.") or torch.equal(value, state["student"][name]), name


# --- the certificate


def test_a_wrong_map_that_undoes_itself_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Query and key exchanged, both ways: the round trip is exact, and the second program computes something else."""
    run = written(tmp_path, _SPEECH)
    right = speech_keys._MAPS["layer"]
    places = ("k", "q", "v")
    wrong = KeyMap(
        "fairseq",
        plain={ours: theirs for ours, (theirs, turn) in right._ours.items() if not turn},
        transposed={ours: theirs for ours, (theirs, turn) in right._ours.items() if turn},
        projections=tuple(f"encoder.layers.*.self_attn.{part}_proj" for part in places),
    )
    monkeypatch.setitem(speech_keys._MAPS, "layer", wrong)
    words = "the exported model differs from ours from block 1 on"
    assert_refused(capsys, words, "--checkpoint", run, "--to", "fairseq", "--output", tmp_path / "out", code=1)


_INNER = "encoder.blocks.1.mlp.output.weight"


@pytest.mark.parametrize(
    ("name", "spoilt", "words"),
    [
        (_INNER, 1, "the BEiT fork's model differs from ours from block 2 on"),
        (_INNER, 2, "the teacher in the BEiT fork's model differs from ours"),
        ("head.weight", 1, "lm_head.weight of the student does not come back as it was"),
    ],
)
def test_any_wrong_tensor_in_an_import_fails(
    name: str,
    spoilt: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One element of the student's (the first that is mapped), then of the teacher's; and of the head, which no hidden
    state depends on."""
    run = written(tmp_path, small_config(**_PUBLISHED))
    assert convert("--checkpoint", run, "--to", "beit", "--output", tmp_path / "beit") == 0
    capsys.readouterr()
    right, calls = beit_keys.from_beit, 0

    def wrong(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        ours = {name: value.clone() for name, value in right(state, config).items()}
        if calls == spoilt:
            ours[name][3, 5] += 1e-3
        return ours

    monkeypatch.setattr("megad2v.convert.incoming.from_beit", wrong)
    arguments = ("--from", "beit", "--input", tmp_path / "beit", "--output", tmp_path / "out")
    assert_refused(capsys, words, *arguments, code=1)


# --- training from an import


@pytest.mark.timeout(200)
def test_training_starts_from_an_import(demo_shards: Path, tmp_path: Path) -> None:
    """train.init takes student and teacher as they were in the other program's file; a resume is refused."""
    shape = {"model__width": 32, "model__depth": 2, "model__heads": 2, "targets__layers": 2, "vision__image_size": 32}
    run = written(tmp_path, load_config("vision_tiny", **shape))
    back = there_and_back(run, tmp_path, "beit")
    command = [sys.executable, "launch/pretrain.py", "--deepspeed", "ds_configs/zero2.json", *TINY]
    command += ["--data.shards", str(demo_shards / "train"), "--train.steps", "1", "--train.log_every", "1"]
    frozen = [
        "--teacher.decay_start",
        "1",
        "--teacher.decay_end",
        "1",
        "--optimizer.lr",
        "1e-30",
        "--schedule.min_lr",
        "0",
    ]
    first = [*command, *frozen, "--train.init", str(tmp_path / "back"), "--train.output_dir", str(tmp_path / "first")]
    done = run_command(first, timeout=90, cwd=REPOSITORY, ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(back.names('student'))} parameters matched" in done.stdout
    for word in ("missing:", "unused:", "has not ended"):
        assert word not in done.stdout
    assert_bit_equal(back, open_checkpoint(tmp_path / "first"))
    resumed = [*command, "--train.output_dir", str(tmp_path / "back")]
    done = run_command(resumed, timeout=90, cwd=REPOSITORY, ranks=1)
    assert done.returncode == 2 and "imported weights and no run to resume; name it with train.init" in done.stderr

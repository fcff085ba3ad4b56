"""tools/convert_checkpoint.py: to fairseq and the BEiT fork, and from them and Hugging Face to a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megad2v.config.load import load_config
from megad2v.config.schema import Config
from megad2v.convert.fairseq import BEIT_FILE, FILE
from megad2v.convert.incoming import FAIRSEQ
from megad2v.convert.load import checkpoint_config, load_encoder, load_tokenizer, open_checkpoint
from megad2v.modalities.build import build_teacher
from megad2v.modalities.text.tokenizer import Tokenizer
from tests.checkpoints import (
    small_config,
    small_state,
    small_text_config,
    write_small_checkpoint,
)
from tests.cli.conftest import TINY
from tests.cli.conversions import PUBLISHED, SMALL, SPEECH, assert_bit_equal, convert, tensors, there_and_back, written
from tests.distributed.harness import REPOSITORY, run_command


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
    run = written(tmp_path, small_config(**PUBLISHED))
    back = there_and_back(run, tmp_path, "beit")
    assert_bit_equal(open_checkpoint(run), back)
    assert checkpoint_config(back).vision == small_config(**PUBLISHED).vision
    model, expected = checkpoint_config(back).model, small_config(**PUBLISHED).model
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
        "speech": replace(SPEECH, speech=replace(SPEECH.speech, normalise=False)),
        "vision": small_config(**PUBLISHED),
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
    raw = checkpoint_config(back)
    assert (raw.vision.mean, raw.vision.std) == (config.vision.mean, config.vision.std) or modality != "vision"
    assert raw.speech.normalise == config.speech.normalise
    report = json.loads((tmp_path / "back" / "import.json").read_text())["report"]
    assert sum(line.startswith("head.") for line in report) == len([n for n in expected if n.startswith("head.")])
    assert any(line.startswith("teacher: not in the file") for line in report)
    if modality == "text":
        theirs = load_tokenizer(back)
        assert theirs is not None and theirs.vocabulary == 261
        assert theirs.encode("a b<s>\u00e9").tolist() == tokenizer.encode("a b<s>\u00e9").tolist()


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


def test_half_precision_flat_arguments_and_numpy(tmp_path: Path) -> None:
    """What a run of fairseq's in fp16 leaves, with arguments as before hydra, and a NumPy number among its meters."""
    run = written(tmp_path, SPEECH)
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
    back, state = open_checkpoint(tmp_path / "back"), small_state(SPEECH)
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

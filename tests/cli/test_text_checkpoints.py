"""A text run from shards to an export: its checkpoints carry the tokenizer, and it does not go on with another one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megad2v.checkpoint.reader import Checkpoint
from megad2v.config.load import to_yaml
from megad2v.convert.load import load_tokenizer
from megad2v.errors import UserError
from megad2v.modalities.text.synthetic import demo_story
from megad2v.modalities.text.tokenizer import Tokenizer
from megad2v.training.setup import _export_remarks
from megad2v.training.state import check_resumable, objective_changes, other_tokenizer
from tests.checkpoints import small_config, small_state, small_text_config, write_small_checkpoint
from tests.distributed.harness import REPOSITORY, run_command

BYTES = Tokenizer("bytes", 261, name="bytes")


def _extras(tokenizer: Tokenizer) -> dict[str, bytes]:
    return {f"tokenizer/{name}": content for name, content in tokenizer.core_files.items()}


def _done(*words: object) -> str:
    done = run_command([sys.executable, *map(str, words)], timeout=110, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_from_text_to_an_export(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "stories.txt").write_text("\n\n".join("\n".join(demo_story(number, 1)) for number in range(40)))
    _done("tools/train_tokenizer.py", "--model", "byte", "--output", tmp_path / "tokenizer")
    corpus = ["--input", tmp_path / "stories.txt", "--document", "blank-lines", "--tokenizer", tmp_path / "tokenizer"]
    _done("tools/make_shards.py", "text", *corpus, "--output", tmp_path / "shards")
    (tmp_path / "tiny.yaml").write_text(to_yaml(small_text_config(text={"vocabulary": None, "max_tokens": 64})))
    run = ["--config", tmp_path / "tiny.yaml", "--data.shards", tmp_path / "shards", "--train.steps", 2]
    run += ["--data.micro_batch.samples", "null", "--data.micro_batch.tokens", 256, "--mask.span", 4]
    run += ["--text.teacher_sees", "masked_only", "--train.output_dir", tmp_path / "run"]
    _done("launch/pretrain.py", "--deepspeed", "ds_configs/zero3.json", *run)
    checkpoint = Checkpoint(tmp_path / "run" / "checkpoints" / "step_00000002")
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None and tokenizer.fingerprint == BYTES.fingerprint
    assert checkpoint.index.config["text"]["vocabulary"] == 261
    convert = ["--checkpoint", tmp_path / "run", "--to", "hf", "--output", tmp_path / "hf"]
    _done("tools/convert_checkpoint.py", *convert)
    parity = json.loads((tmp_path / "hf" / "parity.json").read_text())
    assert parity["passed"] and parity["tokenizer"]["fingerprint"] == BYTES.fingerprint


def test_another_tokenizer(tmp_path: Path) -> None:
    config = small_text_config(text={"vocabulary": 261})
    state = small_state(config)
    checkpoint = Checkpoint(write_small_checkpoint(tmp_path / "with", config, state, extras=_extras(BYTES)))
    before = Checkpoint(write_small_checkpoint(tmp_path / "before", config, state))
    vision = small_config()
    images = Checkpoint(write_small_checkpoint(tmp_path / "images", vision, small_state(vision)))
    for one in (checkpoint, before, images):
        one.index.state["progress"] = {}  # of a run, and not imported
    other = _extras(Tokenizer("sentencepiece", 261, b"other pieces", "bpe"))
    check_resumable(checkpoint, config, _extras(BYTES))
    check_resumable(before, config, other)  # written before checkpoints carried one
    with pytest.raises(UserError, match=r"text\.tokenizer: the run in .* has another one"):
        check_resumable(checkpoint, config, other)
    assert other_tokenizer(checkpoint, other) and not other_tokenizer(checkpoint, {})
    assert load_tokenizer(before) is None
    check_resumable(images, vision, {})


def test_another_objective_is_said(tmp_path: Path) -> None:
    """One line a key, whatever the modality; what is written as JSON is no other value for that."""
    config = small_text_config(text={"vocabulary": 261})
    checkpoint = Checkpoint(write_small_checkpoint(tmp_path / "text", config, small_state(config)))
    assert objective_changes(checkpoint, config) == []
    other = replace(
        config,
        text=replace(config.text, teacher_sees="masked_only", max_tokens=9),
        mask=replace(config.mask, ratio=0.2),
        teacher=replace(config.teacher, decay_end=0.5, resident=not config.teacher.resident),
        optimizer=replace(config.optimizer, lr=1.0),
    )
    lines = objective_changes(checkpoint, other)
    assert [line.split(":")[0] for line in lines] == ["mask.ratio", "teacher.decay_end", "text.teacher_sees"]
    assert lines[0] == f"mask.ratio: 0.2, and {config.mask.ratio} before: the objective changes here"
    vision = small_config()
    images = Checkpoint(write_small_checkpoint(tmp_path / "images", vision, small_state(vision)))
    changed = replace(vision, loss=replace(vision.loss, beta=7.0), text=replace(vision.text, loss_on="mask"))
    assert objective_changes(images, vision) == []
    assert [line.split(":")[0] for line in objective_changes(images, changed)] == ["loss.beta"]
    for section in ("mask", "loss"):
        images.index.config[section].pop("ratio" if section == "mask" else "kind")  # a checkpoint older than the key
    assert len(objective_changes(images, changed)) == 1


def test_a_vocabulary_that_cannot_be_exported_is_said_at_the_start() -> None:
    config = small_text_config(text={"vocabulary": 261})
    assert _export_remarks(config, _extras(BYTES)) == _export_remarks(config, {}) == []
    (line,) = _export_remarks(config, _extras(Tokenizer("sentencepiece", 261, b"pieces", "unigram")))
    assert "--to hf will refuse this run: a unigram vocabulary cannot be exported" in line


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    config = small_text_config(text={"vocabulary": 261})
    extras = _extras(BYTES)
    about = json.loads(extras["tokenizer/megad2v.json"])
    for spoilt, expected in (
        (
            {**about, "vocabulary": 262},
            r"megad2v\.json is not the file that was written with it",
        ),
        ({**about, "format": 99}, "format 99, newer than 1; update megad2v"),
        ({}, r"tokenizer/megad2v\.json: not a tokenizer of megad2v"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        files = {"tokenizer/megad2v.json": json.dumps(spoilt).encode()}
        checkpoint = Checkpoint(write_small_checkpoint(folder, config, small_state(config), extras=files))
        with pytest.raises(UserError, match=expected):
            load_tokenizer(checkpoint)

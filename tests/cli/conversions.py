"""What the tests of conversions share: small models of every kind, and the command line."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megad2v.checkpoint.reader import Checkpoint
from megad2v.config.load import load_config
from megad2v.config.schema import Config
from megad2v.convert.load import open_checkpoint
from megad2v.modalities.text.tokenizer import Tokenizer
from tests.checkpoints import (
    small_config,
    small_speech_config,
    small_state,
    small_text_config,
    write_small_checkpoint,
)
from tools import convert_checkpoint

SPEECH = small_speech_config()
GROUP = replace(SPEECH.speech, extractor_norm="group", conv_bias=True)
PUBLISHED = {"scope": "model", "head_layers": 1, "norm_eps": 1e-6, "init": "beit"}
SMALL: dict[str, Config] = {
    "speech": SPEECH,
    "speech, group norm": replace(SPEECH, speech=GROUP, teacher=replace(SPEECH.teacher, copied=())),
    "speech, other objective": replace(
        SPEECH,
        targets=replace(SPEECH.targets, layers=3, layer_norm="layer", average_norm="instance"),
        loss=replace(SPEECH.loss, kind="smooth_l1", beta=0.5, scale="mean"),
    ),
    "text": small_text_config(),
    "text, all averaged": replace(
        small_text_config(head_layers=1), teacher=replace(small_text_config().teacher, scope="model", copied=())
    ),
    "vision": small_config(mlp_ratio=4.0),
}


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


def assert_refused(capsys: pytest.CaptureFixture[str], words: str, *arguments: object, code: int = 2) -> None:
    """One line with `words`, and nothing written."""
    output = next(Path(str(b)) for a, b in pairwise(arguments) if a == "--output")
    before = sorted(output.parent.iterdir())
    assert convert(*arguments) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(output.parent.iterdir()) == before and not output.exists()


def text_checkpoint(run: Path, tokenizer: Tokenizer | None, **text: object) -> dict[str, dict[str, torch.Tensor]]:
    """A text run with one checkpoint that carries `tokenizer`; returns its tensors."""
    vocabulary = 261 if tokenizer is None else tokenizer.vocabulary
    config = small_text_config(text={"vocabulary": vocabulary, "tokenizer": str(run / "elsewhere"), **text})
    files = tokenizer.core_files if tokenizer is not None else {}
    state = small_state(config)
    write_small_checkpoint(run, config, state, extras={f"tokenizer/{name}": files[name] for name in files})
    return state

"""Text from the tools to a run: the vocabulary is looked up, rows are traced, the wrong vocabulary is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.harness import REPOSITORY, run_command

SETTINGS = {
    "modality": "text",
    "model": {"width": 32, "depth": 2, "heads": 2, "norm": "post", "layer_scale": None, "qkv_bias": "full"}
    | {"relative_bias": False, "head_layers": 2, "init": "bert"},
    "targets": {"layers": 2, "tensor": "ffn", "layer_norm": "layer", "average_norm": "none"},
    "loss": {"beta": 4.0, "scale": "sum"},
    "teacher": {"copied": ["norm"]},
    "text": {"max_tokens": 64},
    "mask": {"ratio": 0.35, "span": 4},
    "data": {"micro_batch": {"samples": None, "tokens": 256}, "workers": 1, "trace": True},
    "train": {"steps": 2, "micro_batches_per_step": 2, "log_every": 1, "eval_every": 2, "tensorboard": False},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and valid/ of plain bytes, other/ an unlike vocabulary, and the settings, by the tools."""
    root = tmp_path_factory.mktemp("text")
    tool = [sys.executable, "tools/make_demo_data.py", root / "data", "--only", "text", "--stories", "40"]
    run_command(tool, timeout=150, cwd=REPOSITORY).check_returncode()
    tool = [sys.executable, "tools/train_tokenizer.py", "--model", "byte", "--output", root / "tokenizer"]
    run_command(tool, timeout=150, cwd=REPOSITORY).check_returncode()
    for part in ("train", "valid"):
        tool = [sys.executable, "tools/make_shards.py", "text", "--input", root / "data/text", "--output", root / part]
        tool += ["--tokenizer", root / "tokenizer", "--document", "blank-lines"]
        run_command(tool, timeout=150, cwd=REPOSITORY).check_returncode()
    (root / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    return root


def pretrain(corpus: Path, output: Path, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/pretrain.py", "--deepspeed", "ds_configs/zero1.json"]
    command += ["--config", corpus / "settings.yaml", "--train.output_dir", output]
    command += ["--data.shards", corpus / "train", "--data.valid", corpus / "valid", *flags]
    return run_command(command, timeout=180, cwd=REPOSITORY, ranks=1)


def test_run(corpus: Path, tmp_path: Path) -> None:
    done = pretrain(corpus, tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rows of text" in done.stdout and "micro-batches an epoch" in done.stdout
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["text"]["vocabulary"] == 261
    lines = [json.loads(line) for line in (tmp_path / "run/trace/rank0.jsonl").read_text().splitlines()]
    assert [(line["step"], line["micro_batch"]) for line in lines] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for line in lines:
        names = [name.rpartition(":") for name in line["samples"]]
        assert names and all(key.startswith("text-000000.tar/") and start.isdecimal() for key, _, start in names)
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any(line.get("valid_loss", 0) > 0 for line in metrics)
    assert (corpus / "train/index/text-000000.text.blocks64.npy").exists()


def test_wrong_vocabulary_is_one_line(corpus: Path, tmp_path: Path) -> None:
    done = pretrain(corpus, tmp_path / "run", "--text.vocabulary", "300")
    assert done.returncode == 2
    assert (
        f"pretrain: error: text.vocabulary: 300, but the tokenizer in {corpus}/train/tokenizer has 261" in done.stderr
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()

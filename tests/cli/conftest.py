"""Small shards, and a small run, that the command-line tests share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.checkpoints import small_config, small_state, write_small_checkpoint
from tests.distributed.harness import REPOSITORY, run_command


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (96 images, several shards) and valid/ (40 images), made by the tools themselves."""
    root = tmp_path_factory.mktemp("demo")
    for part, per_class, seed in (("train", 12, 1), ("valid", 5, 2)):
        data = [sys.executable, "tools/make_demo_data.py", str(root / f"data-{part}")]
        run_command(
            [*data, "--only", "image", "--images-per-class", str(per_class), "--seed", str(seed)],
            timeout=150,
            cwd=REPOSITORY,
        ).check_returncode()
        shards = [sys.executable, "tools/make_shards.py", "image", "--input", str(root / f"data-{part}" / "image")]
        run_command(
            [*shards, "--output", str(root / part), "--max-shard-size", "100KB"], timeout=150, cwd=REPOSITORY
        ).check_returncode()
    return root


@pytest.fixture(scope="session")
def vision_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint, as three ranks left it, and metrics beside it. Nobody changes it."""
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


TINY = [
    *("--model.width", "32", "--model.depth", "2", "--model.heads", "2", "--targets.layers", "2"),
    *("--vision.image_size", "32", "--data.micro_batch.samples", "4", "--data.workers", "1"),
]
"""Flags that make vision_tiny run in a blink."""

"""Small shards that the command-line tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.distributed.harness import REPOSITORY, run_command


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (96 images, several shards) and valid/ (40 images), made by the tools themselves."""
    root = tmp_path_factory.mktemp("demo")
    for part, per_class, seed in (("train", 12, 1), ("valid", 5, 2)):
        data = [sys.executable, "tools/make_demo_data.py", str(root / f"data-{part}")]
        run_command(
            [*data, "--only", "image", "--images-per-class", str(per_class), "--seed", str(seed)],
            timeout=60,
            cwd=REPOSITORY,
        ).check_returncode()
        shards = [sys.executable, "tools/make_shards.py", "image", "--input", str(root / f"data-{part}" / "image")]
        run_command(
            [*shards, "--output", str(root / part), "--max-shard-size", "100KB"], timeout=60, cwd=REPOSITORY
        ).check_returncode()
    return root


TINY = [
    *("--model.width", "32", "--model.depth", "2", "--model.heads", "2", "--targets.layers", "2"),
    *("--vision.image_size", "32", "--data.micro_batch.samples", "4", "--data.workers", "1"),
]
"""Flags that make vision_tiny run in a blink."""

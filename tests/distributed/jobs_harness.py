"""Jobs for test_harness.py. No DeepSpeed here: they test the harness, in as little time as importing torch takes."""

from __future__ import annotations

import os
import subprocess
import time
from datetime import timedelta
from pathlib import Path


def environment(arguments: dict, output: Path) -> dict:
    """What a rank sees, without importing torch."""
    return {name: os.environ.get(name) for name in arguments["names"]}


def all_reduce(arguments: dict, output: Path) -> dict:
    """All ranks sum one float64 over gloo: 8 bytes each."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    value = torch.tensor([arguments["base"] + dist.get_rank()], dtype=torch.float64)
    dist.all_reduce(value)
    return {"rank": dist.get_rank(), "sum": value.item()}


def one_hangs(arguments: dict, output: Path) -> None:
    """Rank 1 goes to sleep with a child of its own, and its parent has to find both."""
    if os.environ["RANK"] == "1":
        child = subprocess.Popen(["sleep", "600"])
        (output / "pids").write_text(f"{os.getpid()} {child.pid}")
        print("rank 1 is going to sleep")
        a_deep_sleep()


def a_deep_sleep() -> None:
    time.sleep(600)


def one_fails(arguments: dict, output: Path) -> None:
    """Rank 0 waits for what will never come; rank 1 fails."""
    if os.environ["RANK"] == "1":
        raise ValueError("the shoe does not fit")
    (output / "pids").write_text(str(os.getpid()))
    print("rank 0 waits")
    time.sleep(600)


def no_json(arguments: dict, output: Path) -> object:
    return object()


def leaves_early(arguments: dict, output: Path) -> None:
    os._exit(0)

"""What the benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from megad2v.engine import distributed


def timed(action: Callable[[], Any]) -> float:
    """Seconds of `action` on this rank, from when all ranks are there, until the device is done. Collective."""
    distributed.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start

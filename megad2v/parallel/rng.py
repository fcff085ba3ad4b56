"""Random numbers under tensor parallelism.

All ranks of a group are seeded alike, so what is drawn from torch's default generator (drop path, dropout on
replicated activations, shuffling) is the same on all of them. What is drawn for tensors of which each rank holds
another slice must differ, or heads and positions of different ranks would be dropped together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megad2v.parallel.topology import Axis


@contextmanager
def split_draws(axis: Axis) -> Iterator[None]:
    """Inside, the default generators draw numbers of this rank's own; afterwards they go on as if nothing had been.

    The seed comes from the CPU's default generator, which advances by one draw on every rank: a function of the state
    alone, so that runs and micro-batches repeat, and no wait for the device.
    """
    seed = int(torch.randint(2**62, ()))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed + axis.rank)
        yield

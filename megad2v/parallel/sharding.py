"""What a tensor-parallel rank's parameter is a slice of.

Layers are laid out with the split dimension first, so a slice is one contiguous range of the flattened full tensor, and
the rest of the house needs two facts of it: the full shape, and where the range starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Shard:
    """A parameter holds elements [start, start + numel) of a flattened tensor of `full_shape`, and perhaps zeros behind
    them that nothing uses."""

    full_shape: torch.Size
    start: int
    numel: int
    split: bool
    """False: every tensor-parallel rank holds all of it, and keeps it bit-identical."""


def mark_split(parameter: nn.Parameter, full_rows: int, first_row: int) -> None:
    """Say that `parameter` (rows, ...) is rows [first_row, ...) of `full_rows`; what goes beyond them is padding."""
    rest = parameter.shape[1:]
    rows = min(parameter.shape[0], full_rows - first_row)
    parameter.shard = Shard(torch.Size((full_rows, *rest)), first_row * rest.numel(), rows * rest.numel(), split=True)
    # DeepSpeed's name for it: without, the gradient norm counts such parameters on one rank only.
    parameter.tensor_model_parallel = True


def shard_of(parameter: nn.Parameter) -> Shard:
    """The shard that `parameter` was marked with; all of itself where it was not."""
    if found := getattr(parameter, "shard", None):
        return found
    whole = torch.Size(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 parameters are empty between uses
    return Shard(whole, 0, whole.numel(), split=False)

"""What every modality's worker side gives to the loader: one prepared sample, or the reason why there is none."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from megad2v.modalities.batch import Batch


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason. It is dropped and recorded, and training goes on."""


class Sample(NamedTuple):
    """One sample, ready to be stacked into a Batch."""

    inputs: torch.Tensor
    """vision: uint8 (C, H, W)."""
    mask_mt: torch.Tensor
    """bool (M, T): True where hidden."""
    fingerprint: str
    """Hex hash of inputs and mask."""


class Transform(Protocol):
    """Worker side of a modality. Everything random is a pure function of (seed, epoch, sample id)."""

    def __call__(self, data: bytes, sample_id: str, epoch: int) -> Sample:
        """Decode, augment and mask one sample. Raises BadSample."""
        ...

    def collate(
        self, samples: list[Sample], sample_ids: list[str], labels: list[int], dropped: list[tuple[str, str]]
    ) -> Batch:
        """The micro-batch of these samples; the row of zeros when there are none."""
        ...

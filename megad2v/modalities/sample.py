"""What every modality's worker side gives to the loader: prepared samples, or the reason why there is none."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import xxhash

from megad2v.modalities.batch import Batch

Mode = Literal["train", "valid", "probe"]
"""train: augmented and masked anew each epoch; valid: centre crop, one fixed mask; probe: centre crop, no mask."""

Prepared = TypeVar("Prepared")


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason. It is dropped and recorded, and training goes on."""


def fingerprint(*arrays: np.ndarray) -> str:
    """Hex hash of the bytes of some arrays, for `data.trace` and the guard, which compares what ranks of a group see.

    XXH3: always on, it has to cost nothing beside decoding (blake2b took 18 % of a recording's time, 4 % of a photo's).
    """
    total = xxhash.xxh3_64()
    for array in arrays:
        total.update(np.ascontiguousarray(array))
    return total.hexdigest()


class Sample(NamedTuple):
    """One sample, ready to be stacked into a Batch: where all samples have one shape."""

    inputs: torch.Tensor
    """vision: uint8 (C, H, W)."""
    mask_mt: torch.Tensor
    """bool (M, T): True where hidden."""
    fingerprint: str
    """Hex hash of inputs and mask."""


class Transform(Protocol[Prepared]):
    """Worker side of a modality. Everything random is a pure function of (seed, epoch, sample id), and of nothing else
    but the length that the samples of a micro-batch share."""

    def __call__(self, data: bytes, sample_id: str, epoch: int) -> Prepared:
        """Decode and augment one sample, and mask it where its length is known by now. Raises BadSample."""
        ...

    def collate(
        self, samples: list[Prepared], sample_ids: list[str], labels: list[int], dropped: list[tuple[str, str]]
    ) -> Batch:
        """The micro-batch of these samples; the row of zeros when there are none."""
        ...

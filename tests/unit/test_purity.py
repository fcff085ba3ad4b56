"""Crop and mask of an image each follow seed, epoch and sample id, and neither leans on the other's randomness."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest
import torch

from megad2v.config.modalities import MaskConfig
from megad2v.config.schema import TrainConfig
from megad2v.modalities.draws import generator
from megad2v.modalities.sample import Sample
from megad2v.modalities.vision.transforms import VisionTransform
from tests.unit.data_helpers import config, jpeg

CONFIG = replace(config(None), mask=MaskConfig(ratio=0.5, min_block=1))


def sample(*, seed: int = 3, epoch: int = 0, sample_id: str = "a.tar/0", number: int = 0) -> Sample:
    transform = VisionTransform(replace(CONFIG, train=TrainConfig(seed=seed)), "train")
    return transform(jpeg(1), f"{sample_id}{number}", epoch)


@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 1}, {"sample_id": "b.tar/0"}], ids=str)
def test_crop_and_mask_each_change(change: dict[str, Any]) -> None:
    pairs = [(sample(number=n), sample(number=n, **change)) for n in range(4)]
    assert not any(torch.equal(one.inputs, other.inputs) for one, other in pairs)
    assert not any(torch.equal(one.mask_mt, other.mask_mt) for one, other in pairs)
    again = sample(**change)
    assert torch.equal(again.inputs, pairs[0][1].inputs)
    assert torch.equal(again.mask_mt, pairs[0][1].mask_mt)


def test_streams_are_those_of_a_philox_keyed_by_the_hash() -> None:
    """numpy's own way of giving a key, which costs three times as much."""
    key = blake2b(b"3\x1f0\x1fa.tar/0\x1fcrop", digest_size=16).digest()
    expected = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(100)
    assert (generator(3, 0, "a.tar/0", "crop").random(100) == expected).all()

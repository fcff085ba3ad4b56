"""Frames of a waveform, against torch's convolutions."""

from __future__ import annotations

import pytest
import torch

from megad2v.config.modalities import SpeechConfig
from megad2v.modalities.speech.geometry import frame_count, samples_needed

LAYERS = SpeechConfig().conv_layers


@pytest.mark.parametrize(("samples", "frames"), [(160_000, 499), (16_007, 49), (400, 1), (399, 0), (0, 0)])
def test_frames_of_the_released_front_end(samples: int, frames: int) -> None:
    assert frame_count(samples, LAYERS) == frames


def test_frames_are_those_of_convolutions() -> None:
    for samples in range(400, 3000, 37):
        x = torch.empty(1, 1, samples, device="meta")
        for _, kernel, stride in LAYERS:
            x = torch.nn.functional.conv1d(x, torch.empty(1, 1, kernel, device="meta"), stride=stride)
        assert frame_count(samples, LAYERS) == x.shape[-1]


def test_fewest_samples() -> None:
    for frames in range(1, 200):
        samples = samples_needed(frames, LAYERS)
        assert frame_count(samples, LAYERS) == frames
        assert frame_count(samples - 1, LAYERS) == frames - 1

"""How many frames a waveform becomes: shared by the workers, the plan and the front end."""

from __future__ import annotations

from collections.abc import Sequence

SAMPLE_RATE = 16_000
"""Samples per second of every waveform that a model sees."""


def sample_count(seconds: float) -> int:
    """Samples of a duration."""
    return round(seconds * SAMPLE_RATE)


ConvLayer = tuple[int, int, int]
"""(channels, kernel, stride)."""


def frame_count(samples: int, conv_layers: Sequence[ConvLayer]) -> int:
    """Frames that the convolutions make of `samples`: floor((n - kernel) / stride) + 1 after each (spec 1.2), at least
    0. 160,000 -> 499."""
    for _, kernel, stride in conv_layers:
        samples = max(0, (samples - kernel) // stride + 1)
    return samples


def samples_needed(frames: int, conv_layers: Sequence[ConvLayer]) -> int:
    """The fewest samples that make `frames` frames (at least 1)."""
    for _, kernel, stride in reversed(conv_layers):
        frames = (frames - 1) * stride + kernel
    return frames

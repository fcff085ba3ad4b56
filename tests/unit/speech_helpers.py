"""Short recordings, shards of them, and configurations for the tests of speech batches."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megad2v.config.modalities import SpeechConfig
from megad2v.config.schema import Config, DataConfig, MicroBatchConfig, TrainConfig
from megad2v.data.writer import DatasetWriter

LAYERS = ((8, 10, 5), (8, 3, 2), (8, 2, 2))
"""20 samples a frame, 30 for the first."""


def tone(samples: int, seed: int) -> npt.NDArray[np.float32]:
    """A noisy sine with an offset, of 16 bits so that FLAC keeps it to the bit."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / 16_000
    wave = 0.1 + 0.3 * np.sin(2 * np.pi * (200 + 30 * seed) * time) + 0.05 * rng.standard_normal(samples)
    return (np.rint(np.clip(wave, -1, 1) * 32767) / 32768).astype(np.float32)


def flac(waveform: npt.NDArray[np.float32]) -> bytes:
    """16-bit FLAC, 16 kHz."""
    soundfile = pytest.importorskip("soundfile")
    out = io.BytesIO()
    soundfile.write(out, waveform, 16_000, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def write_speech(folder: Path, lengths: list[int], *, bad: tuple[int, ...] = ()) -> Path:
    """Small shards of labelled recordings of these lengths in samples; the bytes of those in `bad` stop short."""
    with DatasetWriter(folder, "speech", "speech", 40_000) as writer:
        for number, length in enumerate(lengths):
            data = flac(tone(length, number))
            data = data[: len(data) // 2] if number in bad else data
            writer.write(f"{number:04d}", {"flac": data, "cls": str(number % 3).encode()})
        writer.finish(classes=("a", "b", "c"), class_counts=(0, 0, 0))
    return folder


def speech_config(shards: Path | None = None, **data: Any) -> Config:
    """Recordings of 0.05 to 0.4 s, 1 s a micro-batch, four of them a step."""
    base = Config(
        modality="speech",
        speech=SpeechConfig(conv_layers=LAYERS, min_seconds=0.05, max_seconds=0.4),
        data=DataConfig(
            shards=None if shards is None else str(shards),
            micro_batch=MicroBatchConfig(samples=None, seconds=1.0),
            workers=0,
            window=2,
            bucket_ratio=1.3,
        ),
        train=TrainConfig(micro_batches_per_step=4, seed=3),
    )
    return replace(base, data=replace(base.data, **data))

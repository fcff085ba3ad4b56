"""Worker side of speech: decode, normalise, crop, mask. Everything random is pure in (seed, epoch, sample id).

A micro-batch for training has no padding: all its recordings are cropped to its shortest (spec 1.1), so crops and masks
wait until it is complete. Where within its recording a crop lies is one number in [0, 1) for each sample and epoch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from megad2v.config.schema import Config
from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.modalities.draws import generator
from megad2v.modalities.sample import BadSample, Mode, fingerprint
from megad2v.modalities.speech.decode import Waveform, read_waveform
from megad2v.modalities.speech.geometry import SAMPLE_RATE, frame_count, sample_count, samples_needed
from megad2v.modalities.speech.masking import BoolFrames, equal_counts, span_mask

NORMALISE_EPS = 1e-5
"""Added to a waveform's variance (spec 1.1)."""
LEAST_FRAMES = 2
"""Instance norm needs two."""


class Utterance(NamedTuple):
    """One decoded recording, waiting for its micro-batch."""

    waveform: Waveform
    """As decoded, speech.max_seconds of it at most."""
    shift: float
    """Mean over the whole recording, which comes off every sample (speech.normalise)."""
    scale: float
    """What the samples are multiplied by then."""
    place: float
    """Where crops lie: 0 at its beginning, towards 1 at its end."""
    sample_id: str
    epoch: int


def window(waveform: Waveform, size: int, place: float) -> Waveform:
    """`size` samples of a waveform; `place` in [0, 1) says which. Uniform places make all windows equally likely.

    A window of a window, both at the same place, is the smaller one of the whole (to a sample): so a long recording can
    be cut down before the length of its micro-batch is known.
    """
    start = int(place * (len(waveform) - size + 1))
    return waveform[start : start + size]


class SpeechTransform:
    """Encoded recording -> float32 (samples,) and span mask, as the configuration and mode say.

    train: cropped at random to the micro-batch's shortest, new spans each epoch. valid: the middle speech.max_seconds,
    padded with zeros to the micro-batch's longest, fixed spans that are not trimmed to equal counts, since they must
    not follow the micro-batch. probe: the same, unmasked, and recordings shorter than speech.min_seconds too.
    Raises UserError when `speech` values cannot work; calling raises BadSample.
    """

    modality = "speech"

    def __init__(self, config: Config, mode: Mode) -> None:
        self._layers = config.speech.conv_layers
        self._normalise = config.speech.normalise
        self._shortest = sample_count(config.speech.min_seconds)
        self._longest = sample_count(config.speech.max_seconds)
        self._mask = config.mask
        self._seed = config.train.seed
        self._mode = mode
        needed = samples_needed(LEAST_FRAMES, self._layers)
        if self._shortest < needed:
            raise UserError(
                f"speech.min_seconds: {config.speech.min_seconds:g} s make {frame_count(self._shortest, self._layers)} "
                f"frames of speech.conv_layers, fewer than {LEAST_FRAMES}; give {needed / SAMPLE_RATE:g} or more"
            )
        self._least = samples_needed(1, self._layers) if mode == "probe" else self._shortest

    def __call__(self, data: bytes, sample_id: str, epoch: int) -> Utterance:
        """One recording. Raises BadSample when it cannot be decoded or is too short."""
        waveform = read_waveform(data)
        if len(waveform) < self._least:
            raise BadSample(f"{len(waveform)} samples, fewer than the {self._least} needed")
        shift, scale = _normalisation(waveform) if self._normalise else (0.0, 1.0)
        place = 0.5
        if self._mode == "train":
            place = generator(self._seed, epoch, sample_id, "crop").random()
        if len(waveform) > self._longest:
            waveform = window(waveform, self._longest, place).copy()  # what lies outside is freed
        return Utterance(waveform, shift, scale, place, sample_id, epoch)

    def collate(
        self, samples: list[Utterance], sample_ids: list[str], labels: list[int], dropped: list[tuple[str, str]]
    ) -> Batch:
        """inputs float32 (B, samples), mask_bmt (B, 1, T); without samples one row of zeros that hides nothing."""
        crops = [sample.waveform for sample in samples]
        if samples and self._mode == "train":
            shortest = min(len(crop) for crop in crops)
            crops = [window(sample.waveform, shortest, sample.place) for sample in samples]
        frames = [frame_count(len(crop), self._layers) for crop in crops]
        masks = self._draw_masks(samples, frames)

        length = max((len(crop) for crop in crops), default=self._shortest)
        positions = frame_count(length, self._layers)
        inputs_bs = np.zeros((max(1, len(crops)), length), dtype=np.float32)
        mask_bmt = np.zeros((max(1, len(crops)), 1, positions), dtype=np.bool_)
        for row, (sample, crop, mask) in enumerate(zip(samples, crops, masks, strict=True)):
            inputs_bs[row, : len(crop)] = (crop - np.float32(sample.shift)) * np.float32(sample.scale)
            mask_bmt[row, 0, : len(mask)] = mask
        padding_bt = None
        if any(count < positions for count in frames):
            padding_bt = torch.arange(positions) >= torch.tensor(frames)[:, None]
        return Batch(
            modality=self.modality,
            inputs=torch.from_numpy(inputs_bs),
            mask_bmt=torch.from_numpy(mask_bmt),
            padding_bt=padding_bt,
            labels=torch.tensor(labels if samples else [-1], dtype=torch.int64),
            sample_ids=tuple(sample_ids),
            # Of samples as decoded: their normalisation may round differently on another kind of machine.
            fingerprints=tuple(fingerprint(crop, mask) for crop, mask in zip(crops, masks, strict=True)),
            dropped=tuple(dropped),
        )

    def _draw_masks(self, samples: list[Utterance], frames: list[int]) -> list[BoolFrames]:
        """One mask over the frames of each sample; what is padding lies behind them."""
        mask, train = self._mask, self._mode == "train"
        if self._mode == "probe":
            return [np.zeros(count, dtype=np.bool_) for count in frames]
        # Validation is compared over time, so its masks must not follow the epoch.
        keys = [(self._seed, sample.epoch if train else self._mode, sample.sample_id) for sample in samples]
        masks = [
            span_mask(count, mask.ratio, mask.span, mask.min_spans, generator(*key, "mask"))
            for count, key in zip(frames, keys, strict=True)
        ]
        if train and mask.equal_counts and masks:
            masks = equal_counts(masks, [generator(*key, "trim") for key in keys])
        return masks


def _normalisation(waveform: Waveform) -> tuple[float, float]:
    """Mean, and the inverse of the standard deviation (biased): layer norm over the whole length."""
    variance = float(waveform.var(dtype=np.float64))
    return float(waveform.mean(dtype=np.float64)), (variance + NORMALISE_EPS) ** -0.5

"""Speech on the worker's side: normalisation, crops, padding, masks; what each is a function of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megad2v.config.modalities import MaskConfig, SpeechConfig
from megad2v.config.schema import Config, TrainConfig
from megad2v.errors import UserError
from megad2v.modalities.batch import Batch
from megad2v.modalities.sample import BadSample, Mode
from megad2v.modalities.speech.geometry import frame_count
from megad2v.modalities.speech.transforms import SpeechTransform, window
from tests.unit.speech_helpers import LAYERS, flac, speech_config, tone

CONFIG = speech_config()


def batch(
    lengths: list[int], mode: Mode = "train", *, config: Config = CONFIG, epoch: int = 0, first: int = 0
) -> Batch:
    transform = SpeechTransform(config, mode)
    ids = [f"a.tar/{first + number}" for number in range(len(lengths))]
    samples = [
        transform(flac(tone(length, first + number)), sample_id, epoch)
        for number, (length, sample_id) in enumerate(zip(lengths, ids, strict=True))
    ]
    return transform.collate(samples, ids, [-1] * len(ids), [])


def normalised(length: int, seed: int) -> torch.Tensor:
    """By torch's own layer norm (spec 1.1)."""
    waveform = torch.from_numpy(tone(length, seed))
    return F.layer_norm(waveform, waveform.shape, eps=1e-5)


def offsets(crops: torch.Tensor, wholes: list[torch.Tensor]) -> list[int]:
    """Where each row of a batch lies in its recording; fails where it lies nowhere."""
    found = []
    for crop, whole in zip(crops, wholes, strict=True):
        distances = (whole.unfold(0, len(crop), 1) - crop).abs().amax(dim=1)
        assert distances.min() < 1e-5
        found.append(int(distances.argmin()))
    return found


def test_training_crops_to_the_shortest_after_normalising_the_whole() -> None:
    lengths = [3000, 2500, 2700]
    made = batch(lengths)
    assert (made.modality, made.inputs.dtype, made.inputs.shape) == ("speech", torch.float32, (3, 2500))
    assert made.mask_bmt.shape == (3, 1, frame_count(2500, LAYERS)) and made.padding_bt is None
    places = offsets(made.inputs, [normalised(length, number) for number, length in enumerate(lengths)])
    assert places[1] == 0 and 0 < places[0] <= 500 and 0 < places[2] <= 200


def test_without_normalisation() -> None:
    made = batch([2000, 2000], config=replace(CONFIG, speech=replace(CONFIG.speech, normalise=False)))
    assert torch.equal(made.inputs, torch.stack([torch.from_numpy(tone(2000, number)) for number in range(2)]))


def test_silence_is_normalised_to_silence() -> None:
    transform = SpeechTransform(CONFIG, "train")
    made = transform.collate([transform(flac(np.zeros(2000, np.float32)), "a", 0)], ["a"], [-1], [])
    assert not made.inputs.any()


def test_long_recordings_are_cropped_to_the_longest() -> None:
    made = batch([20_000, 9000])
    assert made.inputs.shape == (2, 6400)  # 0.4 s
    offsets(made.inputs, [normalised(20_000, 0), normalised(9000, 1)])


def test_crops_are_uniform() -> None:
    """Also of recordings that are cut down twice: to speech.max_seconds, then to the micro-batch's shortest."""
    transform = SpeechTransform(CONFIG, "train")
    long, short = flac(tone(10_000, 0)), transform(flac(tone(2000, 1)), "short", 0)
    places = []
    for epoch in range(400):
        sample = transform(long, "long", epoch)
        assert len(sample.waveform) == 6400
        made = transform.collate([sample, short], ["long", "short"], [-1, -1], [])
        crop = made.inputs[0, :40]
        whole = normalised(10_000, 0).unfold(0, 40, 1)
        places.append(int((whole - crop).abs().amax(dim=1).argmin()))
    counts = np.histogram(places, bins=8, range=(0, 8001))[0]
    assert counts.sum() == 400
    assert ((counts - 50) ** 2 / 50).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_window_of_a_window() -> None:
    rng = np.random.default_rng(0)
    whole = np.arange(5000, dtype=np.float32)
    for place in rng.random(200):
        middle, small = (int(n) for n in np.sort(rng.integers(1, 5001, 2))[::-1])
        direct = window(whole, small, place)
        nested = window(window(whole, middle, place), small, place)
        assert len(direct) == len(nested) == small
        assert abs(direct[0] - nested[0]) <= 1
    assert (window(whole, 5000, 0.999) == whole).all()
    assert window(whole, 1, 0.99999)[0] == 4999 and window(whole, 1, 0.0)[0] == 0


@pytest.mark.parametrize("change", ["seed", "epoch", "id"])
def test_crop_and_mask_each_change(change: str) -> None:
    other = {
        "seed": lambda: batch([3000] * 6 + [2000], config=replace(CONFIG, train=TrainConfig(seed=4))),
        "epoch": lambda: batch([3000] * 6 + [2000], epoch=1),
        "id": lambda: batch([3000] * 6 + [2000], first=100),
    }[change]()
    made = batch([3000] * 6 + [2000])
    assert not any(torch.equal(a, b) for a, b in zip(made.inputs[:6], other.inputs[:6], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(made.mask_bmt, other.mask_bmt, strict=True))
    assert not set(made.fingerprints) & set(other.fingerprints)
    again = batch([3000] * 6 + [2000])
    assert torch.equal(made.inputs, again.inputs) and torch.equal(made.mask_bmt, again.mask_bmt)
    assert made.fingerprints == again.fingerprints


def test_row_does_not_depend_on_its_company() -> None:
    """Apart from the length and, with equal counts, the number of frames that they share."""
    config = replace(CONFIG, mask=MaskConfig(ratio=0.65, span=10, equal_counts=False))
    one, other = batch([3000, 2000, 2500], config=config), batch([3000, 6000, 2000, 4000], config=config)
    assert torch.equal(one.inputs[0], other.inputs[0]) and torch.equal(one.mask_bmt[0], other.mask_bmt[0])
    assert one.fingerprints[0] == other.fingerprints[0]


@pytest.mark.parametrize("equal", [True, False])
def test_equal_counts(equal: bool) -> None:
    made = batch([4000] * 12, config=replace(CONFIG, mask=MaskConfig(ratio=0.65, span=10, equal_counts=equal)))
    counts = made.mask_bmt.sum(dim=(1, 2))
    assert (counts.unique().numel() == 1) is equal
    assert 0.3 < made.mask_bmt.float().mean() < 0.6
    assert not made.mask_bmt[:, :, -1].any()


def test_validation_pads_and_keeps_its_masks() -> None:
    lengths = [3000, 20_000, 900, 6400]
    config = replace(CONFIG, mask=MaskConfig(ratio=0.65, span=10))
    made, later = batch(lengths, "valid", config=config), batch(lengths, "valid", config=config, epoch=5)
    frames = [frame_count(min(length, 6400), LAYERS) for length in lengths]
    assert made.inputs.shape == (4, 6400) and made.mask_bmt.shape == (4, 1, max(frames))
    assert (~made.padding_bt).sum(dim=1).tolist() == frames
    assert not (made.mask_bmt[:, 0] & made.padding_bt).any()
    for row, (length, seed) in enumerate(zip(lengths, range(4), strict=True)):
        whole = normalised(length, seed)
        start = max(0, (length - 6400 + 1) // 2)
        assert torch.allclose(made.inputs[row, : min(length, 6400)], whole[start : start + 6400], atol=1e-5)
        assert not made.inputs[row, length:].any()
        assert made.padding_bt[row, frames[row] :].all()
    assert torch.equal(made.inputs, later.inputs) and torch.equal(made.mask_bmt, later.mask_bmt)
    alone = batch(lengths[:1], "valid", config=config)
    assert alone.padding_bt is None, "nothing is padded"
    assert torch.equal(alone.mask_bmt[0, 0], made.mask_bmt[0, 0, : frames[0]])
    assert alone.fingerprints[0] == made.fingerprints[0]


def test_positions_that_count() -> None:
    made = batch([3000, 900], "valid")
    frames = [frame_count(3000, LAYERS), frame_count(900, LAYERS)]
    assert made.position_counts() == (sum(frames), sum(count**2 for count in frames))
    made = batch([3000, 3000])
    assert made.position_counts() == (2 * frames[0], 2 * frames[0] ** 2)
    assert SpeechTransform(CONFIG, "train").collate([], [], [], []).position_counts() == (0, 0)


def test_probe_hides_nothing_and_takes_short_recordings() -> None:
    made = batch([3000, 40], "probe")
    assert not made.mask_bmt.any()
    assert (~made.padding_bt).sum(dim=1).tolist() == [frame_count(3000, LAYERS), 1]
    with pytest.raises(BadSample, match="29 samples, fewer than the 30 needed"):
        batch([29], "probe")


@pytest.mark.parametrize("mode", ["train", "valid"])
def test_recordings_that_cannot_be_used(mode: Mode) -> None:
    transform = SpeechTransform(CONFIG, mode)
    with pytest.raises(BadSample, match="799 samples, fewer than the 800 needed"):
        transform(flac(tone(799, 0)), "a", 0)
    with pytest.raises(BadSample):
        transform(b"no sound", "a", 0)
    transform(flac(tone(800, 0)), "a", 0)


@pytest.mark.parametrize("mode", ["train", "valid", "probe"])
def test_row_of_zeros(mode: Mode) -> None:
    made = SpeechTransform(CONFIG, mode).collate([], [], [], [("a", "broken")])
    assert made.inputs.shape == (1, 800) and not made.inputs.any()
    assert made.mask_bmt.shape == (1, 1, frame_count(800, LAYERS)) and made.masked_count() == 0
    assert made.padding_bt is None and made.labels.tolist() == [-1]
    assert (made.sample_ids, made.fingerprints, made.dropped) == ((), (), (("a", "broken"),))


def test_least_length_must_make_frames() -> None:
    config = replace(CONFIG, speech=replace(CONFIG.speech, min_seconds=0.003))
    with pytest.raises(UserError, match=r"speech\.min_seconds: 0\.003 s make 1 frames .* give 0\.003125 or more"):
        SpeechTransform(config, "train")


def test_real_speech(shared: Callable[[str], Path]) -> None:
    """LibriSpeech, the released front end's sizes: 10 to 17 s cropped to the shortest, about half of it hidden."""
    folder = shared("data/speech/librispeech_140spk")
    config = Config(modality="speech", mask=MaskConfig(ratio=0.65), train=TrainConfig(seed=1))
    transform = SpeechTransform(config, "train")
    paths = sorted(folder.glob("*.flac"))[:6]
    samples: list[Any] = [transform(path.read_bytes(), path.name, 0) for path in paths]
    made = transform.collate(samples, [path.name for path in paths], [-1] * 6, [])
    shortest = min(len(sample.waveform) for sample in samples)
    assert made.inputs.shape == (6, shortest)
    assert made.mask_bmt.shape[2] == frame_count(shortest, SpeechConfig().conv_layers)
    assert 0.3 < made.mask_bmt.float().mean() < 0.55
    assert 0.5 < made.inputs.std() < 1.5

"""The count behind `mfu`, and every recipe as a model without memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megad2v.config.load import load_config, recipes
from megad2v.config.modalities import VisionConfig
from megad2v.config.parts import modalities, of_modality
from megad2v.config.schema import Config, ModelConfig, TargetsConfig, TeacherConfig
from megad2v.metrics.flops import flops_per_sample
from megad2v.metrics.throughput import SampleFlops, Throughput
from megad2v.modalities.build import build_student, build_teacher, positions
from megad2v.modalities.speech.geometry import samples_needed


def by_hand(config: Config, count: int) -> float:
    """2 per multiplication and addition; student forward and backward are three forwards, the teacher's is one more,
    without a front end that it shares.

    Norms, softmax and biases are left out: they are what the tolerance is for.
    """
    d, speech = config.model.width, config.speech
    if config.modality == "speech":
        t, front, inputs, samples = count, 0, 1, samples_needed(count, speech.conv_layers)
        for channels, kernel, stride in speech.conv_layers:
            samples = (samples - kernel) // stride + 1
            front += 2 * samples * channels * inputs * kernel
            inputs = channels
        front += 2 * count * inputs * d
        added = speech.position_depth * 2 * count * d * (d // speech.position_groups) * speech.position_kernel
    elif config.modality == "text":
        t, added, front = count, 0, 0  # tables are looked up
    else:
        t, added = count + 1, 0
        front = 2 * count * d * config.vision.channels * config.vision.patch_size**2
    projections = 2 * t * d * (3 * d + d + 2 * config.model.mlp_ratio * d)
    scores = 2 * (2 * t * t * d)
    own_front_end = config.teacher.scope == "model"
    return (4 if own_front_end else 3) * front + 4 * (added + config.model.depth * (projections + scores))


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(
            model=ModelConfig(width=384, depth=4, heads=6, mlp_ratio=3.0, relative_bias=False),
            vision=VisionConfig(image_size=224, patch_size=16),
        ),
        Config(
            model=ModelConfig(width=64, depth=2, heads=1),
            vision=VisionConfig(image_size=128, patch_size=4),
            targets=TargetsConfig(layers=1),
        ),
    ],
    ids=["defaults", "224 pixels", "attention outweighs projections"],
)
def test_flops(config: Config) -> None:
    count = positions(config)
    assert flops_per_sample(config, count) == pytest.approx(by_hand(config, count), rel=0.01)


@pytest.mark.parametrize("scope", ["encoder", "model"])
@pytest.mark.parametrize("frames", [49, 200])
def test_flops_of_speech(frames: int, scope: str) -> None:
    """Convolutions included, of which the teacher may share the front end's."""
    config = Config(
        modality="speech",
        model=ModelConfig(width=192, depth=4, heads=3, norm="post", relative_bias=False),
        teacher=TeacherConfig(scope=scope),
    )
    assert flops_per_sample(config, frames) == pytest.approx(by_hand(config, frames), rel=0.001)


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_recipe_builds_without_memory(recipe: str) -> None:
    config = load_config(recipe, text__vocabulary=50_265)  # recipes leave it to the tokenizer
    with torch.device("meta"):
        student, teacher = build_student(config), build_teacher(config)
    shapes = {name: parameter.shape for name, parameter in student.named_parameters()}
    for name, parameter in teacher.named_parameters():
        assert parameter.shape == shapes[name], name
    assert all(parameter.is_meta for parameter in student.parameters())
    for modality in modalities(config):
        alone = of_modality(config, modality)
        count = positions(alone)
        assert flops_per_sample(alone, count) == pytest.approx(by_hand(alone, count), rel=0.01)


def test_throughput_is_a_mean_since_it_was_read() -> None:
    def flops(samples: int, positions: int, squares: int) -> float:
        return 1e6 * samples + 0 * positions + 0 * squares

    meter = Throughput(flops=flops, peak_flops=4e7)
    meter.add(10, 640, 10 * 64**2, step_seconds=0.5, data_seconds=0.1)
    meter.add(20, 1280, 20 * 64**2, step_seconds=1.5, data_seconds=0.3)
    expected = {"step_seconds": 1.0, "data_seconds": 0.2, "tokens_per_second": 15 * 64, "mfu": 15e6 / 4e7}
    assert meter.read() == pytest.approx(expected)
    meter.add(8, 500, 40_000, step_seconds=1.0, data_seconds=0.0)
    assert meter.read()["tokens_per_second"] == pytest.approx(500)
    unknown = Throughput(flops=flops, peak_flops=None)
    unknown.add(1, 1, 1, step_seconds=1.0, data_seconds=0.0)
    assert unknown.read()["mfu"] is None


def test_flops_of_any_length_follow_from_three() -> None:
    """Images have one size, so one count; an encoder's matrices and scores are linear and quadratic in T."""
    flops = SampleFlops(lambda positions: 12345.0, 64)
    assert flops(7, 7 * 64, 7 * 64**2) == pytest.approx(7 * 12345.0)

    def count(positions: int) -> float:
        with torch.device("meta"):
            encoder = build_student(Config(model=ModelConfig(relative_bias=False))).encoder
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                encoder(torch.empty(1, positions, 192))
        return counter.get_total_flops()

    flops = SampleFlops(count, 50)
    lengths = [7, 100, 311, 1000]
    together = flops(len(lengths), sum(lengths), sum(length**2 for length in lengths))
    assert together == pytest.approx(sum(count(length) for length in lengths), rel=1e-9)
    assert count(1000) > 11 * count(100), "quadratic, or the test would show nothing"

"""What an import makes of other programs' settings."""

from __future__ import annotations

import argparse

import pytest

from megad2v.config.load import load_config
from megad2v.convert.incoming import INCEPTION, _with_arguments
from megad2v.modalities.fairseq_cfg import with_objective
from megad2v.modalities.keys import mlp_ratio


@pytest.mark.parametrize("width", [24, 240, 480, 768, 896])
def test_hidden_channels_come_back(width: int) -> None:
    """The ratio is a float that is multiplied and rounded down: 240 x (245 / 240) would have lost a channel."""
    hidden = range(width, 5 * width)
    assert [int(width * mlp_ratio(h, width)) for h in hidden] == list(hidden)
    if width == 240:
        assert int(240 * (245 / 240)) == 244


def test_the_forks_pixels() -> None:
    """Without its flag the BEiT fork normalises by 0.5; without arguments nobody knows, and the recipe's are taken."""
    config = load_config("vision_base")
    for arguments, mean in (
        (None, config.vision.mean),
        (argparse.Namespace(imagenet_default_mean_and_std=True), config.vision.mean),
        (argparse.Namespace(imagenet_default_mean_and_std=False), INCEPTION),
        ({"normalization_mean": [0.1, 0.2, 0.3], "normalization_std": [1, 1, 1]}, (0.1, 0.2, 0.3)),
    ):
        assert _with_arguments(config, arguments).vision.mean == mean
    assert _with_arguments(config, {"target_layers": "[6, 7]"}).targets.layers == 2


def test_more_target_layers_than_there_are() -> None:
    """fairseq takes the last K of its list, however long that is."""
    config = load_config("speech_tiny")
    assert with_objective(config, {"average_top_k_layers": 50}).targets.layers == config.model.depth

"""A configuration survives JSON, and what is wrong in a tree is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megad2v.config.load import load_config
from megad2v.config.modalities import MaskConfig, VisionConfig
from megad2v.config.schema import (
    Config,
    DataConfig,
    MicroBatchConfig,
    ModelConfig,
    OptimizerConfig,
    TeacherConfig,
    TrainConfig,
    WandbConfig,
)
from megad2v.config.tree import config_from_dict
from megad2v.errors import UserError

FULL = Config(
    model=ModelConfig(width=768, layer_scale=None, qkv_bias="full", drop_path=0.25),
    vision=VisionConfig(mean=(0.485, 0.456, 0.406)),
    mask=MaskConfig(max_block=40),
    teacher=TeacherConfig(decay_steps=1000),
    optimizer=OptimizerConfig(betas=(0.9, 0.98)),
    data=DataConfig(
        shards={"vision": "a/{00..11}.tar"}, valid="b", trace=True, micro_batch=MicroBatchConfig(seconds=87.5)
    ),
    train=TrainConfig(init="runs/x", wandb=WandbConfig(project="p", mode="offline")),
)


@pytest.mark.parametrize("config", [Config(), FULL], ids=["defaults", "all kinds of values"])
def test_json_and_back(config: Config) -> None:
    tree = dataclasses.asdict(config)
    assert config_from_dict(tree) == config
    again = config_from_dict(json.loads(json.dumps(tree)))
    assert again == config
    assert isinstance(again.vision.mean, tuple)


def test_whole_numbers_serve_as_floats() -> None:
    config = config_from_dict({"model": {"mlp_ratio": 4, "layer_scale": 1}, "vision": {"mean": [0, 1, 0.5]}})
    assert (config.model.mlp_ratio, config.model.layer_scale) == (4.0, 1.0)
    assert all(isinstance(value, float) for value in (config.model.mlp_ratio, *config.vision.mean))


def test_absent_keys_take_their_defaults() -> None:
    assert config_from_dict({}) == Config()
    assert config_from_dict({"model": {"depth": 2}}) == Config(model=ModelConfig(depth=2))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"modle": {}}, "modle: unknown key; did you mean model?"),
        ({"model": {"widht": 4}}, "model.widht: unknown key; did you mean model.width?"),
        ({"train": {"wandb": {"projekt": "x"}}}, "train.wandb.projekt: unknown key; did you mean train.wandb.project?"),
        ({"parallel": {"zzz": 1}}, "parallel.zzz: unknown key; known here: tensor, sequence"),
        ({"model": {"width": "wide"}}, "model.width: expected int, got 'wide'"),
        ({"model": {"width": True}}, "model.width: expected int, got True"),
        ({"model": {"width": 1.5}}, "model.width: expected int, got 1.5"),
        ({"model": {"width": None}}, "model.width: expected int, got None"),
        ({"model": {"dropout": False}}, "model.dropout: expected float, got False"),
        ({"model": {"relative_bias": 1}}, "model.relative_bias: expected bool, got 1"),
        ({"model": {"layer_scale": "big"}}, "model.layer_scale: expected float, got 'big'"),
        ({"model": {"norm": "rms"}}, "model.norm: expected one of pre, post, got 'rms'"),
        ({"model": 3}, "model: expected keys and values, got 3"),
        ({"vision": {"mean": [0.5, 0.5]}}, "vision.mean: expected 3 values, got 2"),
        ({"vision": {"mean": "abc"}}, "vision.mean: expected tuple[float, float, float], got 'abc'"),
        ({"vision": {"mean": [0.5, 0.5, "x"]}}, "vision.mean: expected float, got 'x'"),
        ({"data": {"shards": 3}}, "data.shards: expected str or dict[str, str] or null, got 3"),
        ([], "configuration: expected keys and values, got []"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_named(tree: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_dict(tree)
    assert str(caught.value) == message


def test_keys_that_are_gone_are_passed_over_at_the_values_they_stood_for() -> None:
    """A checkpoint of an old run has keys that model.init has replaced."""
    tree = dataclasses.asdict(Config())
    tree["vision"] |= {"token_init_mean": 0.02, "token_init_std": 1.0}
    assert config_from_dict(tree) == Config()
    tree["vision"]["token_init_std"] = 0.02
    with pytest.raises(UserError, match=r"vision\.token_init_std: is gone, 0\.02 with it; see model\.init"):
        config_from_dict(tree)


def test_keys_that_are_gone_are_named_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("vision: {token_init_mean: 0.02}\n")
    with pytest.raises(UserError, match=r"token_init_mean: is gone, model\.init has taken its place; delete it"):
        load_config(str(path))

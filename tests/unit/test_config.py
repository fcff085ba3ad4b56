"""From recipes, files and flags to one configuration, and what is said about each mistake on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from megad2v.config.load import DEFAULT_RECIPE, known_keys, load_config, parse_command_line, recipes, to_yaml
from megad2v.config.modalities import MaskConfig, VisionConfig
from megad2v.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TeacherConfig,
    TrainConfig,
    WandbConfig,
)
from megad2v.config.tree import config_from_dict
from megad2v.config.validate import validate
from megad2v.errors import UserError

# What scripts rely on (DESIGN section 4).
CONTRACT = """
data.shards data.valid data.micro_batch data.workers data.trace data.max_bad_fraction
data.micro_batch.samples data.micro_batch.tokens data.micro_batch.seconds
train.steps train.output_dir train.seed train.save_every train.log_every train.eval_every
train.micro_batches_per_step train.resume train.init parallel.tensor parallel.sequence
model mask targets teacher.decay_start teacher.decay_end teacher.decay_steps optimizer.lr schedule
"""


def resolve(*arguments: object) -> Config:
    return parse_command_line([*map(str, arguments), "--deepspeed", "x.json"]).config


def refusal(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        resolve(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# --- What resolves


def test_keys_that_scripts_rely_on_exist() -> None:
    assert set(CONTRACT.split()) <= set(known_keys())


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_recipes_load(recipe: str) -> None:
    """And say what modality they are for, where they write, and how long they run: nothing a reader has to guess."""
    validate(load_config(recipe))
    tree = yaml.safe_load(recipes()[recipe].read_text())
    assert tree["modality"]
    assert {"steps", "micro_batches_per_step", "output_dir"} <= tree["train"].keys()


def test_default_recipe() -> None:
    assert resolve() == load_config(DEFAULT_RECIPE)
    assert parse_command_line(["--deepspeed", "x"]).recipe == DEFAULT_RECIPE


FULL = Config(
    model=ModelConfig(width=768, heads=12, depth=12, layer_scale=None, qkv_bias="full", drop_path=0.25),
    vision=VisionConfig(mean=(0.485, 0.456, 0.406)),
    mask=MaskConfig(max_block=40),
    teacher=TeacherConfig(decay_steps=1000),
    optimizer=OptimizerConfig(lr=1e-5, betas=(0.9, 0.98)),
    data=DataConfig(shards={"vision": "a/{00..11}.tar"}, valid="b c/{0..1}.tar", trace=True),
    train=TrainConfig(init="runs/x", output_dir="2024-01-01", wandb=WandbConfig(project="123", mode="offline")),
)


@pytest.mark.parametrize("config", [Config(), FULL], ids=["defaults", "all kinds of values"])
def test_yaml_and_back(config: Config, write: Any) -> None:
    """What a run writes down as its config.yaml resolves to the same run, alone and over any recipe."""
    path = write(to_yaml(config))
    assert load_config(str(path)) == config
    assert load_config(DEFAULT_RECIPE, str(path)) == config
    assert config_from_dict(yaml.safe_load(to_yaml(config))) == config, "by the library-free reader too"


def test_later_wins(write: Any) -> None:
    """default < recipe < first file < second file < flag, key by key, wherever the flag stands."""
    recipe, default = load_config("vision_tiny"), Config()
    assert (recipe.model.width, recipe.train.steps) != (default.model.width, default.train.steps)
    first = write("model: {depth: 4, heads: 2}\ntrain: {steps: 11, seed: 12, log_every: 13}", "first.yaml")
    second = write("train: {steps: 21, seed: 22}", "second.yaml")
    sources = ["--config", "vision_tiny", f"--config={first}", "--config", second]
    after, before = resolve(*sources, "--train.steps", 31), resolve("--train.steps=31", *sources)
    assert after == before
    assert (after.train.steps, after.train.seed, after.train.log_every) == (31, 22, 13)
    assert (after.model.depth, after.model.heads, after.model.width) == (4, 2, recipe.model.width)
    assert after.train.save_every == default.train.save_every
    # The other way round: the recipe named last has the last word.
    assert resolve("--config", first, "--config", "vision_tiny").train.steps == recipe.train.steps
    assert resolve("--config", first).model.width == default.model.width, "a file alone stands on the defaults"


def test_where_the_configuration_came_from(write: Any) -> None:
    path = write("train: {steps: 3}")
    assert parse_command_line(["--config", "vision_tiny", "--config", str(path), "--deepspeed", "x"]).recipe == (
        f"vision_tiny + {path}"
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.layer_scale", "null"], {"model.layer_scale": None}),
        (["--optimizer.betas", "[0.9, 0.95]"], {"optimizer.betas": (0.9, 0.95)}),
        (["--optimizer.lr", "1e-3"], {"optimizer.lr": 1e-3}),
        (["--data.shards", "a b/{0..3}.tar"], {"data.shards": "a b/{0..3}.tar"}),
        (["--data.shards", "{vision: a, speech: b}"], {"data.shards": {"vision": "a", "speech": "b"}}),
        (["--data.shards.vision=a", "--data.valid.vision", "b"], {"data.shards": {"vision": "a"}}),
        (["--data.micro_batch", "{samples: 3}"], {"data.micro_batch.samples": 3}),
        (["--train.seed", "-1", "--data.trace", "true"], {"train.seed": -1, "data.trace": True}),
        (["--train.output_dir", "2024-01-01"], {"train.output_dir": "2024-01-01"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags(flags: list[str], expected: dict[str, Any]) -> None:
    config = resolve(*flags)
    for key, value in expected.items():
        found: Any = config
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value


def test_python_api() -> None:
    config = load_config("vision_tiny", train__steps=7, data__shards="a", data__valid=None, vision__mean=[0, 0.5, 1])
    assert (config.train.steps, config.data.shards, config.vision.mean) == (7, "a", (0.0, 0.5, 1.0))


def test_print_config_needs_nothing_else() -> None:
    command = parse_command_line(["--print-config", "--train.steps", "5"])
    assert command.print_config
    assert command.config.train.steps == 5
    assert not parse_command_line(["--deepspeed", "x"]).print_config


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["--help"])
    assert ended.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for key in known_keys():
        assert f"--{key} " in words, key
    for text in ("Shards that are shuffled together", "M: micro-batches of one update", "smallest block in patches"):
        assert text in words, "the docstrings of the schema are what --help prints"


# --- What is refused, in one line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.widht", "3"], "--model.widht: unknown key; did you mean model.width?"),
        (["--train.step=3"], "--train.step: unknown key; did you mean train.steps?"),
        (["--lr", "1"], "--lr: unknown key; did you mean optimizer.lr?"),
        (["--train.wandb.projekt", "x"], "--train.wandb.projekt: unknown key; did you mean train.wandb.project?"),
        (["--qqqqq", "1"], "--qqqqq: unknown key; --help lists all keys"),
        (["--print_confg"], "--print_confg: unknown key; did you mean print-config?"),
        (["--config", "vision_tyni"], "vision_tiny); did you mean vision_tiny?"),
        (["--model.width", "wide"], "model.width: Expected a int. Got value: wide"),
        (["--model.width", "1.5"], "model.width: Expected a int. Got value: 1.5"),
        (["--optimizer.lr", "nan"], "optimizer.lr: Expected a float. Got value: nan"),
        (["--model.norm", "rms"], "model.norm: Expected a typing.Literal['pre', 'post']. Got value: rms"),
        (["--vision.mean", "[1, 2]"], "vision.mean: Expected a tuple with 3 elements. Got value: [1, 2]"),
        (["--train.steps"], "--train.steps: expected one argument"),
        (["vision_tiny"], "unrecognized arguments: vision_tiny"),
        (["--train.precision", "fp16"], "train.precision: fp16 is not supported (loss scaling"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags(flags: list[str], message: str) -> None:
    arguments = ["--deepspeed", "x", *flags]  # last, so that a flag without its value is met as such
    with pytest.raises(UserError) as caught:
        parse_command_line(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {widht: 3}", "model.widht: unknown key in {path}; did you mean model.width?"),
        ("modle: {width: 3}", "modle: unknown key in {path}; did you mean model?"),
        (
            "train: {wandb: {projekt: x}}",
            "train.wandb.projekt: unknown key in {path}; did you mean train.wandb",
        ),
        ("deepspeed: zero3.json", "deepspeed: unknown key in {path}"),
        ("3: 4", "3: unknown key in {path}"),
        ("model: {width: wide}", "model.width: Expected a int. Got value: wide"),
        ("train: {steps: true}", "train.steps: Expected a int. Got value: True"),
        ("train: {tensorboard: 1}", "train.tensorboard: Expected a bool. Got value: 1"),
        ("data: {shards: [a, b]}", "data.shards: "),
        ("data: {micro_batch: {tokens: 5}}", "data.micro_batch: images are batched by samples"),
        ("model: 3", "model: expected keys and values in {path}, got 3"),
        ("model:\ntrain: {steps: 3}", "model: expected keys and values in {path}, got None"),
        ("- a", "--config {path}: expected sections such as model: or train:, got list"),
        ("# nothing yet", "--config {path}: expected sections such as model: or train:, got an empty file"),
        ("model: [3", "--config {path}: not readable as YAML: "),
    ],
)
def test_wrong_files(text: str, message: str, write: Any) -> None:
    path = write(text)
    assert message.format(path=path) in refusal("--config", path)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "not readable as YAML" in refusal("--config", path)


def test_missing_deepspeed_json_is_said() -> None:
    with pytest.raises(UserError, match="--deepspeed: not given"):
        parse_command_line(["--config", "vision_tiny"])


# --- Numbers; what must hold between keys is in test_config_rules.py


def leaf_annotations(section: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, annotation as written) of every key."""
    kinds = get_type_hints(section)
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from leaf_annotations(kinds[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, str(field.type)


def with_value(tree: Any, path: list[str], value: Any) -> Any:
    """The tree with one leaf replaced, however deep it lies."""
    name, *rest = path
    inner = with_value(getattr(tree, name), rest, value) if rest else value
    return dataclasses.replace(tree, **{name: inner})


# From the annotations, not from the values: layer_scale may be null, and micro_batch.seconds is.
FLOAT_KEYS = [key for key, kind in leaf_annotations(Config) if "float" in kind]


@pytest.mark.parametrize("key", sorted(FLOAT_KEYS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_numbers_are_finite(key: str, value: float) -> None:
    """Whatever the key and however deep: the complaint is about this one, before any rule that NaN slips through."""
    default: Any = Config()
    for name in key.split("."):
        default = getattr(default, name)
    given = (*default[:-1], value) if isinstance(default, tuple) else value
    with pytest.raises(UserError) as caught:
        validate(with_value(Config(), key.split("."), given))
    assert str(caught.value) == f"{key}: expected a finite number, got {given}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {weight_decay: .nan}", "optimizer.weight_decay: "),
        ("loss: {beta: .inf}", "loss.beta: "),
        ("vision: {mean: [0.5, .nan, 0.5]}", "vision.mean: "),
    ],
)
def test_not_finite_in_a_file(text: str, message: str, write: Any) -> None:
    assert refusal("--config", write(text)).startswith(message)


def test_a_full_configuration_passes() -> None:
    validate(FULL)

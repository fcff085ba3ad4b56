"""From recipes, YAML files and the command line to one Config; and back to YAML."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from megad2v.config.joint import JointConfig
from megad2v.config.schema import Config
from megad2v.config.tree import RETIRED, nearest
from megad2v.config.validate import validate
from megad2v.errors import UserError

DEFAULT_RECIPE = "vision_tiny"
USAGE = "deepspeed launch/pretrain.py --deepspeed JSON [--config RECIPE_OR_YAML ...] [--key.path VALUE ...]"


@dataclass(frozen=True)
class CommandLine:
    """What `launch/pretrain.py` was asked for."""

    config: Config
    deepspeed: str
    recipe: str
    """Names of the recipes and files that the configuration came from, for the record."""
    check: bool
    print_config: bool
    local_rank: int | None


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe in the package."""
    folder = resources.files("megad2v.config") / "recipes"
    return {Path(str(item)).stem: Path(str(item)) for item in folder.iterdir() if str(item).endswith(".yaml")}


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Resolve the command line of `launch/pretrain.py`. Later --config files and then flags override earlier ones.

    Raises UserError in one line for an unknown key (with the nearest one), a wrong type or a contradiction.
    """
    given = _with_recipe_paths(list(arguments))
    sources = [given[i + 1] for i, argument in enumerate(given[:-1]) if argument == "--config"]
    _refuse_unknown_flags(given)
    for source in sources:
        _refuse_unknown_keys(source)
    parser = _parser()
    try:
        namespace = parser.instantiate(parser.parse_args(given))
    except ArgumentError as error:
        raise UserError(_one_line(str(error))) from None
    fields = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(Config)}
    if namespace.deepspeed is None and not namespace.print_config:
        raise UserError("--deepspeed: not given; name a DeepSpeed JSON, such as --deepspeed ds_configs/zero3.json")
    config = Config(**fields)
    validate(config)
    names = [Path(source).stem if Path(source) in recipes().values() else source for source in sources]
    return CommandLine(
        config=config,
        deepspeed=namespace.deepspeed or "",
        recipe=" + ".join(names),
        check=namespace.check,
        print_config=namespace.print_config,
        local_rank=namespace.local_rank,
    )


def load_config(*sources: str, **overrides: Any) -> Config:
    """The Config of recipes or YAML files in order, with `section__key=value` overrides (Python API, tests)."""
    arguments = [part for source in sources for part in ("--config", source)]
    for name, value in overrides.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).split("\n")[0]
        arguments += [f"--{name.replace('__', '.')}", text]
    return parse_command_line([*arguments, "--deepspeed", "unused"]).config


def to_yaml(config: Config) -> str:
    """The whole resolved configuration; `--config` reads it back to an equal one. The section joint, longer than all
    others, is there where it says something."""
    tree = _plain(dataclasses.asdict(config))
    if config.joint == JointConfig():
        del tree["joint"]
    return yaml.safe_dump(tree, sort_keys=False, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_one_line(message))


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog="launch/pretrain.py",
        usage=USAGE,
        allow_abbrev=False,
        exit_on_error=False,
        description=(
            "Pretrain a data2vec encoder. Start it with deepspeed, torchrun, srun, mpirun, or python for one process. "
            f"Recipes: {', '.join(sorted(recipes()))}."
        ),
    )
    parser.add_argument("--deepspeed", default=None, metavar="JSON", help="DeepSpeed configuration, as in ds_configs/")
    parser.add_argument(
        "--config",
        action="config",
        metavar="RECIPE_OR_YAML",
        help=f"a recipe's name or a YAML file; may be repeated, later ones win (default: {DEFAULT_RECIPE})",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--check", action="store_true", help="one step, one save, one load, peak memory; then remove what was written"
    )
    parser.add_argument("--local_rank", type=int | None, default=None, help="set by the deepspeed launcher")
    parser.add_class_arguments(Config)
    return parser


def _with_recipe_paths(arguments: list[str]) -> list[str]:
    """Split --config=X, replace recipe names by their files, and put all of them before the flags, which win over them
    wherever they stand. The default recipe where none is named."""
    known = recipes()
    configs: list[str] = []
    rest: list[str] = []
    words = iter(w for a in arguments for w in (a.split("=", 1) if a.startswith("--config=") else [a]))
    for word in words:
        value = next(words, None) if word == "--config" else None
        if value is None:
            rest.append(word)
        elif value in known:
            configs += [word, str(known[value])]
        elif Path(value).is_file():
            configs += [word, value]
        else:
            hint = _hint(value, known)
            raise UserError(f"--config {value}: neither a file nor a recipe ({', '.join(sorted(known))}){hint}")
    return [*(configs or ["--config", str(known[DEFAULT_RECIPE])]), *rest]


def known_keys(section: type = Config, prefix: str = "") -> Iterator[str]:
    """Dotted path of every leaf and section of the configuration."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from known_keys(hints[field.name], f"{prefix}{field.name}.")


def _refuse_unknown_flags(arguments: Sequence[str]) -> None:
    flags = {"deepspeed", "config", "print-config", "check", "local_rank", "help"} | set(known_keys())
    for argument in arguments:
        flag = argument.removeprefix("--").split("=")[0]
        if argument.startswith("--") and flag not in flags and not flag.startswith(("data.shards.", "data.valid.")):
            raise UserError(f"--{flag}: unknown key{_hint(flag, flags)}")


def _refuse_unknown_keys(source: str) -> None:
    known = set(known_keys())
    sections = {key.rpartition(".")[0] for key in known if "." in key}
    try:
        tree = yaml.safe_load(Path(source).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {source}: not readable as YAML: {_one_line(str(error))}") from None
    if not isinstance(tree, dict):
        got = "an empty file" if tree is None else type(tree).__name__
        raise UserError(f"--config {source}: expected sections such as model: or train:, got {got}")

    def check(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            path = f"{prefix}{key}"
            if path in RETIRED:
                raise UserError(f"{path}: is gone, model.init has taken its place; delete it from {source}")
            if path not in known:
                raise UserError(f"{path}: unknown key in {source}{_hint(path, known)}")
            if path in sections:
                if not isinstance(value, dict):
                    raise UserError(f"{path}: expected keys and values in {source}, got {value!r}")
                check(value, f"{path}.")

    check(tree, "")


def _hint(key: str, known: Iterable[str]) -> str:
    close = nearest(key, known)
    return f"; did you mean {close}?" if close else "; --help lists all keys"


_TYPE = re.compile(r"<class '([\w.]+)'>")


def _one_line(message: str) -> str:
    text = _TYPE.sub(r"\1", " ".join(message.split()))
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", text)
    wrong_mix = re.match(r"(data\.mix: ).*?Errors: - (.*?) - Expected a NoneType", text)
    if wrong_mix is not None:
        return f"{wrong_mix[1]}expected NAME: {{shards: PATTERN, weight: NUMBER}} ({wrong_mix[2]})"
    with contextlib.suppress(ValueError):
        text = text[: text.index(" Traceback")]
    return text

"""From a plain tree (JSON of a checkpoint's index, YAML) back to the frozen dataclasses, without any library."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from megad2v.config.schema import Config
from megad2v.errors import UserError

T = TypeVar("T")

RETIRED: dict[str, Any] = {"vision.token_init_mean": 0.02, "vision.token_init_std": 1.0}
"""Keys that `model.init` has replaced, with the values that its default, fairseq, stands for. Checkpoints of old runs
have them: they are passed over at these values, and refused at others. In a file that a person can edit they are
refused with what to do."""


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """The Config that `dataclasses.asdict` turned into `tree`, also after a trip through JSON (tuples as lists).

    Keys that are absent take their defaults, so that a tree written before a key existed still loads.
    Raises UserError for unknown keys (with the nearest known one) and for values of another type.
    """
    return _dataclass(Config, tree, "")


def _is_retired(key: str, value: Any) -> bool:
    """Whether `key` is one that is gone, at the value that is still what happens. Raises UserError at another one."""
    if key not in RETIRED:
        return False
    if value != RETIRED[key]:
        raise UserError(f"{key}: is gone, {value} with it; see model.init, whose fairseq means {RETIRED[key]}")
    return True


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key that a mistyped one may have meant: by spelling, else one that ends alike (lr -> optimizer.lr)."""
    known = sorted(known)
    leaf = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    close += [candidate for candidate in known if candidate.rpartition(".")[2] == leaf]
    return close[0] if close else None


def _dataclass(kind: type[T], tree: Any, path: str) -> T:
    if not isinstance(tree, Mapping):
        raise UserError(f"{path or 'configuration'}: expected keys and values, got {tree!r}")
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key, value in tree.items():
        if key not in names and not _is_retired(_join(path, key), value):
            near = nearest(str(key), names)
            known = f"did you mean {_join(path, near)}?" if near else f"known here: {', '.join(names)}"
            raise UserError(f"{_join(path, key)}: unknown key; {known}")
    return kind(**{name: _value(hints[name], tree[name], _join(path, name)) for name in names if name in tree})


def _value(hint: Any, value: Any, path: str) -> Any:
    """`value` as `hint` wants it. Raises UserError when it cannot be that."""
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, path)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, path)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{path}: expected one of {', '.join(map(str, arguments))}, got {value!r}")
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise UserError(f"{path}: expected {len(kinds)} values, got {len(value)}")
        return tuple(_value(kind, item, path) for kind, item in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {_value(arguments[0], key, path): _value(arguments[1], item, path) for key, item in value.items()}
    # JSON and YAML write 1.0 as 1; bool is an int to Python and to nobody else.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{path}: expected {_name(hint)}, got {value!r}")


def _one_of(hints: Sequence[Any], value: Any, path: str) -> Any:
    errors = []
    for hint in hints:
        try:
            return _value(hint, value, path)
        except UserError as error:
            errors.append(error)
    if len([hint for hint in hints if hint is not types.NoneType]) == 1:  # the other one's complaint is the useful one
        raise errors[0]
    raise UserError(f"{path}: expected {' or '.join(_name(hint) for hint in hints)}, got {value!r}")


def _name(hint: Any) -> str:
    if hint is types.NoneType:
        return "null"
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)

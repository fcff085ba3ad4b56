"""Where a run came from, as far as it can be found: the recipe nearest to its configuration, and its data's counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import yaml

from megad2v.config.load import recipes
from megad2v.config.schema import Config
from megad2v.config.tree import config_from_dict
from megad2v.data.format import read_dataset
from megad2v.data.shardset import pattern_of, resolve
from megad2v.errors import UserError

TRAIN_KEYS = ("steps", "micro_batches_per_step", "seed")
SHOWN = 8
"""Keys that are named; beyond that many a run is rather its own recipe."""
OF_THE_MACHINE = ("text.tokenizer", "text.vocabulary")


def recipe_of(config: Config, sections: Sequence[str]) -> str:
    """The shipped recipe of that modality from which fewest keys of `sections` and TRAIN_KEYS differ, and which."""
    ours = _leaves(config, sections)
    found: list[tuple[int, str, dict[str, Any]]] = []
    for name, path in sorted(recipes().items()):
        recipe = config_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        if recipe.modality == config.modality:
            theirs = _leaves(recipe, sections)
            changed = {key: value for key, value in ours.items() if theirs[key] != value}
            found.append((len(changed), name, changed))
    count, name, changed = min(found, key=lambda row: row[:2])
    if not changed:
        return f"`{name}`"
    if count > SHOWN:
        return f"its own; {count} keys differ from `{name}`, the nearest"
    return f"`{name}` with " + ", ".join(f"`{key}` {value}" for key, value in changed.items())


def _leaves(config: Config, sections: Sequence[str]) -> dict[str, Any]:
    tree = dataclasses.asdict(config)
    leaves = {f"train.{key}": tree["train"][key] for key in TRAIN_KEYS}
    for section in sections:
        leaves |= _flat(tree[section], section)
    leaves |= _flat(tree["data"]["micro_batch"], "data.micro_batch")
    return {key: value for key, value in leaves.items() if key not in OF_THE_MACHINE}


def _flat(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """Values by their whole keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{where}.{key}") if isinstance(value, dict) else {f"{where}.{key}": value}
    return found


def data_counts(config: Config) -> str:
    """What dataset.json beside the run's shards says: samples, and hours or tokens; "" where it cannot be found any
    more. No path is named."""
    mix = config.data.mix
    patterns: list[tuple[str, Any]] = [("", config.data.shards)]
    if mix is not None:
        patterns = [(f"{name}: ", part.shards) for name, part in mix.items()]
    parts = [(name, _counts(pattern, config.modality)) for name, pattern in patterns]
    return "; ".join(f"{name}{counts}" for name, counts in parts if counts)


def _counts(shards: Any, modality: str) -> str:
    try:
        paths = resolve(pattern_of(shards, "data.shards", modality))
        folders = sorted({path.parent for path in paths})
        infos = [read_dataset(folder) for folder in folders]
    except (UserError, OSError):
        return ""
    samples, totals, names = 0, {}, {path.name for path in paths}
    for info in infos:
        if info is None:
            return ""
        samples += sum(shard.samples for shard in info.shards if shard.name in names)
        if {shard.name for shard in info.shards} <= names:  # of a part it does not say
            for name, amount in info.totals.items():
                totals[name] = totals.get(name, 0.0) + amount
    found = [f"{samples:,} samples", *(f"{_amount(amount)} {name}" for name, amount in totals.items())]
    return ", ".join([*found, f"{len(paths):,} shards"])


def _amount(amount: float) -> str:
    return f"{amount:,.0f}" if amount == int(amount) else f"{amount:,.2f}"

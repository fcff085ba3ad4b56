"""What people may want to know of a checkpoint, as facts (plain JSON) and as lines."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megad2v.checkpoint.catalog import damage, run_of, step_directory, steps_present
from megad2v.checkpoint.layout import INDEX, KINDS, Index
from megad2v.config.parts import JOINT, MODALITIES
from megad2v.errors import UserError
from megad2v.modalities.build import part_of

OWNERS = ("shared", *MODALITIES)
"""Whose parameters of a joint model are, in the order that they are told in."""


@dataclass(frozen=True)
class Description:
    """`facts` and `lines` say the same; `valid`: no damage was found (in a run: in one checkpoint at least)."""

    facts: dict[str, Any]
    lines: list[str]
    valid: bool


def describe_checkpoint(directory: Path, *, verify: bool) -> Description:
    """Step, layout, sizes, parameters and validity of one. Raises UserError where its index cannot be read."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder")
    index = Index.load(directory / INDEX)
    problem = damage(directory, checksums=verify)
    kinds = _kinds(index)
    facts = {
        "directory": str(directory),
        "step": index.step,
        "damage": problem,
        "verified": verify,
        "modality": index.config.get("modality"),
        "modalities": _modalities(index),
        "layout": index.layout,
        "code": index.code,
        "state": index.state,
        "files": len(index.files),
        "bytes": sum(record.bytes for record in index.files) + sum(record.bytes for record in index.extras),
        "values": {kind: sum(sizes.values()) for kind, sizes in kinds.items()},
        "extras": [record.file for record in index.extras],
        "parameters": {
            name: {"shape": shape, "kinds": [kind for kind in KINDS if name in kinds[kind]]}
            for name, shape in index.shapes.items()
        },
        "incomplete": _incomplete(index, kinds),
    }
    return Description(facts, _checkpoint_lines(facts), problem is None and not facts["incomplete"])


def describe_run(path: Path, *, verify: bool) -> Description:
    """All checkpoints of a run, newest first, and the one that train.resume=auto would take. Raises UserError where
    there is none."""
    run = run_of(path)
    steps = steps_present(run)
    if not steps:
        raise UserError(f"{path}: no checkpoint here; give a run directory or one of its checkpoints/step_XXXXXXXX")
    rows = []
    for step in reversed(steps):
        directory = step_directory(run, step)
        row = {"step": step, "bytes": _bytes(directory), "damage": damage(directory, checksums=verify)}
        if directory.is_dir():  # else the run has deleted it meanwhile
            rows.append(row)
    resume = next((row["step"] for row in rows if row["damage"] is None), None)
    aside = sorted(child.name for child in (run / "checkpoints").iterdir() if child.name.startswith("passed_over_"))
    latest = run / "checkpoints" / "latest"
    facts = {
        "run": str(run),
        "verified": verify,
        "latest": _text(latest),
        "resume": resume,
        "checkpoints": rows,
        "passed_over": aside,
    }
    sound = "valid" if verify else "whole"
    lines = [f"{run}: {len(rows)} checkpoints, latest {facts['latest']}" + ("" if verify else " (not verified)")]
    lines += [f"  step {row['step']:>8,}  {_size(row['bytes']):>10}  {row['damage'] or sound}" for row in rows]
    lines += [f"  {name}: put aside when a run went on from an older one" for name in aside]
    lines.append("none of them can be resumed from" if resume is None else f"train.resume auto takes step {resume:,}")
    return Description(facts, lines, resume is not None)


def _bytes(directory: Path) -> int:
    """Of all its files. A run may be deleting them."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for file in directory.rglob("*"):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None


def _kinds(index: Index) -> dict[str, dict[str, int]]:
    """Values by kind and parameter."""
    held: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    for record in index.files:
        for kinds, name, _, length in record.fragments:
            for kind in kinds:
                held[kind][name] = held[kind].get(name, 0) + length
    return held


def _modalities(index: Index) -> dict[str, int]:
    """Values of a joint model by whose they are; {} for any other."""
    sizes: dict[str, int] = {}
    for name, shape in index.shapes.items() if index.config.get("modality") == JOINT else ():
        owner = part_of(name) or "shared"
        sizes[owner] = sizes.get(owner, 0) + math.prod(shape)
    return sizes


def _incomplete(index: Index, kinds: dict[str, dict[str, int]]) -> list[str]:
    """Tensors of which not each value is there once: "KIND NAME"."""
    return [
        f"{kind} {name}"
        for kind, sizes in kinds.items()
        for name, held in sizes.items()
        if held != math.prod(index.shapes[name])
    ]


def _checkpoint_lines(facts: dict[str, Any]) -> list[str]:
    state = "valid" if facts["verified"] else "whole (not verified)"
    whose = ", ".join(f"{name} {facts['modalities'][name]:,}" for name in OWNERS if name in facts["modalities"])
    lines = [
        f"{facts['directory']}: step {facts['step']:,}, {facts['damage'] or state}",
        f"model {facts['modality']}" + (f": {whose} values" if whose else ""),
        f"written by {', '.join(f'{key} {value}' for key, value in facts['layout'].items())}; any layout reads it",
        f"code {', '.join(f'{key} {value}' for key, value in facts['code'].items())}",
        f"{facts['files']} files, {_size(facts['bytes'])}: "
        + ", ".join(f"{kind} {count:,}" for kind, count in facts["values"].items() if count)
        + " values",
    ]
    if facts["extras"]:
        lines.append(f"with {', '.join(facts['extras'])}")
    lines += [f"INCOMPLETE: {name}" for name in facts["incomplete"]]
    width = max((len(name) for name in facts["parameters"]), default=0)
    for name, row in facts["parameters"].items():
        shape = " x ".join(map(str, row["shape"])) or "scalar"
        lines.append(f"  {name:<{width}}  {shape:<16}  {' '.join(row['kinds']) or 'nothing'}")
    return lines


def _size(count: int) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"

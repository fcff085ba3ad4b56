"""The checkpoints of a run: which are there, which is the newest valid one, which are deleted."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megad2v.checkpoint.reader import Checkpoint
from megad2v.errors import UserError

_STEP = re.compile(r"step_(\d{8})")


def step_directory(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in run directory `run`."""
    return run / "checkpoints" / f"step_{step:08d}"


def steps_present(run: Path) -> list[int]:
    """Steps that have a committed checkpoint, valid or not, ascending."""
    found = (_STEP.fullmatch(path.name) for path in (run / "checkpoints").glob("step_*") if path.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums hold, and why newer ones were passed over."""
    reasons = []
    for step in reversed(steps_present(run)):
        directory = step_directory(run, step)
        try:
            Checkpoint(directory).verify()
        except UserError as error:
            reasons.append(str(error))
        else:
            return directory, reasons
    return None, reasons


def set_aside_later(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints beyond `step`, which a run that goes on from there has passed over or will write anew, to
    passed_over_step_X. They are nobody's newest then, nor do they push younger ones out of `prune`; people delete them.
    """
    moved = []
    for later in (found for found in steps_present(run) if found > step):
        directory = step_directory(run, later)
        number = 0
        while (
            aside := directory.with_name(f"passed_over_{directory.name}" + (f"_{number}" if number else ""))
        ).exists():
            number += 1
        moved.append(directory.rename(aside))
    return moved


def prune(run: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints; 0 keeps all. Called after a new one was committed."""
    if keep_last > 0:
        for step in steps_present(run)[:-keep_last]:
            shutil.rmtree(step_directory(run, step))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a person means: a step directory itself, or the newest valid one of a run directory.

    Raises UserError where there is none.
    """
    if (path / "index.json").exists() or _STEP.fullmatch(path.name):
        return path
    run = path.parent if path.name == "checkpoints" else path
    directory, reasons = newest_valid(run)
    if directory is None:
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise UserError(
            f"{path}: no checkpoint here{why}; give a run directory or one of its checkpoints/step_XXXXXXXX"
        )
    return directory

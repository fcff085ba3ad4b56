"""The checkpoints of a run: which are there, which is the newest valid one, which are deleted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megad2v.checkpoint.layout import INDEX, Index
from megad2v.checkpoint.writer import REPLACED, WRITING
from megad2v.engine.distributed import broadcast_text, together
from megad2v.errors import UserError
from megad2v.files import sync_directory, write_file

DELETING = ".deleting_"
_STEP = re.compile(r"step_(\d{8})")


def step_directory(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in run directory `run`."""
    return run / "checkpoints" / f"step_{step:08d}"


def steps_present(run: Path) -> list[int]:
    """Steps that have a committed checkpoint, valid or not, ascending."""
    found = (_STEP.fullmatch(path.name) for path in (run / "checkpoints").glob("step_*") if path.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums hold, and why newer ones were passed over. For one process."""
    reasons = []
    for step in reversed(steps_present(run)):
        directory = step_directory(run, step)
        problem = damage(directory)
        if problem is None:
            return directory, reasons
        reasons.append(problem)
    return None, reasons


def damage(directory: Path, *, checksums: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """The first thing that is wrong with a checkpoint, None where nothing is; of every n-th file from i alone where
    `share` is (i, n). Without `checksums` only index and sizes are looked at."""
    try:
        return next(Index.load(directory / INDEX).problems(directory, checksums=checksums, share=share), None)
    except (UserError, OSError) as error:
        return str(error)


def damage_by_all(directory: Path) -> str | None:
    """`damage` with the files shared out over all ranks: the same answer on each. Collective: every rank reads its
    share, then one small gather to rank 0 and two broadcasts."""
    share = (dist.get_rank(), dist.get_world_size())
    found = together(lambda: damage(directory, share=share), errors=(), raises=RuntimeError)
    problems = list(dict.fromkeys(problem for problem in found if problem))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return broadcast_text(problems[0] + more if problems else "") or None


def newest_valid_by_all(run: Path, steps: Sequence[int] | None = None) -> tuple[Path | None, list[str]]:
    """`newest_valid`, of all or of the main rank's `steps` (ascending), with each checkpoint's files shared out over
    all ranks: the same answer on each. Collective: one broadcast of the main rank's list, then `damage_by_all` for each
    checkpoint until one holds."""
    reasons = []
    listed = json.dumps((steps_present(run) if steps is None else steps) if dist.get_rank() == 0 else [])
    for step in reversed(json.loads(broadcast_text(listed))):
        directory = step_directory(run, step)
        problem = damage_by_all(directory)
        if problem is None:
            return directory, reasons
        reasons.append(problem)
    return None, reasons


def recover(run: Path) -> list[str]:
    """Clear up behind a run that was killed; what was done, for people. Only for who holds the run's lock.

    A step that was being written over comes back where the kill fell between the two renames of its replacement.
    Folders of checkpoints that were never committed, or of which a part is deleted, go.
    """
    done, folder = [], run / "checkpoints"
    for old in sorted(folder.glob(f"{REPLACED}*")):
        directory = folder / old.name.removeprefix(REPLACED)
        if not directory.exists():
            old.rename(directory)
            done.append(f"took back {directory}: its replacement was not committed")
    for prefix in (WRITING, REPLACED, DELETING):
        for left in sorted(folder.glob(f"{prefix}*")):
            shutil.rmtree(left)
            if prefix == WRITING:
                done.append(f"removed {left}: it was never committed")
    point_to_latest(run)  # a kill between the rename and this leaves nothing else to see
    return done


def point_to_latest(run: Path) -> None:
    """Make `latest` name the newest checkpoint that is there, after others were put aside or taken back."""
    latest, steps = run / "checkpoints" / "latest", steps_present(run)
    if steps:
        text = step_directory(run, steps[-1]).name + "\n"
        if not latest.exists() or latest.read_bytes() != text.encode():
            write_file(latest, text)
            sync_directory(latest.parent)
    else:
        latest.unlink(missing_ok=True)


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
    if moved:
        point_to_latest(run)
    return moved


def prune(run: Path, keep_last: int, keep_every: int = 0, *, spare: Path | None = None) -> None:
    """Delete all but the newest `keep_last` checkpoints (0 keeps all), those at multiples of `keep_every` steps, and
    `spare`, which somebody wants to start from again.

    Called by the main rank after a new one was committed: that one is valid, so the last valid one is never deleted.

    Of the others only those whose index and sizes are right count as kept; a damaged one is left for people to look
    at. One that goes is renamed first: half a checkpoint never stands under its name. Raises OSError.
    """
    if keep_last <= 0:
        return
    steps, spared = steps_present(run), spare.resolve() if spare is not None else None
    whole = 0
    for step in reversed(steps if len(steps) > keep_last else []):
        directory = step_directory(run, step)
        if whole < keep_last:
            whole += damage(directory, checksums=False) is None
        elif not (keep_every and step % keep_every == 0) and directory.resolve() != spared:
            doomed = directory.rename(directory.with_name(f"{DELETING}{directory.name}"))
            shutil.rmtree(doomed)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a person means: a step directory itself, or the newest valid one of a run directory.

    Raises UserError where there is none. For one process; a step directory is not verified.
    """
    if is_step(path):
        return path
    directory, reasons = newest_valid(run_of(path))
    return directory or _none_here(path, reasons)


def find_checkpoint_by_all(path: Path) -> Path:
    """The same, verified, with the files shared out over all ranks. Collective, as `newest_valid_by_all`."""
    if broadcast_text("a step" if dist.get_rank() == 0 and is_step(path) else ""):
        problem = damage_by_all(path)
        if problem is not None:
            raise UserError(f"{problem}; use an older checkpoint")
        return path
    directory, reasons = newest_valid_by_all(run_of(path))
    return directory or _none_here(path, reasons)


def is_step(path: Path) -> bool:
    """Whether `path` is, or is called like, one checkpoint."""
    return (path / INDEX).exists() or _STEP.fullmatch(path.name) is not None


def run_of(path: Path) -> Path:
    """The run directory that `path` means: itself, or what its folder checkpoints/ lies in."""
    return path.parent if path.name == "checkpoints" else path


def _none_here(path: Path, reasons: list[str]) -> NoReturn:
    why = f" ({'; '.join(reasons)})" if reasons else ""
    raise UserError(f"{path}: no checkpoint here{why}; give a run directory or one of its checkpoints/step_XXXXXXXX")

"""How generated corpora are written: by several processes, into a folder that appears only when it is complete."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

from megad2v.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def write_demo(folder: Path, names: Collection[str], fill: Callable[[Path], None], *, overwrite: bool) -> None:
    """Let `fill` write into an empty folder, and move that to `folder`. `names` are the entries that it makes there.

    Raises UserError when the folder exists (with `overwrite`: when it holds anything else) or cannot be written.
    """
    if folder.exists():
        foreign = not folder.is_dir() or any(path.name not in names for path in folder.iterdir())
        if foreign or not overwrite:
            raise UserError(f"{folder}: is there already; give another OUT{'' if foreign else ', or --overwrite'}")
    aside = folder.with_name(f".{folder.name}.making")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        fill(aside)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); give another OUT") from error


def in_processes(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> list[Result]:
    """The results in the order of the jobs."""
    # Ctrl-C reaches all processes; without this each of them would print a traceback.
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        return list(pool.map(function, jobs))

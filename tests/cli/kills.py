"""A run that is killed again and again at seeded moments, and what each kill left behind.

Used by tests/cli/test_kills.py (five kills) and benchmarks/kills.py (as many as one likes).
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megad2v.checkpoint.catalog import steps_present
from tests.cli.live_run import LiveRun, last_step

MOMENTS = ("start-up", "step", "while data are written", "between data and manifest", "between rename and latest")
RANKS = 2
PATIENCE_S = 300.0
"""For a start-up; the machine may be busy."""


@dataclass(frozen=True)
class Kill:
    """One kill -9: what is waited for, how much longer, and who is killed."""

    moment: str
    skip: int
    """Steps, or checkpoints, to let pass."""
    delay: float
    """Seconds after that (none at the moments that are over in a millisecond)."""
    ranks: tuple[int, ...]


def draw(seed: int, number: int) -> Kill:
    """A pure function of its arguments. The moments take turns, so that each has its share."""
    rng = random.Random(f"{seed}/{number}")
    moment = MOMENTS[(number + seed) % len(MOMENTS)]
    skip, ranks = rng.randint(0, 4), rng.choice([(0,), (1,), (0, 1)])
    delay = rng.uniform(0.0, 6.0) if moment == "start-up" else rng.uniform(0.0, 0.15)
    return Kill(moment, skip, delay, ranks)


@dataclass
class Outcome:
    """What one kill hit and cost."""

    kill: Kill
    logged: int = 0
    """Last step in metrics.jsonl when all ranks were gone."""
    committed: int = 0
    """Newest committed checkpoint then; 0: none."""
    unfinished: str = ""
    """What lay in a folder that was being written: "", "part of the data", "data" (of all ranks), "data and
    manifest"."""
    latest_behind: bool = False
    """A checkpoint was committed, and `latest` still named an older one."""
    codes: list[int] = field(default_factory=list)
    seconds_to_end: float = 0.0
    """From the kill until all ranks were gone."""
    resumed: int = 0
    """Step that the next start resumed from."""
    passed_over: int = 0
    """Checkpoints that the next start did not accept."""

    def line(self) -> dict[str, Any]:
        """For a .jsonl file."""
        fields = asdict(self)
        return {**fields.pop("kill"), **fields, "lost_steps": self.logged - self.resumed}


def killed_run(flags: list[str], kills: Iterable[Kill], logs: Path) -> Iterator[Outcome]:
    """Start, kill, start again, kill, ...; at last let the run end. Yields a kill once a later start has shown where
    it goes on from: one that is killed before that tells nothing. AssertionError where a start ends by itself, or the
    last one with another exit code than 0."""
    untold: list[Outcome] = []
    for number, kill in enumerate([*kills, None]):
        with LiveRun(flags, ranks=RANKS, logs=logs / f"{number:03d}") as run:
            outcome = _kill(run, kill) if kill is not None else None
            if outcome is None:
                assert run.wait(300) == [0] * RANKS, run.log()
            said = run.log()
        found = re.search(r"resumed from \S+ \(step (\d+)\)", said)
        if found or outcome is None or "\nstep " in said:  # else it was killed too early to tell
            for before in untold:
                before.resumed = int(found[1]) if found else 0
                before.passed_over = said.count("passed over a checkpoint")
            yield from untold
            untold = []
        if outcome is not None:
            untold.append(outcome)


def _kill(run: LiveRun, kill: Kill) -> Outcome:
    """Wait for the moment, kill, look at what is left."""
    _await(run, kill)
    began = time.monotonic()
    for rank in kill.ranks:
        run.processes[rank].send_signal(signal.SIGKILL)  # not its data workers: they have to find out
    run.end_as_launchers_do()
    codes = run.wait(60)
    outcome = Outcome(kill, codes=codes, seconds_to_end=round(time.monotonic() - began, 2))
    outcome.logged, outcome.committed = last_step(run.output), max(steps_present(run.output), default=0)
    outcome.latest_behind = _latest_behind(run.output)
    checkpoints = run.output / "checkpoints"
    whole, sizes = _whole_sizes(checkpoints), _sizes(checkpoints, run.started)
    if sizes:
        manifest = any(path.stat().st_mtime >= run.started for path in checkpoints.glob(".writing_*/index.json"))
        data = len(sizes) == RANKS and all(size in (whole or sizes) for size in sizes)
        outcome.unfinished = "data and manifest" if manifest else "data" if data else "part of the data"
    return outcome


def _await(run: LiveRun, kill: Kill) -> None:
    """Return when it is time to kill."""
    checkpoints = run.output / "checkpoints"
    if kill.moment == "start-up":
        time.sleep(kill.delay)
        return
    run.until(lambda: "\nstep " in run.log(), PATIENCE_S)  # this life's first step
    start, newest = last_step(run.output), max(steps_present(run.output), default=0)
    if kill.moment == "step":
        run.until(lambda: last_step(run.output) > start + kill.skip, PATIENCE_S)
        time.sleep(kill.delay)
        return
    run.until(lambda: sum(step > newest for step in steps_present(run.output)) >= kill.skip % 2, PATIENCE_S)
    whole = _whole_sizes(checkpoints)

    def written() -> int:
        sizes = _sizes(checkpoints, run.started)
        return sum(size in (whole or sizes) for size in sizes)

    moments: dict[str, Callable[[], bool]] = {
        "while data are written": lambda: bool(_sizes(checkpoints, run.started)),
        "between data and manifest": lambda: written() == RANKS,
        "between rename and latest": lambda: _latest_behind(run.output),
    }
    happened, deadline = moments[kill.moment], time.monotonic() + 30
    while not happened() and time.monotonic() < deadline:  # missed: then it is a kill at a step
        if any(process.poll() is not None for process in run.processes):
            raise AssertionError(f"ended by itself:\n{run.log()}")


def _whole_sizes(checkpoints: Path) -> list[int]:
    """Of the data files of a committed checkpoint; they are the same in all of one run."""
    return [path.stat().st_size for path in sorted(checkpoints.glob("step_*/rank*.safetensors"))[-RANKS:]]


def _sizes(checkpoints: Path, since: float) -> list[int]:
    """Of the data files in folders that are being written, without those that a kill before `since` left."""
    sizes = []
    for path in checkpoints.glob(".writing_*/rank*.safetensors"):
        try:
            found = path.stat()
        except OSError:  # committed in between
            continue
        if found.st_size > 0 and found.st_mtime >= since:
            sizes.append(found.st_size)
    return sizes


def _latest_behind(output: Path) -> bool:
    newest, latest = max(steps_present(output), default=0), output / "checkpoints" / "latest"
    try:
        return newest > 0 and latest.read_text().strip() != f"step_{newest:08d}"
    except OSError:
        return newest > 0

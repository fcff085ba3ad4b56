"""What the watchdog knows of each rank, and what it makes of it. Nothing here talks to anybody."""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

SHOWN_SAMPLES = 32
"""Sample ids that a report carries; of larger micro-batches the rest is counted."""
MISSED_BEATS = 3
PATIENCE, LEAST_PATIENT_S = 3.0, 600.0
"""Start-up, a first step (compilation, workers) and checkpoints may stand still for PATIENCE times the limit, and at
least LEAST_PATIENT_S: how long they take has nothing to do with how long a step may take."""
NO_LIMIT_S = 1800.0
"""Limit of exchanges over gloo where train.hang_timeout is 0: torch's own."""


def longest_silence(limit: float) -> float:
    """Seconds that a collective may wait while train.hang_timeout is `limit`: longer than the watchdog ever does, so
    that it speaks first. It knows who did not arrive; a process group that runs out of time ends those that did."""
    return max(PATIENCE * limit, LEAST_PATIENT_S) + 60.0


def exchange_limit(limit: float) -> timedelta:
    """How long small exchanges over gloo, beside the training's own collectives, may wait; `limit` is
    train.hang_timeout."""
    return timedelta(seconds=longest_silence(limit) if limit > 0 else NO_LIMIT_S)


class Place(NamedTuple):
    """Where the main thread of a rank stands. (step, count) orders places: ranks pass the same ones in the same
    order."""

    step: int = 0
    count: int = 0
    """Places passed since the step began."""
    phase: str = "start-up"
    module: str = ""
    samples: tuple[str, ...] = ()
    patient: bool = True

    def describe(self) -> str:
        """In words."""
        parts = [f"step {self.step}", self.phase, *([self.module] if self.module else [])]
        if self.samples:
            parts.append(f"samples {' '.join(self.samples)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Report:
    """The last that was heard of a rank. Times are seconds of the listener's clock."""

    place: Place
    moved: float
    """When its main thread got there."""
    arrived: float
    """When it said so."""
    who: str
    """"host h, process p"."""


@dataclass(frozen=True)
class Verdict:
    """Why the run ends. `code` is the exit code of every rank."""

    message: str
    culprits: tuple[int, ...] = ()
    code: int = 1


def ranks_in_words(ranks: tuple[int, ...] | list[int]) -> str:
    """ "rank 3", "ranks 0, 2, 3"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def seen_last(ranks: tuple[int, ...], reports: Mapping[int, Report]) -> str:
    """Where each of `ranks` was when it was last heard of."""
    return "; ".join(
        f"rank {rank} ({reports[rank].who}) was last seen at {reports[rank].place.describe()}" for rank in ranks
    )


def judge(reports: Mapping[int, Report], now: float, limit: float, tick: float) -> Verdict | None:
    """What is wrong, from what all ranks last said; None while nothing is.

    A rank is silent when it has said nothing for `limit`: its process is stopped, or its node or its network is gone.
    The run hangs when all ranks speak but none of them has moved for `limit`; then those with the smallest place did
    not arrive where the others wait. A rank that has missed several of its beats (one a `tick`) in a run that hangs
    is counted as silent: it may have been stopped in the very place where the others wait.
    """
    if not reports:
        return None
    verdict = silent(reports, now, limit)
    if verdict is not None:
        return verdict
    behind = min(report.place[:2] for report in reports.values())
    laggards = tuple(rank for rank, report in reports.items() if report.place[:2] == behind)
    if any(reports[rank].place.patient for rank in laggards):
        limit = max(PATIENCE * limit, LEAST_PATIENT_S)
    if now - max(report.moved for report in reports.values()) < limit:
        return None
    return silent(reports, now, MISSED_BEATS * tick) or _hanging(reports, laggards, limit)


def silent(reports: Mapping[int, Report], now: float, limit: float) -> Verdict | None:
    """The verdict on the ranks that have said nothing for `limit`, if there are any."""
    lost = tuple(rank for rank, report in reports.items() if now - report.arrived >= limit)
    if not lost:
        return None
    others = [rank for rank in reports if rank not in lost]
    return Verdict(
        f"{ranks_in_words(lost)} gave no sign of life for {now - max(reports[r].arrived for r in lost):.1f} s "
        f"(stopped, or its node or network is lost): {seen_last(lost, reports)}"
        + (f"; the furthest of the others is at {_furthest(others, reports)}" if others else ""),
        lost,
    )


def _hanging(reports: Mapping[int, Report], laggards: tuple[int, ...], limit: float) -> Verdict:
    if len(laggards) < len(reports):
        others = [rank for rank in reports if rank not in laggards]
        return Verdict(
            f"no rank has moved for {limit:g} s; {ranks_in_words(laggards)} did not arrive: "
            f"{seen_last(laggards, reports)}; the furthest of the others is at {_furthest(others, reports)}",
            laggards,
        )
    place = next(iter(reports.values())).place.describe()
    if len(reports) == 1:
        return Verdict(f"no progress for {limit:g} s: rank 0 is at {place}", laggards)
    return Verdict(f"no rank has moved for {limit:g} s, and none is behind the others; rank 0 is at {place}")


def _furthest(ranks: list[int], reports: Mapping[int, Report]) -> str:
    return max((reports[rank].place for rank in ranks), key=lambda place: place[:2]).describe()


def ended(dead: list[int], failures: list[tuple[int, str, int]], reports: Mapping[int, Report]) -> Verdict:
    """`dead`: ranks whose process is gone without a word; `failures`: (rank, message, exit code), in order of arrival.

    A lost process comes first: the errors of the others are then about the connections that broke with it.
    """
    if dead:
        return Verdict(
            f"{ranks_in_words(dead)} ended without a word (killed?): {seen_last(tuple(sorted(dead)), reports)}",
            tuple(sorted(dead)),
        )
    _, message, code = failures[0]
    alike = tuple(sorted({rank for rank, said, _ in failures if said == message}))
    later = sorted({rank for rank, said, _ in failures if said != message})
    where = f" (at {reports[alike[0]].place.describe()})" if len(alike) == 1 and alike[0] in reports else ""
    more = f"; {ranks_in_words(later)} failed after it" if later else ""
    return Verdict(f"{ranks_in_words(alike)} failed{where}: {message}{more}", alike, code)


def write_dump(path: Path, verdict: Verdict, rank: int, place: Place, details: str | None) -> str | None:
    """Write this rank's file: verdict, own place, `details` (a traceback), stacks of all threads.

    Returns what went wrong with it, if anything did: nothing may keep a rank from leaving.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {verdict.message}\n\n")
            for name, value in _own(rank, place).items():
                file.write(f"{name}: {value}\n")
            if details:
                file.write(f"\n{details.rstrip()}\n")
            file.write("\nstacks of all threads, most recent call first:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        return str(error)
    return None


def _own(rank: int, place: Place) -> dict[str, Any]:
    return {
        "rank": rank,
        "step": place.step,
        "phase": place.phase,
        "module": place.module or "-",
        "samples": " ".join(place.samples) or "-",
        "python": sys.version.split()[0],
    }


def set_aside(folder: Path) -> None:
    """Rename the files of an earlier alarm (to hang.1, hang.2, ...), so that they do not mix with those of the next."""
    if folder.is_dir():
        number = 1
        while folder.with_name(f"{folder.name}.{number}").exists():
            number += 1
        folder.rename(folder.with_name(f"{folder.name}.{number}"))

"""What asks a run to stop: SIGTERM, SIGUSR1, or its time being up. Imports nothing heavy: a process listens before it
imports torch.

What a signal does depends on how far the process is:

1. importing: it ends at once with exit code 75; there is nothing to save, and nobody waits for it yet;
2. start-up (after `start_up`): `Preempted` is raised in the main thread, as Ctrl-C raises KeyboardInterrupt;
3. training (after `defer`): it is written down. All ranks agree at the next step boundary (engine.guard), save, leave.

Only the first signal counts. Later ones change nothing: launchers and schedulers like to send them while a run saves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from types import FrameType

from megad2v.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_IMPORTING, _START_UP, _TRAINING = range(3)
PREEMPTED_FILE = "MEGAD2V_PREEMPTED"
"""Environment variable: a file that ranks make when all leave with exit code 75, for launchers that do not hand it on.
A rank that is stopped in start-up makes none: its launcher may be ending it because another one failed."""


class StopRequests:
    """What one process was asked. Without `listen` it hears no signal: a run inside somebody else's process."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the first signal that came."""
        self._stage = _IMPORTING
        self._started = time.monotonic() - _process_age()

    def listen(self) -> StopRequests:
        """Take over SIGTERM and SIGUSR1, for the rest of the process. Only in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def start_up(self) -> None:
        """From now on somebody catches `Preempted`."""
        self._stage = _START_UP

    def defer(self) -> None:
        """From now on somebody asks for `reason` at every step."""
        self._stage = _TRAINING

    def reason(self, max_minutes: float | None = None) -> str:
        """Why this process should stop now; "" where it need not. `max_minutes` count from the process's start."""
        if self.signal is not None:
            return self.signal
        if max_minutes is not None and time.monotonic() - self._started >= 60 * max_minutes:
            return f"train.max_minutes ({max_minutes:g}) is over"
        return ""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            return
        self.signal = signal.Signals(number).name
        what = f"{self.signal} before the first step: there is nothing to save"
        if self._stage == _IMPORTING:
            os.write(2, f"pretrain: {what} (exit code {Preempted.exit_code})\n".encode())
            os._exit(Preempted.exit_code)
        if self._stage == _START_UP:
            raise Preempted(what, on_one_rank=True)


def tell_script() -> None:
    """Make the file that PREEMPTED_FILE names, where it names one."""
    if path := os.environ.get(PREEMPTED_FILE):
        with contextlib.suppress(OSError):  # it is no reason not to leave
            Path(path).touch()


def _process_age() -> float:
    """Seconds since the kernel started this process: an interpreter on a slow file system takes its time to get here. 0
    where that cannot be known."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), of which two are cut off
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


def in_words(reasons: list[str]) -> str:
    """`reasons` of all ranks in rank order: "ranks 0, 1: SIGTERM; rank 2: train.max_minutes (30) is over"."""
    ranks: dict[str, list[int]] = {}
    for rank, reason in enumerate(reasons):
        if reason:
            ranks.setdefault(reason, []).append(rank)
    return "; ".join(
        f"rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}: {reason}" for reason, who in ranks.items()
    )

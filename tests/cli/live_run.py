"""A pretraining that is running, for tests that send signals to its processes or kill them.

    with LiveRun([*flags], ranks=2, logs=tmp_path) as run:
        run.wait_for_step(3)
        run.signal(1, signal.SIGTERM)
        assert run.wait(30) == [75, 75]

The ranks are started without a launcher, so that each exit code is seen and nobody but the test kills anybody.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.distributed.harness import REPOSITORY, _environment, count_ranks, reserved_port

POLL_S = 0.005


class LiveRun:
    """`launch/pretrain.py`, or another `program`, with `flags` on `ranks` processes of this host; rank N prints into
    logs/rankN.log."""

    def __init__(
        self,
        flags: Sequence[str],
        *,
        ranks: int,
        logs: Path,
        program: str = "launch/pretrain.py",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        count_ranks(ranks, "live run")
        self.output = Path(flags[list(flags).index("--train.output_dir") + 1])
        self._logs = logs
        self.started = time.time()
        logs.mkdir(parents=True, exist_ok=True)
        self.processes: list[subprocess.Popen] = []
        with reserved_port() as port:
            for rank in range(ranks):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                with (logs / f"rank{rank}.log").open("wb") as log:
                    process = subprocess.Popen(
                        [sys.executable, program, *map(str, flags)],
                        cwd=REPOSITORY,
                        env=_environment({name: str(value) for name, value in place.items()} | dict(environment or {})),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                self.processes.append(process)

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, *error: object) -> None:
        for rank in range(len(self.processes)):
            self.signal(rank, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def until(self, happened: Callable[[], Any], seconds: float = 60.0) -> None:
        """Poll until `happened()` is true. AssertionError with the logs where a rank ends first, or time is up."""
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                raise AssertionError(f"ended ({self._codes()}) or out of time:\n{self.log()}")
            time.sleep(POLL_S)

    def wait_for_step(self, step: int, seconds: float = 60.0) -> None:
        """Until the metrics of `step` are written."""
        self.until(lambda: last_step(self.output) >= step, seconds)

    def signal(self, rank: int, number: int) -> None:
        """To the rank and its data workers, as schedulers do: they are one process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[rank].pid, number)

    def end_as_launchers_do(self, seconds: float = 1.0) -> None:
        """A second after the first rank has ended, SIGTERM to the others, which may be waiting for it to start."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
            time.sleep(POLL_S)
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                self.signal(rank, signal.SIGTERM)

    def wait(self, seconds: float = 60.0) -> list[int]:
        """Exit codes of all ranks (negative: the signal that ended it), in rank order."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {seconds:g} s ({self._codes()}):\n{self.log()}") from None
        return self._codes()

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def log(self) -> str:
        """What all ranks have printed."""
        logs = (self._logs / f"rank{rank}.log" for rank in range(len(self.processes)))
        return "\n".join(path.read_text(errors="replace") for path in logs)


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file, which may be being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(output: Path) -> int:
    """The last step whose metrics are written; 0: none."""
    return max((line["step"] for line in lines(output / "metrics.jsonl")), default=0)


def curve(output: Path) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    return {
        line["step"]: (line["loss"], line["grad_norm"]) for line in lines(output / "metrics.jsonl") if "loss" in line
    }

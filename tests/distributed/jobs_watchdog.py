"""Jobs that run `launch/pretrain.py`'s main and come to grief on one rank."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megad2v.errors import UserError

BAD_STEP = 3
"""Step (from 0) in which it happens: all ranks have left the first, patient one behind."""


def run_main(arguments: dict[str, Any], output: Path) -> int:
    """Train by the command line in `flags`; on rank `rank`, do `mischief` just before step BAD_STEP is computed.

    `output`/mischief holds the time at which it was done.
    """
    from megad2v.training import loop
    from megad2v.training.main import main

    take_step = loop.take_step

    def step_or_not(*positional: Any, step: int, **words: Any) -> bool:
        if step == BAD_STEP and int(os.environ["RANK"]) == arguments["rank"]:
            (output / "mischief").write_text(str(time.time()))
            MISCHIEF[arguments["mischief"]]()
        return take_step(*positional, step=step, **words)

    loop.take_step = step_or_not
    code = main(arguments["flags"])
    assert code == 0, f"exit code {code}"
    return code


def _stop() -> None:
    """As `kill -STOP` from outside: all threads."""
    os.kill(os.getpid(), signal.SIGSTOP)


def _stop_for_a_while() -> None:
    """Stopped and continued, in less than the limit."""
    if os.fork() == 0:
        time.sleep(2.0)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    _stop()


def _sleep() -> None:
    """Alive, and never coming."""
    time.sleep(600)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail() -> None:
    raise ValueError("something nobody thought of")


def _refuse() -> None:
    error = UserError("a shard that only this rank reads is gone")
    error.on_one_rank = True
    raise error


def _wait_for_a_thread() -> None:
    """Alive, waiting in a lock: what its stack has to show."""
    held = threading.Lock()
    held.acquire()
    _never_released(held)


def _never_released(lock: threading.Lock) -> None:
    lock.acquire()


MISCHIEF: dict[str, Callable[[], None]] = {
    "stop": _stop,
    "stop_for_a_while": _stop_for_a_while,
    "sleep": _sleep,
    "die": _die,
    "fail": _fail,
    "refuse": _refuse,
    "lock": _wait_for_a_thread,
}

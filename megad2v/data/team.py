"""Who does the work of make_shards: this process alone, processes of this machine, or (data.ranks) MPI ranks."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from types import TracebackType
from typing import Any

PR_SET_PDEATHSIG = 1
"""prctl(2)."""


class Team:
    """Hands that take tasks: functions of modules and plain arguments. This one works at once, in this process."""

    size = 1
    """How many work at the same time."""
    ahead = 1
    """Tasks for each that may be under way: a second one bridges the time until a third comes."""
    places: Collection[int] = ()
    """Ranks that a task can be addressed to, where it matters who does it."""

    def submit(self, function: Callable[..., Any], *arguments: Any, place: int | None = None) -> Future[Any]:
        """Have `function(*arguments)` done; by the rank `place`, where there are ranks."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def wait(self, futures: Collection[Future[Any]]) -> list[Future[Any]]:
        """Those that are done, of which there is one at least."""
        return [future for future in futures if future.done()]

    def each(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, Any]]:
        """(arguments, result) of all, in any order; few are under way at a time."""
        running: dict[Future[Any], tuple[Any, ...]] = {}
        for one in arguments:
            running[self.submit(function, *one)] = one
            while len(running) >= self.size * self.ahead:
                yield from ((running.pop(future), future.result()) for future in self.wait(running))
        while running:
            yield from ((running.pop(future), future.result()) for future in self.wait(running))

    def drain(self) -> None:
        """Begin no more tasks, and wait for those that have begun."""

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drain()


class Pool(Team):
    """Processes of this machine. A killed one raises BrokenProcessPool from the futures."""

    ahead = 2

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = ProcessPoolExecutor(size, initializer=start_worker, initargs=(os.getpid(),))

    def submit(self, function: Callable[..., Any], *arguments: Any, place: int | None = None) -> Future[Any]:
        return self._pool.submit(function, *arguments)

    def wait(self, futures: Collection[Future[Any]]) -> list[Future[Any]]:
        return list(wait(futures, return_when=FIRST_COMPLETED).done)

    def drain(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def local_team(workers: int) -> Team:
    """`workers` processes, or none but this one."""
    return Pool(workers) if workers else Team()


def start_worker(parent: int) -> None:
    """Runs first in every process of a pool. Ctrl-C reaches the whole group; the main process ends the others without
    a traceback from each. Should it be killed, nobody would end them: they would wait for ever, and hold the output's
    lock."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)

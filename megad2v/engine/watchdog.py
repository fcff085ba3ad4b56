"""The watchdog: when a rank does not arrive, every rank says where it stands and leaves.

Who talks to whom: a thread of rank 0 listens on a TCP port of its own; a thread of every other rank holds one
connection to it. A tick (a tenth of the limit, at most a second) apart, each sends one line that says where its main
thread stands (some 200 bytes, and the sample ids in hand), and rank 0 one line to each. So every rank hears of rank 0
and rank 0 of all. Rank 0 judges (engine.hang.judge); the others judge rank 0 alone. Nothing goes through a process
group or its store: those hang with the run (a client of torch's TCPStore waits far beyond its time limit for a server
that is stopped).

What counts as progress: each call of `at`. That is each phase of a step, each module of a forward, each block of a
backward, each micro-batch of a validation. Start-up, the first step and checkpoints are one long phase each, and have
more patience.

The main thread only ever assigns to `place`. It is never interrupted: the process ends from the watchdog's thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from megad2v.engine.distributed import World, broadcast_text, together
from megad2v.engine.hang import SHOWN_SAMPLES, Place
from megad2v.engine.lines import Lines
from megad2v.engine.watchers import DUMP_S, LEAVE_S, LINGER_S, SETTLE_S, Listener, Speaker, Watcher, who

CONNECT_S = 60.0


class Watchdog:
    """One per process. Without a limit, or before `start_watchdog`, it does nothing but remember the place."""

    def __init__(self) -> None:
        self.place = Place()
        self.failure: tuple[str, int, str | None] | None = None
        self.closing = False
        self.alone = False
        self._patient = True
        self._thread: threading.Thread | None = None
        self.ear, self._mouth = -1, -1

    # --- the main thread's side

    def at(
        self, phase: str, module: str = "", *, step: int | None = None, samples: Sequence[str] | None = None
    ) -> None:
        """Say where this rank is: a phase, and a module of it. `step` begins a step; `samples` are kept until others
        are given. All ranks call it in the same order."""
        last = self.place
        kept = last.samples if samples is None else _shown(samples)
        number, count = (last.step, last.count + 1) if step is None else (step, 0)
        self.place = Place(number, count, phase, module, kept, self._patient)

    def started(self) -> None:
        """The first step is over: from now on a phase has the limit's time."""
        self._patient = False

    @contextlib.contextmanager
    def patience(self, phase: str) -> Iterator[None]:
        """A phase of many seconds in one piece."""
        before, self._patient = self._patient, True
        self.at(phase, samples=())
        try:
            yield
        finally:
            self._patient = before

    @property
    def active(self) -> bool:
        """Whether anybody watches."""
        return self._thread is not None and self._thread.is_alive()

    def fail(self, message: str, code: int = 1, details: str | None = None) -> None:
        """This rank gives up: every rank leaves, with its `message` and `code`, instead of waiting for it in a
        collective; `details` (a traceback) is printed here. Returns only where nobody watches or nobody else is."""
        if self.active and not self.alone:
            self.failure = (message, code, details)
            self._wake()
            self._thread.join(SETTLE_S + DUMP_S + 2 * LEAVE_S)

    def close(self) -> None:
        """The end of a run that went well, or that all ranks end alike."""
        if self.active:
            self.closing = True
            self._wake()
            self._thread.join(LINGER_S + LEAVE_S)
        if self._thread is not None and not self._thread.is_alive():
            os.close(self.ear), os.close(self._mouth)
        self._thread = None

    def _wake(self) -> None:
        os.write(self._mouth, b"!")

    # --- the thread's side

    def run_in_thread(self, watcher: Watcher) -> None:
        """Start `watcher`."""
        self.ear, self._mouth = os.pipe()
        watcher.selector.register(self.ear, selectors.EVENT_READ, "wake")
        self._thread = threading.Thread(target=watcher.run, name="watchdog", daemon=True)
        self._thread.start()


def _shown(samples: Sequence[str]) -> tuple[str, ...]:
    more = len(samples) - SHOWN_SAMPLES
    return (*samples[:SHOWN_SAMPLES], *([f"(and {more} more)"] if more > 0 else []))


def start_watchdog(world: World, folder: Path, limit: float) -> Watchdog:
    """Start watching; files will go to `folder`. 0 seconds: nobody watches.

    Collective: one broadcast of an address, one small gather and broadcast of whether all could connect. Where one
    cannot, the run goes on without a watchdog, and says so.
    """
    watch = Watchdog()
    if limit <= 0:
        return watch
    watch.alone = world.size == 1
    server, token = None, secrets.token_hex(16)
    if world.size > 1:
        connected: list[Lines] = []
        server, address = _listen_on(world) if world.is_main else (None, "")
        try:
            port, token = json.loads(broadcast_text(json.dumps([address, token])))
            together(
                lambda: None if world.is_main else connected.append(_connect(port, token, world.rank)),
                errors=(OSError,),
                raises=OSError,
            )
        except OSError as error:
            if world.is_main:
                print(f"train.hang_timeout: no watchdog, since ranks cannot reach rank 0: {error}", flush=True)
            return watch
        if not world.is_main:
            watch.run_in_thread(Speaker(watch, world.rank, folder, limit, connected[0]))
            return watch
    watch.run_in_thread(Listener(watch, folder, limit, server=server, token=token, size=world.size))
    return watch


def _listen_on(world: World) -> tuple[socket.socket | None, int | str]:
    """A listening socket and its port, or None and why not. Only local ranks can reach a loopback address."""
    host = os.environ["MASTER_ADDR"]
    local = host in ("localhost", "::1") or host.startswith("127.")
    try:
        if local:
            family = socket.AF_INET6 if host == "::1" else socket.AF_INET
            server = socket.create_server((host, 0), family=family, backlog=world.size)
        elif socket.has_dualstack_ipv6():
            server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=world.size)
        else:
            server = socket.create_server(("", 0), backlog=world.size)
    except OSError as error:
        return None, str(error)
    return server, server.getsockname()[1]


def _connect(port: int | str, token: str, rank: int) -> Lines:
    if isinstance(port, str):
        raise OSError(port)
    lines = Lines(socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_S))
    lines.send({"rank": rank, "token": token, "who": who()})
    return lines

"""A socket that carries one JSON object a line and never makes its owner wait."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any

LONGEST = 1 << 20
"""Bytes of a line. Whoever sends more is not one of us."""


class Lines:
    """Non-blocking, for one thread. `closed` becomes True once the other end is gone.

    Processes forked from this one (data workers) close their copy, so that the connection ends with this process.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.closed = False
        self._in, self._out = b"", b""
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self.connection.close()

    @property
    def idle(self) -> bool:
        """Whether all that was sent so far has left. If not, the next beat can be spared: the other end is stuck."""
        return not self._out

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message, and send what the socket takes."""
        self._out += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes."""
        try:
            while self._out and not self.closed:
                self._out = self._out[self.connection.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come in whole."""
        try:
            while not self.closed:
                data = self.connection.recv(1 << 16)
                self._in += data
                if not data or len(self._in) > LONGEST:
                    self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *whole, self._in = self._in.split(b"\n")
        try:
            messages = [json.loads(line) for line in whole]
        except ValueError:
            self.closed = True
            return []
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        """End the connection for both sides, whoever else holds a copy of the socket."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

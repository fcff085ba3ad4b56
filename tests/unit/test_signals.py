"""What one process makes of the signals that come to it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from megad2v.config.load import parse_command_line
from megad2v.errors import Preempted, UserError
from megad2v.training.signals import SIGNALS, StopRequests, in_words
from tests.conftest import REPOSITORY


@pytest.fixture
def requests() -> Iterator[StopRequests]:
    """Listening, in start-up; the handlers from before come back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    one = StopRequests().listen()
    one.start_up()
    yield one
    for number, handler in before.items():
        signal.signal(number, handler)


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # handlers run between two lines of Python


@pytest.mark.parametrize("number", SIGNALS)
def test_start_up_is_interrupted_once(number: int, requests: StopRequests) -> None:
    with pytest.raises(Preempted, match=f"{signal.Signals(number).name} before the first step") as raised:
        _send(number)
    assert raised.value.on_one_rank and raised.value.exit_code == 75
    _send(number)  # while it leaves


def test_not_even_a_library_that_catches_everything_swallows_it(requests: StopRequests) -> None:
    with pytest.raises(Preempted), contextlib.suppress(Exception):
        _send(signal.SIGTERM)


def test_training_only_writes_it_down(requests: StopRequests) -> None:
    requests.defer()
    assert requests.reason() == ""
    _send(signal.SIGUSR1)
    _send(signal.SIGTERM)
    assert requests.reason() == "SIGUSR1"


def test_time_counts_from_the_start_of_the_process(requests: StopRequests) -> None:
    """Not from the start of this object: the process had to import torch first."""
    code = (
        "import time; time.sleep(1.5); from megad2v.training.signals import StopRequests as R; r = R();"
        "print(r.reason(1 / 60), '|', r.reason(10), '|', r.reason(None))"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert said.stdout == f"train.max_minutes ({1 / 60:g}) is over |  | \n", said.stderr


def test_listening_needs_no_torch() -> None:
    code = "import sys, megad2v.training.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0


def test_reasons_of_all_ranks_in_words() -> None:
    over = "train.max_minutes (30) is over"
    assert in_words(["", "SIGTERM", over, "SIGTERM"]) == f"ranks 1, 3: SIGTERM; rank 2: {over}"


def test_no_time_at_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.max_minutes: expected more than 0 minutes, or null, got 0"):
        parse_command_line(["--deepspeed", "ds_configs/zero1.json", "--train.max_minutes", "0"])

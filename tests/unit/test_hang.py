"""What the watchdog makes of what it hears."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from megad2v.engine.hang import (
    LEAST_PATIENT_S,
    PATIENCE,
    Place,
    Report,
    Verdict,
    ended,
    judge,
    longest_silence,
    set_aside,
    write_dump,
)
from megad2v.engine.lines import Lines
from megad2v.engine.watchdog import Watchdog

LIMIT, TICK = 10.0, 1.0


def report(
    step: int, count: int, *, moved: float, arrived: float, phase: str = "forward", patient: bool = False
) -> Report:
    return Report(Place(step, count, phase, "head", ("a", "b"), patient), moved, arrived, "host h, process 1")


def test_nothing_wrong() -> None:
    reports = {0: report(5, 3, moved=95.0, arrived=99.5), 1: report(5, 1, moved=80.0, arrived=99.5)}
    assert judge(reports, 100.0, LIMIT, TICK) is None, "rank 0 has moved 5 s ago: rank 1 may still come"
    assert judge({}, 100.0, LIMIT, TICK) is None


def test_silent_ranks_are_named_before_those_who_wait() -> None:
    reports = {
        0: report(5, 3, moved=80.0, arrived=100.0),
        1: report(4, 9, moved=80.0, arrived=89.0),
        2: report(5, 1, moved=80.0, arrived=100.0),
    }
    verdict = judge(reports, 100.0, LIMIT, TICK)
    assert verdict and verdict.culprits == (1,)
    assert verdict.message == (
        "rank 1 gave no sign of life for 11.0 s (stopped, or its node or network is lost): rank 1 (host h, process 1) "
        "was last seen at step 4, forward, head, samples a b; the furthest of the others is at step 5, forward, head, "
        "samples a b"
    )


def test_a_rank_that_did_not_arrive() -> None:
    reports = {
        0: report(5, 3, moved=89.0, arrived=100.0),
        1: report(5, 2, moved=80.0, arrived=100.0, phase="data"),
        2: report(5, 3, moved=88.0, arrived=100.0),
    }
    verdict = judge(reports, 100.0, LIMIT, TICK)
    assert verdict and verdict.culprits == (1,) and verdict.code == 1
    assert verdict.message.startswith("no rank has moved for 10 s; rank 1 did not arrive: rank 1 (host h, process 1) ")


def test_a_rank_stopped_where_the_others_wait() -> None:
    """Its place is theirs; the beats that it has missed give it away, before it counts as silent by itself."""
    reports = {rank: report(5, 3, moved=89.0, arrived=100.0 if rank != 2 else 96.0) for rank in range(4)}
    verdict = judge(reports, 100.0, LIMIT, TICK)
    assert verdict and verdict.culprits == (2,)


def test_nobody_in_particular() -> None:
    reports = {rank: report(5, 3, moved=89.0, arrived=100.0) for rank in range(2)}
    verdict = judge(reports, 100.0, LIMIT, TICK)
    assert verdict and verdict.culprits == () and "none is behind the others" in verdict.message


def test_steps_come_before_places_in_them() -> None:
    reports = {0: report(6, 0, moved=1.0, arrived=100.0), 1: report(5, 40, moved=1.0, arrived=100.0)}
    verdict = judge(reports, 100.0, LIMIT, TICK)
    assert verdict and verdict.culprits == (1,)


def test_long_phases_have_patience_and_silence_has_none() -> None:
    """It is the rank waited for whose phase counts."""
    waiting = report(5, 4, moved=1.0, arrived=100.0)
    saving = report(5, 3, moved=1.0, arrived=100.0, phase="checkpoint", patient=True)
    assert judge({0: saving, 1: waiting}, 100.0, LIMIT, TICK) is None
    later = LEAST_PATIENT_S + 2
    reports = {0: report(5, 3, moved=1.0, arrived=later, patient=True), 1: report(5, 4, moved=1.0, arrived=later)}
    verdict = judge(reports, later, LIMIT, TICK)
    assert verdict and verdict.culprits == (0,) and verdict.message.startswith("no rank has moved for 600 s")
    silent = judge({0: saving, 1: report(5, 3, moved=1.0, arrived=89.0, patient=True)}, 100.0, LIMIT, TICK)
    assert silent and silent.culprits == (1,)


def test_a_lost_process_explains_the_failures_of_the_others() -> None:
    reports = {rank: report(5, 3, moved=1.0, arrived=1.0) for rank in range(4)}
    failures = [(3, "connection closed", 1), (0, "connection closed", 1)]
    assert ended([2], failures, reports).culprits == (2,)
    alike = ended([], [(0, "bad", 2), (1, "bad", 2)], reports)
    assert alike == Verdict("ranks 0, 1 failed: bad", (0, 1), 2)
    first = ended([], [(1, "bad", 1), (3, "worse", 1)], reports)
    assert first.culprits == (1,) and first.message.endswith("bad; rank 3 failed after it")


def test_place_and_patience() -> None:
    watch = Watchdog()
    watch.at("data", step=3, samples=[str(number) for number in range(40)])
    assert watch.place[:3] == (3, 0, "data") and watch.place.patient
    assert watch.place.samples[-1] == "(and 8 more)" and len(watch.place.samples) == 33
    watch.started()
    watch.at("forward", "head", samples=["a"])
    assert watch.place == Place(3, 1, "forward", "head", ("a",), False)
    with watch.patience("checkpoint"):
        assert watch.place == Place(3, 2, "checkpoint", "", (), True)
    watch.at("log")
    assert watch.place == Place(3, 3, "log", "", (), False)
    assert not watch.active
    watch.fail("nobody listens"), watch.close()


def test_a_dump_never_keeps_a_rank_from_leaving(tmp_path: Path) -> None:
    verdict = Verdict("rank 1 is late", (1,))
    assert write_dump(tmp_path / "hang" / "rank0.txt", verdict, 0, Place(2, 1, "forward", "head"), "details") is None
    text = (tmp_path / "hang" / "rank0.txt").read_text()
    assert "rank 1 is late\n" in text and "step: 2\nphase: forward\nmodule: head\nsamples: -\n" in text
    assert "\ndetails\n" in text and "test_a_dump_never_keeps" in text
    assert "rank0.txt" in str(write_dump(tmp_path / "hang" / "rank0.txt" / "x", verdict, 0, Place(), None))
    set_aside(tmp_path / "hang"), set_aside(tmp_path / "hang")
    (tmp_path / "hang").mkdir()
    set_aside(tmp_path / "hang")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hang.1", "hang.2"]


@pytest.mark.timeout(20)
def test_lines_never_wait() -> None:
    ours, theirs = (Lines(end) for end in _pair())
    ours.send({"a": 1}), ours.send({"b": [2]})
    assert _receive(theirs) == [{"a": 1}, {"b": [2]}] and ours.idle
    while ours.idle:
        ours.send({"fill": "x" * 60_000})
    began = time.monotonic()
    ours.flush()
    assert time.monotonic() - began < 1 and not ours.closed
    theirs.connection.setblocking(True)
    theirs.connection.sendall(b"no json\n")
    assert ours.receive() == [] and ours.closed
    ours.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    return client, server.accept()[0]


def _receive(lines: Lines) -> list[dict]:
    while not (found := lines.receive()):
        assert not lines.closed
    return found


@pytest.mark.parametrize("limit", [1.0, 60.0, 600.0, 3600.0])
def test_collectives_wait_longer_than_the_watchdog(limit: float) -> None:
    """Otherwise the ranks that did arrive would be the ones to fail, and to be named."""
    assert longest_silence(limit) > max(PATIENCE * limit, LEAST_PATIENT_S) > limit

"""Every distributed test stands on the harness: it brings results back, tells what failed, leaves nothing running."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import harness
from tests.distributed.harness import reserved_port, run_command, run_ranks

JOBS = "tests.distributed.jobs_harness"


def alive(pid: int) -> bool:
    """Whether the process runs. A zombie has ended: what nobody has collected yet is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_gone(pids: list[int]) -> None:
    for _ in range(100):
        if not any(alive(pid) for pid in pids):
            return
        time.sleep(0.02)
    raise AssertionError(f"still alive: {[pid for pid in pids if alive(pid)]}")


def test_results_come_back_in_rank_order(tmp_path: Path):
    before = harness.ranks_spawned
    results = run_ranks(f"{JOBS}:all_reduce", 2, {"base": 1.5}, timeout=60, output=tmp_path)
    assert results == [{"rank": 0, "sum": 4.0}, {"rank": 1, "sum": 4.0}]
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["rank0.log", "rank1.log"]
    assert harness.ranks_spawned == before + 2


def test_environment_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_PROCID", "7")
    monkeypatch.setenv("GONE", "here")
    names = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "DS_ACCELERATOR", "SLURM_PROCID", "GONE", "EXTRA"]
    extra = {"EXTRA": "1", "GONE": None}
    (seen,) = run_ranks(f"{JOBS}:environment", 1, {"names": names}, timeout=60, output=tmp_path, environment=extra)
    assert list(seen.values()) == ["0", "1", "127.0.0.1", "1", "cpu", None, None, "1"]


def test_hanging_rank_is_killed_with_its_children(tmp_path: Path):
    started = time.monotonic()
    with pytest.raises(AssertionError) as failure:
        run_ranks(f"{JOBS}:one_hangs", 2, timeout=4, output=tmp_path)
    assert time.monotonic() - started < 12
    message = str(failure.value)
    assert "rank 0: finished" in message
    assert "rank 1: still running, killed: the limit of 4 s" in message
    assert "rank 1 is going to sleep" in message
    assert "a_deep_sleep" in message  # where it hung
    assert_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


def test_failing_rank_ends_the_others_and_shows_its_log(tmp_path: Path):
    started = time.monotonic()
    with pytest.raises(AssertionError) as failure:
        run_ranks(f"{JOBS}:one_fails", 2, timeout=300, output=tmp_path)
    assert time.monotonic() - started < 30
    message = str(failure.value)
    assert "ValueError: the shoe does not fit" in message
    assert "rank 0 waits" in message
    assert "rank 0: still running, killed: rank 1 had failed" in message
    assert "rank 1: exited 1" in message
    assert_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


@pytest.mark.parametrize(
    ("job", "words"), [("no_json", "not JSON serializable"), ("leaves_early", "without a result"), ("absent", "absent")]
)
def test_a_rank_without_a_result_is_a_failure(tmp_path: Path, job: str, words: str):
    with pytest.raises(AssertionError, match=words):
        run_ranks(f"{JOBS}:{job}", 1, timeout=60, output=tmp_path)


def test_old_results_do_not_pass_for_new_ones(tmp_path: Path):
    (tmp_path / "rank0.json").write_text('"old"')
    with pytest.raises(AssertionError, match="without a result"):
        run_ranks(f"{JOBS}:leaves_early", 1, timeout=60, output=tmp_path)


def test_run_command_returns_code_and_text():
    program = "import sys, os; print('out', os.environ['X']); print('err', file=sys.stderr); sys.exit(3)"
    completed = run_command([sys.executable, "-c", program], timeout=30, env={"X": "y"})
    assert (completed.returncode, completed.stdout, completed.stderr) == (3, "out y\n", "err\n")


def test_run_command_kills_the_whole_group(tmp_path: Path):
    script = 'sleep 600 & echo $$ $! > "$PIDS"; echo started; wait'
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)not done after 1 s.*started"):
        run_command(["bash", "-c", script], timeout=1, env={"PIDS": str(tmp_path / "pids")})
    assert time.monotonic() - started < 10
    assert_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


def test_run_command_leaves_no_worker_of_a_launcher_that_ended(tmp_path: Path):
    script = 'sleep 600 >/dev/null 2>&1 & echo $! > "$PIDS"; exit 1'
    assert run_command(["bash", "-c", script], timeout=30, env={"PIDS": str(tmp_path / "pids")}).returncode == 1
    assert_gone([int((tmp_path / "pids").read_text())])


def test_reserved_port_can_be_bound_by_name_and_is_not_handed_out():
    with reserved_port() as port:
        drawn = set()
        for _ in range(200):
            with socket.socket() as other:
                other.bind(("127.0.0.1", 0))
                drawn.add(other.getsockname()[1])
        assert port not in drawn
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen(1)


def test_ranks_are_counted_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(harness.RANK_COUNT_VARIABLE, str(tmp_path / "count"))
    harness.count_ranks(3, "here")
    harness.count_ranks(2, "there")
    assert (tmp_path / "count").read_text() == "3\there\n2\tthere\n"
    assert os.environ[harness.RANK_COUNT_VARIABLE] == str(tmp_path / "count")

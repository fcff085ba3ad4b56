"""Start real processes for a test, and never leave one behind.

    results = run_ranks("tests.distributed.jobs:all_reduce", 2, {"value": 3}, timeout=60, output=tmp_path)

A job is a function `job(arguments: dict, output: Path)` in an importable module. It runs in `world_size` fresh
interpreters that carry the variables which `torch.distributed` and DeepSpeed read. What it returns (anything JSON can
hold) comes back, in rank order; what JSON cannot hold, the job writes under `output` itself. A job initialises the
process group once.

    completed = run_command(["deepspeed", "--num_gpus", "2", …], timeout=120, cwd=repository, ranks=2)

Who talks to whom: the ranks meet at a TCPStore that this process owns. It binds port 0, so the kernel picks a port
that is free at that moment and stays ours: two test runs on one machine cannot collide. (This is the arrangement of
torchrun's agent.)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# Set by tests/conftest.py. One line a launch, so that the workers of xdist can share the file.
RANK_COUNT_VARIABLE = "MEGAD2V_RANK_COUNT_FILE"
TAIL_LINES = 40  # of each rank's log, in the message of a failure
GRACE_S = 3.0  # what the other ranks get after one has failed, to say what they saw
POLL_S = 0.02
STACKS_S = 0.5  # for a hanging rank to write its stacks before it is killed

# Left over from a launcher around us (a Slurm allocation, mpirun, torchrun), these would win over what a test asks for.
LAUNCHER_VARIABLES = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    *("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "DEEPSPEED_TIMEOUT"),
}

ranks_spawned = 0  # by this process


@dataclass
class _Rank:
    rank: int
    process: subprocess.Popen
    log: Path
    ending: str = ""  # how it ended, in words


def run_ranks(
    job: str,
    world_size: int,
    arguments: Mapping[str, Any] | None = None,
    *,
    timeout: float,
    output: Path,
    environment: Mapping[str, str | None] | None = None,
) -> list[Any]:
    """Run `job` on `world_size` processes; return what each rank returned.

    `timeout` is in seconds and covers everything, start-up included. `environment` is laid over the variables of every
    rank; a value of None removes one. Logs are kept at `output/rankN.log`. Raises AssertionError with the end of every
    rank's log when a rank fails (the others then have GRACE_S seconds) or the time is up; in both cases no process
    survives.
    """
    from torch.distributed import TCPStore  # here, so that importing the harness costs nothing

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for stale in (*output.glob("rank*.log"), *output.glob("rank*.json")):
        stale.unlink()
    (output / "arguments.json").write_text(json.dumps(dict(arguments or {}), indent=1))

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    count_ranks(world_size, job)
    started = time.monotonic()
    ranks: list[_Rank] = []
    try:
        for rank in range(world_size):
            ranks.append(_spawn(job, rank, world_size, store.port, output, environment))
        _wait(ranks, started, timeout)
    finally:  # also on Ctrl-C and on pytest's own time limit
        for one in ranks:
            _kill_group(one.process)
        del store
    if any(one.ending != "finished" for one in ranks):
        raise AssertionError(_story(job, ranks, time.monotonic() - started))
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def run_command(
    argv: Sequence[str | Path],
    *,
    timeout: float,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    ranks: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Run a command line in its own session; return its exit code, stdout and stderr as text, whatever the code is.

    `env` is laid over this process's environment (None removes a variable). The directory of the running interpreter
    comes first in PATH, so that `deepspeed` and `python` mean this environment's. `ranks` says how many training
    processes the command starts, for the summary's count. When the time is up its whole process group is killed and
    AssertionError is raised with the end of what it printed.
    """
    if ranks:
        count_ranks(ranks, " ".join(map(str, argv[:3])))
    process = subprocess.Popen(
        [str(word) for word in argv],
        cwd=cwd or REPOSITORY,
        env=_environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        stdout, stderr = process.communicate()
        command = " ".join(map(str, argv))
        raise AssertionError(
            f"not done after {timeout:g} s, killed: {command}\n--- stdout\n{_tail(stdout)}\n--- stderr\n{_tail(stderr)}"
        ) from None
    finally:
        _kill_group(process)  # a launcher that failed may have left its workers
    return subprocess.CompletedProcess(list(map(str, argv)), process.returncode, stdout, stderr)


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port on 127.0.0.1 for a launcher that insists on being told one (`deepspeed --master_port`).

    A connection is made to the port and closed from the listening side, which leaves it in TIME_WAIT: for about a
    minute the kernel hands it to nobody who asks for "any port", while a server that names it and sets SO_REUSEADDR, as
    TCPStore does, may bind.
    """
    with socket.socket() as listener, socket.socket() as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        client.connect(("127.0.0.1", port))
        accepted, _ = listener.accept()
        accepted.close()
    yield port


def count_ranks(number: int, what: str) -> None:
    """Add to the count that the test summary prints."""
    global ranks_spawned
    ranks_spawned += number
    path = os.environ.get(RANK_COUNT_VARIABLE)
    if path:
        with open(path, "a") as stream:  # O_APPEND: lines of several writers do not mix
            stream.write(f"{number}\t{what}\n")


def _environment(extra: Mapping[str, str | None] | None, **own: str) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", os.defpath)])
    variables.update(
        {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    )
    variables.update(own)
    for name, value in (extra or {}).items():
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = value
    return variables


def _spawn(
    job: str, rank: int, world_size: int, port: int, output: Path, environment: Mapping[str, str | None] | None
) -> _Rank:
    variables = _environment(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # every rank is a client of our store; none tries to bind the port
        TORCHELASTIC_RESTART_COUNT="0",
    )
    log = output / f"rank{rank}.log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.rank", job, str(output), str(os.getpid())],
            cwd=REPOSITORY,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Rank(rank, process, log)


def _wait(ranks: list[_Rank], started: float, timeout: float) -> None:
    """Return when all have ended, or when the rest must be killed; every rank then has its `ending`."""
    deadline, failed = started + timeout, None
    while True:
        for one in ranks:
            code = one.process.poll()
            if code is not None and not one.ending:
                one.ending = _ending(one, code, time.monotonic() - started)
                if one.ending != "finished" and failed is None:
                    failed = one
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        running = [one for one in ranks if not one.ending]
        if not running:
            return
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL_S)
    for one in running:  # rank.py has hung faulthandler on this signal: the log then shows where each rank stood
        with contextlib.suppress(ProcessLookupError):
            one.process.send_signal(signal.SIGUSR1)
    time.sleep(STACKS_S)
    why = f"the limit of {timeout:g} s" if failed is None else f"rank {failed.rank} had failed"
    for one in running:
        one.ending = f"still running, killed: {why}"


def _ending(one: _Rank, code: int, seconds: float) -> str:
    if code == 0:
        return (
            "finished" if one.log.with_suffix(".json").exists() else f"exited 0 after {seconds:.1f} s without a result"
        )
    if code < 0:
        return f"ended by {signal.Signals(-code).name} after {seconds:.1f} s"
    return f"exited {code} after {seconds:.1f} s"


def _kill_group(process: subprocess.Popen) -> None:
    """Kill the process and whatever it started. Its session is its own, so the group's id is the process's."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _story(job: str, ranks: list[_Rank], seconds: float) -> str:
    lines = [f"{job} failed on {len(ranks)} ranks after {seconds:.1f} s"]
    for one in ranks:
        lines.append(f"--- rank {one.rank}: {one.ending} ({one.log})")
        lines.append(_tail(one.log.read_text(errors="replace")))
    return "\n".join(lines)


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-TAIL_LINES:])


def have(command: str) -> bool:
    """Whether a command exists beside the running interpreter or in PATH."""
    return shutil.which(command, path=_environment(None)["PATH"]) is not None

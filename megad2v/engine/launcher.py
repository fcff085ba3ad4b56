"""Which process of how many this is, from the variables that the launcher around it has set.

`deepspeed`, `torchrun`, `srun`, Open MPI's and MPICH's `mpirun` and plain `python` all start the same command line.
`find_place` is a pure function of the environment; `export_place` then sets the variables that torch.distributed and
DeepSpeed read. Nothing is sent, but for one case: ranks of `mpirun` on several hosts without MASTER_ADDR ask rank 0 for
its address, over MPI.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

from megad2v.engine import network
from megad2v.errors import UserError

DEFAULT_PORT = 29500
"""What torch and DeepSpeed use too."""
PORTS = range(15000, 25000)
"""Where a port derived from a job's id lies: below what Linux hands to outgoing connections (32768 and above)."""


@dataclass(frozen=True)
class Place:
    """One process among all. `host` and `port` are where rank 0 is met; host None: only rank 0 can say (mpirun)."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str | None
    port: int

    @property
    def one_host(self) -> bool:
        """Whether all ranks run on this host."""
        return self.local_size >= self.size


def find_place(variables: Mapping[str, str]) -> Place:
    """Read the environment of a process. Raises UserError where the variables contradict each other.

    The order matters, because launchers nest: `srun torchrun` and `srun deepspeed` leave Slurm's variables beside their
    own, and mpirun starts its daemons by srun inside a Slurm allocation. The innermost one wins.
    """
    if "RANK" in variables:
        place = _from_rank(variables)
    elif "OMPI_COMM_WORLD_RANK" in variables:
        place = _from_mpi(variables, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                          "OMPI_COMM_WORLD_LOCAL_SIZE")  # fmt: skip
    elif "PMI_RANK" in variables and "MPI_LOCALRANKID" in variables:  # srun --mpi=pmi2 sets the first one too
        place = _from_mpi(variables, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    elif _is_task_of_srun(variables):
        place = _from_srun(variables)
    elif _number(variables, "WORLD_SIZE", 1) > 1:
        raise UserError(
            f"WORLD_SIZE: {variables['WORLD_SIZE']} processes, but RANK does not say which one this is; "
            "start them by deepspeed, torchrun, srun or mpirun"
        )
    else:
        port = _number(variables, "MASTER_PORT", 0)  # nobody has to know it: the kernel picks one
        place = Place("python", 0, 1, _number(variables, "LOCAL_RANK", 0), 1, "127.0.0.1", port)
    if not (0 <= place.rank < place.size and place.local_rank >= 0):
        raise UserError(f"{place.launcher}: this is rank {place.rank} of {place.size} by its variables; expected less")
    return place


def export_place(place: Place, variables: MutableMapping[str, str] = os.environ) -> Place:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and return the place with its host
    known. Under mpirun on several hosts without MASTER_ADDR: one broadcast of rank 0's address and port over MPI."""
    if place.host is None:
        host, port = _ask_rank_0(place)
        place = replace(place, host=host, port=port)
    assert place.host is not None
    variables.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_size),
        MASTER_ADDR=place.host,
        MASTER_PORT=str(place.port),
    )
    return place


def _from_rank(variables: Mapping[str, str]) -> Place:
    """deepspeed, torchrun, or a script of the user's that sets what torch.distributed reads."""
    launcher = "deepspeed" if "CROSS_SIZE" in variables else "torchrun" if "GROUP_RANK" in variables else "RANK"
    rank, size = _number(variables, "RANK"), _number(variables, "WORLD_SIZE")
    if size > 1:
        for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not variables.get(name):
                raise UserError(f"{name}: not set, though RANK is {rank} and WORLD_SIZE {size}; {_MEANING[name]}")
    # deepspeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE. Neither: a hand-made start, taken for one host.
    local_size = _number(variables, "LOCAL_WORLD_SIZE", _number(variables, "LOCAL_SIZE", size))
    host = variables.get("MASTER_ADDR") or "127.0.0.1"
    port = _number(variables, "MASTER_PORT", 0)
    return Place(launcher, rank, size, _number(variables, "LOCAL_RANK", 0), local_size, host, port)


_MEANING = {
    "LOCAL_RANK": "it is the number of this process on its host, from 0",
    "MASTER_ADDR": "it is the name or address of rank 0's host",
    "MASTER_PORT": "it is a free port on rank 0's host",
}


def _from_mpi(variables: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Place:
    """Open MPI, MPICH or Intel MPI. On one host nothing is asked; on several, MASTER_ADDR or mpi4py says where."""
    place = Place(
        "mpirun",
        _number(variables, rank),
        _number(variables, size),
        _number(variables, local_rank),
        _number(variables, local_size, 1),  # not knowing it means to expect several hosts
        variables.get("MASTER_ADDR") or None,
        _port(variables, variables.get("PMIX_NAMESPACE")),
    )
    return replace(place, host="127.0.0.1") if place.host is None and place.one_host else place


def _is_task_of_srun(variables: Mapping[str, str]) -> bool:
    """Not so in the shell of sbatch or salloc: it has SLURM_PROCID and SLURM_NTASKS of the allocation, but is no task
    of a step; a step that Slurm made for itself (batch, interactive) has a number near 2^32."""
    step = variables.get("SLURM_STEP_ID", variables.get("SLURM_STEPID", ""))
    return (
        step.isdigit()
        and int(step) < 2**31
        and "SLURM_PROCID" in variables
        and _number(variables, "SLURM_STEP_NUM_TASKS", 1) > 1
    )


def _from_srun(variables: Mapping[str, str]) -> Place:
    """Task 0 runs on the first host of the step."""
    size = _number(variables, "SLURM_STEP_NUM_TASKS")
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST", "")
    per_node = _tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(variables, "SLURM_NODEID", 0)
    local_size = per_node[node] if node < len(per_node) else 1
    host = variables.get("MASTER_ADDR")
    if not host:
        # No name needs resolving where there is one host.
        host = "127.0.0.1" if local_size == size else first_host(nodes)
    if not host:
        raise UserError("srun: SLURM_STEP_NODELIST is empty; export MASTER_ADDR, the name of the first node")
    job = f"{variables.get('SLURM_JOB_ID', '')}.{variables.get('SLURM_STEP_ID', '')}"
    return Place(
        "srun",
        _number(variables, "SLURM_PROCID"),
        size,
        _number(variables, "SLURM_LOCALID"),
        local_size,
        host,
        _port(variables, job),
    )


def first_host(nodes: str) -> str:
    """First name of a Slurm node list: `rack[1-2]n[08-11,20],gpu7` -> `rack1n08`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # the pattern also matches nothing
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group()).strip()


def _tasks_per_node(text: str) -> list[int]:
    """`4(x2),1` -> [4, 4, 1]."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts


def _port(variables: Mapping[str, str], job: str | None) -> int:
    """MASTER_PORT, or a port that all ranks derive alike and that two jobs on one host seldom share."""
    default = PORTS[zlib.crc32(job.encode()) % len(PORTS)] if job else DEFAULT_PORT
    return _number(variables, "MASTER_PORT", default)


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}: expected a number from the launcher, got {text!r}") from None


def _ask_rank_0(place: Place) -> tuple[str, int]:
    """Rank 0's address and a port that is free there, broadcast over MPI, which is finished before training starts."""
    lacking = UserError(
        f"MASTER_ADDR: not set, and mpirun started {place.size} ranks on several hosts ({place.local_size} here). "
        "Pass rank 0's host (mpirun -x MASTER_ADDR=HOST; with MPICH: -genv MASTER_ADDR HOST) or install mpi4py, "
        "which finds it"
    )
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # RuntimeError: mpi4py is there, but no MPI library
        raise lacking from None
    MPI.Init()
    try:
        seen = MPI.COMM_WORLD.Get_size()
        if seen != place.size:
            raise UserError(
                f"mpi4py belongs to another MPI than mpirun: it sees {seen} of {place.size} ranks; "
                "pass rank 0's host (mpirun -x MASTER_ADDR=HOST) or build mpi4py with this MPI"
            )
        told = (network.own_address(), _free_port()) if place.rank == 0 else None
        host, port = MPI.COMM_WORLD.bcast(told)
    finally:
        MPI.Finalize()  # at once, so that leaving by os._exit does not look like a crash to mpirun
    if host is None:
        raise lacking
    return host, port


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]

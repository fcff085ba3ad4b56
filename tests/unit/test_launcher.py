"""From what each launcher leaves in the environment to a process's place.

The sets were printed by the launchers (deepspeed 0.19.8, torchrun 2.13, Slurm 22.05, Open MPI 5.0, MPICH 5.0), then
shortened and put on other hosts; Slurm's interactive and batch steps and PMI-2 follow its documentation.
"""

from __future__ import annotations

import pytest

from megad2v.engine.launcher import PORTS, Place, _tasks_per_node, export_place, find_place, first_host
from megad2v.errors import UserError


def _variables(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


DEEPSPEED = _variables(
    "RANK=5 LOCAL_RANK=1 WORLD_SIZE=8 LOCAL_SIZE=4 CROSS_RANK=1 CROSS_SIZE=2 "
    "MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 CUDA_VISIBLE_DEVICES=0,1,2,3"
)
TORCHRUN = _variables(
    "RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 GROUP_WORLD_SIZE=2 ROLE_RANK=3 "
    "MASTER_ADDR=node-a MASTER_PORT=29400 TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RUN_ID=none "
    "TORCHELASTIC_RESTART_COUNT=0"
)
ALLOCATION = _variables(
    "SLURM_JOB_ID=1234 SLURM_JOBID=1234 SLURM_NTASKS=6 SLURM_NPROCS=6 SLURM_NNODES=2 SLURM_NODELIST=gpu[08-09] "
    "SLURM_JOB_NODELIST=gpu[08-09] SLURM_TASKS_PER_NODE=4,2"
)
BATCH_SHELL = ALLOCATION | _variables("SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_TASK_PID=4711")
SRUN = BATCH_SHELL | _variables(
    "SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NODEID=1 SLURM_STEP_ID=0 SLURM_STEPID=0 SLURM_STEP_NUM_TASKS=6 "
    "SLURM_STEP_NUM_NODES=2 SLURM_STEP_TASKS_PER_NODE=4,2 SLURM_STEP_NODELIST=gpu[08-09] "
    "SLURM_LAUNCH_NODE_IPADDR=10.0.0.1"
)
OPEN_MPI = _variables(
    "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 "
    "OMPI_COMM_WORLD_NODE_RANK=1 OMPI_UNIVERSE_SIZE=2 PMIX_NAMESPACE=prterun-gpu08-1941@1 PMIX_RANK=1"
)
OPEN_MPI_TWO_HOSTS = OPEN_MPI | _variables("OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=1")
MPICH = _variables("PMI_RANK=1 PMI_SIZE=2 PMI_FD=9 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2 HYDI_CONTROL_FD=8")


def test_deepspeed() -> None:
    assert find_place(DEEPSPEED) == Place("deepspeed", 5, 8, 1, 4, "10.0.0.1", 29500)


def test_torchrun() -> None:
    place = find_place(TORCHRUN)
    assert place == Place("torchrun", 3, 4, 1, 2, "node-a", 29400)
    assert not place.one_host


def test_plain_python() -> None:
    place = find_place({"PATH": "/bin"})
    assert place == Place("python", 0, 1, 0, 1, "127.0.0.1", 0)
    assert place.one_host


def test_srun() -> None:
    place = find_place(SRUN)
    assert (place.launcher, place.rank, place.size, place.local_rank, place.local_size) == ("srun", 5, 6, 1, 2)
    assert place.host == "gpu08"
    assert place.port in PORTS


def test_tasks_of_a_step_agree_on_the_port_and_steps_differ() -> None:
    other = SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    assert find_place(other).port == find_place(SRUN).port
    assert find_place(other).local_size == 4
    assert find_place(SRUN | {"SLURM_STEP_ID": "1"}).port != find_place(SRUN).port


def test_srun_on_one_node_needs_no_name() -> None:
    one = {"SLURM_STEP_TASKS_PER_NODE": "6", "SLURM_STEP_NODELIST": "gpu08", "SLURM_NODEID": "0"}
    assert find_place(SRUN | one).host == "127.0.0.1"


def test_users_address_and_port_win() -> None:
    own = {"MASTER_ADDR": "gpu08-ib", "MASTER_PORT": "4444"}
    for variables in (SRUN, OPEN_MPI, OPEN_MPI_TWO_HOSTS, MPICH):
        place = find_place(variables | own)
        assert (place.host, place.port) == ("gpu08-ib", 4444)


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param(BATCH_SHELL, id="sbatch"),
        pytest.param(ALLOCATION, id="salloc"),
        # salloc whose shell Slurm itself starts as a step (LaunchParameters=use_interactive_step)
        pytest.param(SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, id="interactive"),
        # the number that Slurm gives the step of a batch script
        pytest.param(SRUN | {"SLURM_STEP_ID": "4294967291"}, id="batch step"),
    ],
)
def test_a_shell_inside_an_allocation_is_no_task(variables: dict[str, str]) -> None:
    assert find_place(variables) == Place("python", 0, 1, 0, 1, "127.0.0.1", 0)


def test_launchers_inside_slurm_win_over_slurm() -> None:
    assert find_place(SRUN | TORCHRUN).launcher == "torchrun"
    assert find_place(SRUN | DEEPSPEED).launcher == "deepspeed"
    # mpirun starts its daemons by srun: its ranks inherit the daemon's variables
    place = find_place(SRUN | OPEN_MPI)
    assert (place.launcher, place.rank, place.size) == ("mpirun", 1, 2)
    assert find_place(SRUN | MPICH).launcher == "mpirun"


def test_srun_with_pmi2_is_srun() -> None:
    assert find_place(SRUN | {"PMI_RANK": "5", "PMI_SIZE": "6", "PMI_FD": "9"}).launcher == "srun"


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH], ids=["open mpi", "mpich"])
def test_mpirun_on_one_host(variables: dict[str, str]) -> None:
    place = find_place(variables)
    assert (place.launcher, place.rank, place.size, place.local_rank, place.local_size) == ("mpirun", 1, 2, 1, 2)
    assert place.host == "127.0.0.1"
    assert 1024 < place.port < 32768


def test_mpirun_on_two_hosts_has_to_ask() -> None:
    place = find_place(OPEN_MPI_TWO_HOSTS)
    assert place.host is None and not place.one_host


def test_two_jobs_of_mpirun_get_two_ports() -> None:
    other = OPEN_MPI | {"PMIX_NAMESPACE": "prterun-gpu08-1999@1"}
    assert find_place(OPEN_MPI).port != find_place(other).port


def test_export() -> None:
    variables = dict(SRUN)
    export_place(find_place(variables), variables)
    assert {name: variables[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    again = find_place(variables)
    assert (again.rank, again.size, again.host, again.port) == (5, 6, "gpu08", int(variables["MASTER_PORT"]))


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, ["WORLD_SIZE", "expected a number"]),
        ({"RANK": "one", "WORLD_SIZE": "2"}, ["RANK", "'one'"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ["rank 2 of 2"]),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ["LOCAL_RANK", "not set"]),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"}, ["MASTER_ADDR", "not set"]),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}, ["MASTER_PORT", "not set"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE", "RANK", "torchrun"]),
        (SRUN | {"SLURM_STEP_NODELIST": "", "SLURM_NODELIST": ""}, ["SLURM_STEP_NODELIST", "MASTER_ADDR"]),
    ],
)
def test_contradictions_are_one_line(variables: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        find_place(variables)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_srun_whose_batch_script_exports_world_size() -> None:
    assert find_place(SRUN | {"WORLD_SIZE": "6"}).rank == 5


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[08-11,20],cpu1", "gpu08"),
        ("gpu[3,5-6]", "gpu3"),
        ("rack[1-2]n[08-11,20],gpu7", "rack1n08"),
        ("node-a,node-b", "node-a"),
        ("node[1-2]-ib", "node1-ib"),
        ("", ""),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(("text", "counts"), [("4(x2),1", [4, 4, 1]), ("8", [8]), ("2,1(x3)", [2, 1, 1, 1]), ("", [])])
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert _tasks_per_node(text) == counts

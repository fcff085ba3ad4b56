"""Start-up of the processes, and the few collectives that the rest of the code asks for by name."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megad2v.engine.hang import longest_silence
from megad2v.engine.launcher import Place, export_place, find_place
from megad2v.engine.rendezvous import RendezvousError, choose_interface, meet
from megad2v.errors import UserError
from megad2v.parallel.topology import Axis, Topology


@dataclass(frozen=True)
class World:
    """Where this process stands."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    topology: Topology

    @property
    def all(self) -> Axis:
        """Its place among all ranks."""
        return Axis(self.rank, self.size)

    @property
    def data(self) -> Axis:
        """Its place among the data-parallel ranks, which share out the micro-batches of a step."""
        return self.topology.data

    @property
    def tensor(self) -> Axis:
        """Its place among the tensor-parallel ranks, which see the same micro-batches."""
        return self.topology.tensor

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes shared files."""
        return self.rank == 0


def on_gpu() -> bool:
    """Whether this process computes on a GPU: there is one, and DS_ACCELERATOR does not say cpu."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def prepare_environment() -> None:
    """Before DeepSpeed is imported: choose its accelerator and quiet its compilation probes.

    On a CPU, `init_distributed` would compile a shared-memory op that training never uses, and crashes where there is
    no compiler; an empty table of compatible ops skips it.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    level = os.environ.setdefault("DS_LOG_LEVEL", "error").upper()
    # torch 2.13 renames collectives that DeepSpeed 0.19 still calls by their old names, with a warning per call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    if not on_gpu():
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(level)


def start(
    rank_from_launcher: int | None = None,
    *,
    tensor_parallel: int = 1,
    rendezvous_timeout: float = 300.0,
    hang_timeout: float = 0.0,
) -> World:
    """Join the process group (NCCL on GPUs, gloo on CPUs). One process without a launcher works too.

    Raises UserError where `tensor_parallel` does not divide the number of ranks, RendezvousError where they do not
    meet within `rendezvous_timeout` seconds. Collectives after that wait as long as `collective_limit` says.
    """
    place = find_place(os.environ)
    prepare_environment()
    cuda = on_gpu()
    place = replace(place, local_rank=place.local_rank if rank_from_launcher is None else rank_from_launcher)
    if cuda:
        place = replace(place, local_rank=_visible_gpu(place.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(place.local_rank)
    place = export_place(place)
    if place.size % tensor_parallel:
        raise UserError(
            f"parallel.tensor: groups of {tensor_parallel} cannot be formed of {place.size} in all; start a multiple "
            f"of {tensor_parallel} processes, or set parallel.tensor 1"
        )
    _join(place, "nccl" if cuda else "gloo", rendezvous_timeout, collective_limit(hang_timeout))
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, place.local_size)))
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    if tensor_parallel > 1:
        # Every rank of a group computes the gradients of convolutions, and cuDNN's may differ in the last bit.
        torch.backends.cudnn.deterministic = True
    topology = Topology(tensor_parallel, device.type)
    return World(place.rank, place.size, place.local_rank, place.local_size, device, topology)


def _visible_gpu(local_rank: int, visible: int) -> int:
    """Index of this process's GPU among those it sees: with `srun --gpus-per-task=1` each process sees only its own."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        error = UserError(
            f"process {local_rank + 1} on this host, but {visible} GPUs are visible to it: "
            "start one process per GPU (slots of the hostfile, --nproc-per-node, --ntasks-per-node)"
        )
        error.on_one_rank = True  # the first processes of the host have theirs
        raise error
    return local_rank


def collective_limit(hang_timeout: float) -> timedelta:
    """How long a collective may wait: DeepSpeed's 10 minutes, or longer where the watchdog is to speak first. An
    explicit DEEPSPEED_TIMEOUT (minutes) wins."""
    from deepspeed.constants import default_pg_timeout

    if hang_timeout <= 0 or "DEEPSPEED_TIMEOUT" in os.environ:
        return default_pg_timeout
    return max(default_pg_timeout, timedelta(seconds=longest_silence(hang_timeout)))


def limit_all_groups(limit: timedelta) -> None:
    """Give every process group of this process the same limit: groups made after the first start with torch's own."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(limit, group)


def _join(place: Place, backend: str, timeout: float, limit: timedelta) -> None:
    """Meet, choose gloo's interface, create the process group. Every rank talks to the store at MASTER_ADDR, and gloo
    then connects all pairs, on ports that the kernel picks."""
    import deepspeed

    meeting = meet(place, timeout) if place.size > 1 else None
    interface = choose_interface(meeting) if meeting else None
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        if place.rank == 0:
            print(f"gloo: interface {interface}, the way to the other hosts (GLOO_SOCKET_IFNAME overrides)", flush=True)
    try:
        # gloo waits for a peer's connection five times the group's limit (10 minutes), so until all pairs are connected
        # the group has a fifth of ours.
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            verbose=False,
            dist_init_required=True,
            timeout=timedelta(seconds=max(1.0, timeout / 5)) if backend == "gloo" else limit,
        )
        limit_all_groups(limit)
    except RuntimeError as error:
        raise RendezvousError(
            f"rank {place.rank} of {place.size}: all ranks met at {place.host}:{place.port}, but {backend} could not "
            f"connect them ({str(error).strip().splitlines()[0]}); check that hosts reach each other on all ports and "
            f"which interface is used (GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME', '')}, "
            f"NCCL_SOCKET_IFNAME={os.environ.get('NCCL_SOCKET_IFNAME', '')})"
        ) from error
    del meeting  # the process group has a server of its own by now, on the same socket


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def broadcast_text(text: str) -> str:
    """Rank 0's `text` on every rank."""
    carried = [text]
    dist.broadcast_object_list(carried)
    return carried[0]


def joined() -> bool:
    """Whether this process is in the process group by now."""
    return dist.is_initialized()


def stop() -> bool:
    """Leave together: a rank that tears its group down while others still use it makes them fail. False where this
    process had not joined any."""
    if not dist.is_initialized():
        return False
    dist.barrier()
    dist.destroy_process_group()
    return True


def leave_now(exit_code: int) -> NoReturn:
    """End the process without interpreter shutdown, which now and then aborts in a thread of the process group (seen 1
    time in 26, exit code -6 after all was done). For a rank that fails alone it also does not wait for the others:
    they are in a collective that it cannot join, and the launcher ends them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def together(action: Callable[[], Any], *, errors: tuple[type[Exception], ...], raises: type[Exception]) -> list[Any]:
    """Run `action` on every rank; the results, in rank order, on rank 0 (an empty list elsewhere).

    If any rank raised one of `errors`, every rank raises `raises` with what went wrong and where: no rank is left
    waiting in the next collective for one that gave up. One gather of small objects to rank 0 and one broadcast.
    """
    try:
        outcome = (action(), None)
    except errors as error:
        outcome = (None, str(error) or type(error).__name__)
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(outcome, gathered)
    message = [_merge([problem for _, problem in gathered]) if gathered is not None else None]
    dist.broadcast_object_list(message)
    if message[0]:
        raise raises(message[0])
    return [result for result, _ in gathered] if gathered is not None else []


def _merge(problems: list[str | None]) -> str | None:
    """One line for the same trouble on all ranks; the ranks named where only some have it."""
    ranks: dict[str, list[int]] = {}
    for rank, problem in enumerate(problems):
        if problem:
            ranks.setdefault(problem, []).append(rank)
    if not ranks:
        return None
    if len(ranks) == 1 and len(next(iter(ranks.values()))) == len(problems):
        return next(iter(ranks))
    return "; ".join(f"rank {', '.join(map(str, where))}: {problem}" for problem, where in ranks.items())


def sum_over(axis: Axis, values: torch.Tensor) -> torch.Tensor:
    """All-reduce (sum) a small tensor in place over the ranks of `axis`; 2 x its bytes per rank."""
    if axis.size > 1:
        dist.all_reduce(values, group=axis.group)
    return values

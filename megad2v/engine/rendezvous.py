"""All ranks meet before any collective, or each says why not.

Who talks to whom: every rank connects to one TCPStore at MASTER_ADDR:MASTER_PORT. torchrun's agent owns it
(TORCHELASTIC_USE_AGENT_STORE); under any other launcher rank 0 does, in its own process, and torch's own start-up then
shares that server instead of binding the port again. A rank registers (four small messages), and the last of them to
come writes the verdict "met"; a rank whose time is up writes the verdict "missing". The first verdict holds for all, so
nobody goes on to a collective that others have given up.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megad2v.engine import network
from megad2v.engine.launcher import Place
from megad2v.errors import UserError

PROBE_S = 5.0  # for one attempt to connect, before the next
FIRST_POLL_S, LONGEST_POLL_S = 0.02, 0.5
MET, MISSING, TWICE = "met", "missing", "twice"


class RendezvousError(UserError):
    """The ranks did not meet. Each of them says so, because only it knows what it tried."""

    exit_code = 1
    on_one_rank = True


@dataclass
class Meeting:
    """Where the ranks have met. Keep it until the process group is there: rank 0's server lives in it."""

    place: Place
    store: dist.Store


def meet(place: Place, timeout: float) -> Meeting:
    """Wait until all ranks are at the store. Raises RendezvousError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    tcp = _serve(place, timeout) if _is_server(place) else _connect(place, timeout, deadline)
    # A worker group that torchrun restarts may find the store of the last attempt.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    meeting = Meeting(place, dist.PrefixStore(f"megad2v/rendezvous/{attempt}", tcp))
    try:
        _register(meeting)
        verdict = _wait(meeting, deadline)
        if verdict != MET:
            raise RendezvousError(_why(meeting, verdict, timeout))
    except RuntimeError as error:  # torch's DistError is one
        raise RendezvousError(
            f"{_who(place)} had reached {_where(place)}, but lost the connection before all ranks were there "
            f"({_first_line(error)}): rank 0 ended; its own message says why"
        ) from None
    return meeting


def choose_interface(meeting: Meeting) -> str | None:
    """The interface that gloo should use between several hosts: the one towards the others. None: leave it to gloo.

    gloo takes the one that carries the address of the host's own name, which is loopback where /etc/hosts says so (as
    Debian's does): then the other hosts try to connect to themselves. A variable that the user set always wins.
    """
    place = meeting.place
    assert place.host is not None
    if place.one_host or os.environ.get("GLOO_SOCKET_IFNAME"):
        return None
    try:
        own = network.source_address(place.host)
        if network.is_loopback(own):  # beside rank 0, whose name may mean loopback here: ask the way to another host
            others = (meeting.store.get(f"address/{rank}").decode() for rank in range(place.size))
            far = next((address for address in others if address and not network.is_loopback(address)), None)
            if far is None:
                return None
            own = network.source_address(far)
        return network.interface_of(own)
    except OSError:
        return None


def _is_server(place: Place) -> bool:
    return place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _serve(place: Place, timeout: float) -> dist.Store:
    """Rank 0's server. multi_tenant: a second TCPStore of this process on the same port shares it."""
    try:
        # The server listens on all interfaces; its own client need not depend on what MASTER_ADDR means here.
        return _store("127.0.0.1", place, timeout, is_master=True)
    except RuntimeError as error:
        busy = "EADDRINUSE" in str(error)
        why = "another program has this port" if busy else _first_line(error)
        raise RendezvousError(
            f"{_who(place)} cannot listen on port {place.port} of {socket.gethostname()}: {why}; "
            "choose another (deepspeed --master_port, torchrun --master-port, else MASTER_PORT)"
        ) from None


def _connect(place: Place, timeout: float, deadline: float) -> dist.Store:
    """Try to reach the server until the deadline; say what stood in the way the last time."""
    assert place.host is not None
    pause = FIRST_POLL_S
    while True:
        # torch would print a warning per attempt, and tell neither a wrong name from a closed port.
        why = _probe(place.host, place.port, min(PROBE_S, max(0.1, deadline - time.monotonic())))
        if why is None:
            break
        if time.monotonic() + pause >= deadline:
            raise RendezvousError(f"{_who(place)} could not reach {_where(place)} within {timeout:g} s: {why}")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_POLL_S)
    try:
        return _store(place.host, place, max(1.0, deadline - time.monotonic()), is_master=False)
    except RuntimeError as error:
        raise RendezvousError(
            f"{_who(place)} reached {_where(place)}, but what answers there is no store of torch "
            f"({_first_line(error)}): check MASTER_ADDR and MASTER_PORT"
        ) from None


def _store(host: str, place: Place, timeout: float, *, is_master: bool) -> dist.Store:
    return dist.TCPStore(
        host,
        place.port,
        place.size,
        is_master=is_master,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _probe(host: str, port: int, timeout: float) -> str | None:
    """None where something listens at host:port, else what is wrong and what to check."""
    try:
        socket.create_connection((host, port), timeout=timeout).close()
    except socket.gaierror as error:
        return (
            f"the name {host!r} does not resolve on {socket.gethostname()} ({error.strerror}); "
            "set MASTER_ADDR (deepspeed --master_addr) to rank 0's host, as a name or an address that is known here"
        )
    except ConnectionRefusedError:
        return (
            "connection refused, so nothing listens there; check that rank 0 was started, on that host, "
            "and that MASTER_ADDR and MASTER_PORT are the same everywhere"
        )
    except TimeoutError:
        return "no answer; check that MASTER_ADDR is the right address and that no firewall drops the port"
    except OSError as error:
        return f"{error.strerror or error}; check MASTER_ADDR and the network of {socket.gethostname()}"
    return None


def _register(meeting: Meeting) -> None:
    """Say that this rank is here. The last one to come finds the verdict; so does a number that is taken."""
    place, store = meeting.place, meeting.store
    assert place.host is not None
    try:
        address = network.source_address(place.host)
    except OSError:
        address = ""
    store.set(f"address/{place.rank}", address)
    expected = store.compare_set("size", "", str(place.size)).decode()
    if expected != str(place.size):
        raise RendezvousError(
            f"{_who(place)} met ranks of a job of {expected} at {_where(place)}: the hosts were started with different "
            "numbers of nodes or slots, or two jobs share the port"
        )
    if store.add(f"rank/{place.rank}", 1) > 1:
        store.compare_set("verdict", "", f"{TWICE} {place.rank}")
    elif store.add("ranks", 1) == place.size:
        store.compare_set("verdict", "", MET)


def _wait(meeting: Meeting, deadline: float) -> str:
    """The verdict, which this rank gives itself when its time is up. Polling: a blocking wait that runs out of time
    prints warnings of its own."""
    pause = FIRST_POLL_S
    while not meeting.store.check(["verdict"]):
        if time.monotonic() >= deadline:
            return meeting.store.compare_set("verdict", "", MISSING).decode()
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_POLL_S)
    return meeting.store.get("verdict").decode()


def _why(meeting: Meeting, verdict: str, timeout: float) -> str:
    place, store = meeting.place, meeting.store
    what, _, number = verdict.partition(" ")
    if what == TWICE:
        return (
            f"{_who(place)} met two processes at {_where(place)} that are both rank {number}: give each host its own "
            "--node_rank, do not export RANK to all, and give each job its own port (--master_port)"
        )
    missing = [rank for rank in range(place.size) if not store.check([f"rank/{rank}"])]
    if not missing:
        return f"{_who(place)} came to {_where(place)} after the others had given up (train.rendezvous_timeout)"
    hint = ""
    assert place.host is not None
    if _is_server(place) and not network.is_own(place.host):
        hint = f"MASTER_ADDR {place.host} is no address of this host, {socket.gethostname()}, where rank 0 runs; "
    return (
        f"{_who(place)} waited {timeout:g} s (train.rendezvous_timeout) at {_where(place)}: "
        f"{place.size - len(missing)} of {place.size} ranks came, missing: {_ranges(missing)}; {hint}check that "
        "every host was started (the hostfile's slots, --nnodes, --node_rank), with this MASTER_ADDR, and that no "
        "firewall closes the port"
    )


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _who(place: Place) -> str:
    return f"rank {place.rank} of {place.size}"


def _where(place: Place) -> str:
    return f"{place.host}:{place.port}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

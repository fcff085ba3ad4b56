"""Questions about this host's addresses and interfaces. Nothing here sends a packet, but for look-ups of names."""

from __future__ import annotations

import contextlib
import ipaddress
import socket


def is_loopback(address: str) -> bool:
    """Whether an address is of the kind that other hosts cannot reach."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def resolve(host: str) -> str:
    """The first address of a name. Raises socket.gaierror."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def own_address() -> str | None:
    """An address at which other hosts reach this one: its name's, else that of the default route, else that of any
    interface. None: there is only loopback (Debian's /etc/hosts maps a host's own name to 127.0.1.1)."""
    with contextlib.suppress(OSError):
        address = resolve(socket.gethostname())
        if not is_loopback(address):
            return address
    with contextlib.suppress(OSError):
        return source_address("192.0.2.1")  # reserved for documentation: only the default route leads there
    for _, address in interfaces():
        if not is_loopback(address):
            return address
    return None


def source_address(host: str) -> str:
    """Our own address on the way to a host, from the routing table. Raises OSError where no way leads there."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # of a datagram socket: it chooses the route and sends nothing
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Name of the interface that carries one of our addresses."""
    return next((name for name, own in interfaces() if own == address), None)


def interfaces() -> list[tuple[str, str]]:
    """(interface, address) of all that this host has, IPv4 first."""
    import psutil  # DeepSpeed requires it

    found = [
        (name, entry.address.partition("%")[0])
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    ]
    return sorted(found, key=lambda pair: ":" in pair[1])


def is_own(host: str) -> bool:
    """Whether a name or address is this host's; only an address of its own can be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True

"""Which of this host's addresses a peer reaches, and what a process id means here."""

import os
import socket
from pathlib import Path


def own_address(towards: str) -> str:
    """The address of the interface by which this host reaches `towards` (a name or an address). No packet is sent.
    ValueError if the name does not resolve or no route leads there."""
    try:
        family, _, _, _, target = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ValueError(f"address {towards!r} cannot be reached ({error}); set MASTER_ADDR to the address of rank 0") from None


def listens(address: str, port: int, patience: float = 1.0) -> bool:
    """Whether someone accepts connections there."""
    try:
        socket.create_connection((address, port), patience).close()
    except OSError:
        return False
    return True


def machine_identity() -> str:
    """Equal for two processes if and only if they run under one kernel and see the same process ids, so that each can name,
    watch and end the other by its process id: the boot id and the pid namespace. "" where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""

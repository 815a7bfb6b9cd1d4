"""Which of this host's addresses a peer reaches."""

import socket


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

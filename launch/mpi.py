"""Ranks that mpirun started: they agree on where to meet by MPI itself, so that the user need not say."""

import fcntl
import json
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from ipaddress import ip_address
from typing import Any

from collectives.network import own_address
from collectives.rendezvous import Rendezvous
from launch.local import ADDRESS, new_token

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_ANYWHERE = "192.0.2.1"  # set aside for documentation; only the route to it is asked for
_PATIENCE = 2.0  # seconds, for a connection inside a cluster
_TOLD_BYTES = 4096
_NONCE_BYTES = 16
_MOST_CANDIDATES = 32


@dataclass(frozen=True, slots=True)
class _Place:
    address: str
    port: int
    token: str
    listener: int | None = None


def meet(rendezvous: Rendezvous) -> Rendezvous:
    """`rendezvous` with an address, a port (which rank 0 holds open as its listener) and, if it had none, a fresh token.

    Every rank calls it, before anything that can fail on one of them alone; a repeated call gives the same answer. MPI stays
    initialised until `part`. Returns `rendezvous` as it is, and loads nothing, where the ranks need not look for each other.
    The address: MASTER_ADDR if it is set; loopback if all ranks are on one host; otherwise the first of rank 0's host that all
    other ranks reach. Raises ValueError, in one line, if there is none or MPI cannot be used; CollectiveError if MPI fails.
    """
    if rendezvous.size == 1 or rendezvous.port != 0:
        return rendezvous
    sure = rendezvous.address != ADDRESS or rendezvous.local_size == rendezvous.size
    place = _meet(rendezvous.rank, rendezvous.size, rendezvous.address if sure else None)
    token = rendezvous.token or place.token
    return replace(rendezvous, address=place.address, port=place.port, listener=place.listener, token=token)


def part() -> None:
    """Finalises MPI if `meet` initialised it, for runs that talk by other means. Every rank calls it once all have joined; from
    then on mpirun lets each rank end when it likes. Harmless where nobody met."""
    if _meet.cache_info().currsize:
        from collectives.mpi import library

        library().finalize()


@cache
def _meet(rank: int, size: int, address: str | None) -> _Place:
    from collectives.mpi import naming_failures, world

    try:
        library, comm = world(rank, size)
    except ValueError as error:
        raise ValueError(f"ranks started by mpirun find each other by MPI: {error}, or set MASTER_ADDR and MASTER_PORT") from None
    with naming_failures(library):
        talk = _Talk(library.module, comm)
        return _serve(talk, size, address) if rank == 0 else _look(talk, address is not None)


class _Talk:
    """What the ranks tell each other over `comm`: bytes, by MPI's methods for buffers."""

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._mpi, self._comm = mpi, comm

    def broadcast(self, told: dict[str, Any] | None = None) -> dict[str, Any]:
        """What rank 0 tells."""
        buffer = bytearray(json.dumps(told).encode().ljust(_TOLD_BYTES))
        assert len(buffer) == _TOLD_BYTES, "more than fits"
        self._comm.Bcast([buffer, self._mpi.BYTE], 0)
        heard: dict[str, Any] = json.loads(buffer)
        return heard

    def gather(self, mine: bytes) -> list[bytes]:
        """Every rank's bytes, of one length, for rank 0 (and nothing useful elsewhere)."""
        rows = bytearray(len(mine) * self._comm.Get_size())
        self._comm.Gather([mine, self._mpi.BYTE], [rows, self._mpi.BYTE], 0)
        return [bytes(rows[i : i + len(mine)]) for i in range(0, len(rows), len(mine))]


def _serve(talk: _Talk, size: int, address: str | None) -> _Place:
    """Rank 0: listens on every candidate, and keeps the first one that all others have come to."""
    nonce, token = secrets.token_bytes(_NONCE_BYTES), new_token()
    with ExitStack() as stack:
        listeners = [stack.enter_context(s) for s in _listeners(_candidates() if address is None else [address], size)]
        places = [listener.getsockname()[:2] for listener in listeners]
        talk.broadcast({"places": places, "nonce": nonce.hex(), "token": token})
        if address is None and places:
            came = [sum(column) for column in zip(*talk.gather(bytes(len(places))), strict=True)]
            full = (i for i, count in enumerate(came) if count == size - 1 and _all_came(listeners[i], nonce, size - 1))
            chosen = next(full, -1)
            talk.broadcast({"chosen": chosen})
        else:
            chosen = 0 if places else -1
        if chosen < 0:
            raise _nowhere(address, [place[0] for place in places])
        found, port = places[chosen]
        return _Place(found, port, token, listeners[chosen].detach())


def _look(talk: _Talk, sure: bool) -> _Place:
    """The other ranks: try every candidate at once, and hear which one it is."""
    told = talk.broadcast()
    places = [(str(address), int(port)) for address, port in told["places"]]
    chosen = 0 if places else -1
    if not sure and places:
        with ExitStack() as stack, ThreadPoolExecutor(len(places)) as pool:
            calls = list(pool.map(lambda place: _call(place, bytes.fromhex(told["nonce"])), places))
            for call in calls:
                if call is not None:
                    stack.enter_context(call)
            talk.gather(bytes(call is not None for call in calls))
            chosen = talk.broadcast()["chosen"]
    if chosen < 0:
        raise _nowhere(None, [place[0] for place in places])
    return _Place(*places[chosen], told["token"])


def _call(place: tuple[str, int], nonce: bytes) -> socket.socket | None:
    try:
        call = socket.create_connection(place, _PATIENCE)
    except OSError:
        return None
    try:
        call.sendall(nonce)
    except OSError:
        call.close()
        return None
    return call


def _all_came(listener: socket.socket, nonce: bytes, count: int) -> bool:
    """Whether `count` callers show the nonce: another host may have the same address, and something that listens there."""
    deadline = time.monotonic() + _PATIENCE
    try:
        while count:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            call, _ = listener.accept()
            with call:
                call.settimeout(max(deadline - time.monotonic(), 0.001))
                count -= call.recv(_NONCE_BYTES, socket.MSG_WAITALL) == nonce
    except OSError:
        return False
    listener.settimeout(None)
    return True


def _listeners(addresses: Sequence[str], size: int) -> Iterator[socket.socket]:
    for address in addresses[:_MOST_CANDIDATES]:
        try:
            family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
            yield socket.create_server((address, 0), family=family, backlog=max(2 * size, 16))
        except OSError:
            continue


def _candidates() -> list[str]:
    """Addresses of this host that another one may reach, the likeliest first: of its name, of the way out, of each interface."""
    found = []
    try:
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM)]
    except OSError:
        pass
    try:
        found.append(own_address(_ANYWHERE))
    except ValueError:
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                told = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            found.append(socket.inet_ntoa(told[20:24]))
    usable = [a for a in found if "%" not in a and not (ip_address(a).is_loopback or ip_address(a).is_link_local)]
    return list(dict.fromkeys(usable))


def _nowhere(address: str | None, tried: Sequence[str]) -> ValueError:
    if address is not None:
        return ValueError(f"rank 0 cannot listen on {address!r}; set MASTER_ADDR to an address of its host")
    found = f"reach none of {', '.join(tried)}" if tried else "are told no address that rank 0 could listen on"
    return ValueError(f"the ranks {found}; set MASTER_ADDR to an address of rank 0's host and MASTER_PORT to a free port there")

"""The control channel: rank 0 to every other rank, over sockets or, for ranks that are threads, over queues.

A frame is four bytes of length, big-endian, and that many bytes of a message. A closed channel is how a death is noticed.
"""

import hmac
import queue
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod

from launch.watch import RankDied
from qtp.wire.codec import decode, encode
from qtp.wire.messages import Failure, Hello, Message, Ready

_LENGTH = struct.Struct(">I")
MAX_FRAME = 1 << 28
MAX_HELLO = 4096
LOST = "process is gone"
_DIFFERS = "its checkpoint or its settings differ from those of rank 0; give every rank the same"
_ACCEPT_SLICE = 0.05
_HELLO_PATIENCE = 5.0


class Closed(Exception):
    """The other end of the channel is gone."""


class _Inbox:
    """What the followers told rank 0: who is ready, and the first failure."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.readies: dict[int, Ready] = {}
        self.failed: list[RankDied] = []
        self.changed = threading.Condition()

    def put(self, hello: Hello, message: Message) -> None:
        with self.changed:
            if isinstance(message, Ready):
                self.readies[hello.rank] = message
            elif isinstance(message, Failure):
                death = RankDied(
                    hello.rank, hello.host, hello.pid, message.cause, details=message.details, user_error=message.user_error
                )
                self.failed.append(death)
            self.changed.notify_all()

    def lost(self, hello: Hello, cause: str) -> None:
        with self.changed:
            if all(death.rank != hello.rank for death in self.failed):
                self.failed.append(RankDied(hello.rank, hello.host, hello.pid, cause))
            self.changed.notify_all()

    def ready(self, timeout: float | None) -> list[Ready]:
        with self.changed:
            self.changed.wait_for(lambda: self.failed or len(self.readies) == self.size - 1, timeout)
            if self.failed:
                raise self.failed[0]
            if len(self.readies) < self.size - 1:
                missing = sorted(set(range(1, self.size)) - set(self.readies))
                raise TimeoutError(f"ranks {missing} were not ready within {timeout:g} s")
            return [self.readies[rank] for rank in sorted(self.readies)]

    def failure(self, wait: float) -> RankDied | None:
        with self.changed:
            self.changed.wait_for(lambda: bool(self.failed), wait)
            return self.failed[0] if self.failed else None


class Leader(ABC):
    """Rank 0's end, for `size` - 1 followers."""

    def __init__(self, size: int) -> None:
        self._inbox = _Inbox(size)

    def send(self, message: Message) -> None:
        """To every other rank. RankDied if one is gone."""
        self._deliver(encode(message))
        death = self._inbox.failure(0)
        if death is not None:
            raise death

    def ready(self, timeout: float | None = None) -> list[Ready]:
        """Waits until every other rank is ready; RankDied with the first failure otherwise. Reading weights may take its
        time, so there is no limit by default; TimeoutError naming the missing ranks if there is one."""
        return self._inbox.ready(timeout)

    def failure(self, wait: float) -> RankDied | None:
        """The first death or failure that a rank reported, waiting up to `wait` seconds for one to arrive."""
        return self._inbox.failure(wait)

    @abstractmethod
    def _deliver(self, frame: bytes) -> None:
        """Sends one encoded message to every follower; whom it does not reach is noted as lost."""

    @abstractmethod
    def close(self) -> None: ...


class Follower(ABC):
    """Any other rank's end."""

    @abstractmethod
    def send(self, message: Message) -> None: ...

    @abstractmethod
    def receive(self) -> Message:
        """Blocks for the next message. Closed if rank 0 is gone."""

    @abstractmethod
    def close(self) -> None: ...


class SocketLeader(Leader):
    """Listens on `address`, on a port of the system's choice, for `size` - 1 followers that know `token`. A follower whose
    `fingerprint` is another has failed, by a mistake of the user's: it was started with another model or other settings."""

    def __init__(self, address: str, size: int, token: str, fingerprint: str = "") -> None:
        super().__init__(size)
        self._fingerprint = fingerprint
        self._token = token
        self._listener = socket.create_server((address, 0), family=_family(address), backlog=max(size, 16))
        self.port: int = self._listener.getsockname()[1]
        self._peers: dict[int, tuple[Hello, socket.socket]] = {}
        self._strangers: set[socket.socket] = set()
        self._lock = threading.Lock()

    def accept(self, timeout: float) -> None:
        """Returns once every follower has said hello; TimeoutError naming the missing ranks otherwise. Each connection is met
        in a thread of its own, so one that is silent, slow or without the token holds nobody up."""
        deadline = time.monotonic() + timeout
        self._listener.settimeout(_ACCEPT_SLICE)
        while missing := sorted(set(range(1, self._inbox.size)) - set(self._peers)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks {missing} did not join the control channel within {timeout:g} s")
            try:
                peer, _ = self._listener.accept()
            except TimeoutError:
                continue
            self._strangers.add(peer)
            threading.Thread(target=self._meet, args=(peer,), daemon=True, name="control").start()
        self._listener.close()
        for stranger in list(self._strangers):
            _shut(stranger)

    def _deliver(self, frame: bytes) -> None:
        for hello, peer in self._peers.values():
            try:
                peer.sendall(_LENGTH.pack(len(frame)) + frame)
            except OSError:
                self._inbox.lost(hello, LOST)

    def close(self) -> None:
        self._listener.close()
        for peer in [*self._strangers, *(peer for _, peer in self._peers.values())]:
            _shut(peer)

    def _meet(self, peer: socket.socket) -> None:
        """Hears a connection's hello, and then, if it is a follower's, all that follows."""
        try:
            hello = self._greet(peer)
        finally:
            self._strangers.discard(peer)
        if hello is None:
            _shut(peer)
        else:
            self._listen(hello, peer)

    def _greet(self, peer: socket.socket) -> Hello | None:
        peer.settimeout(_HELLO_PATIENCE)
        try:
            hello = decode(_read_frame(peer, MAX_HELLO))
        except (Closed, ValueError, OSError):
            return None
        if not isinstance(hello, Hello) or not hmac.compare_digest(hello.token.encode("utf-8", "replace"), self._token.encode()):
            return None
        peer.settimeout(None)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            if not 0 < hello.rank < self._inbox.size or hello.rank in self._peers:
                return None
            self._strangers.discard(peer)  # before `accept` sees that all are there and ends the strangers
            self._peers[hello.rank] = (hello, peer)
        if hello.fingerprint != self._fingerprint:
            self._inbox.put(hello, Failure(rank=hello.rank, cause=_DIFFERS, details="", user_error=True))
        return hello

    def _listen(self, hello: Hello, peer: socket.socket) -> None:
        try:
            while True:
                self._inbox.put(hello, decode(_read_frame(peer, MAX_FRAME)))
        except (Closed, OSError):
            self._inbox.lost(hello, LOST)
        except ValueError as error:
            self._inbox.lost(hello, str(error))


class SocketFollower(Follower):
    """Connects to rank 0 at once and says hello."""

    def __init__(self, address: str, port: int, hello: Hello, timeout: float) -> None:
        try:
            self._socket = socket.create_connection((address, port), timeout)
        except OSError as error:
            raise Closed(f"rank 0 at {address}:{port} cannot be reached: {error}") from None
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.send(hello)

    def send(self, message: Message) -> None:
        frame = encode(message)
        try:
            self._socket.sendall(_LENGTH.pack(len(frame)) + frame)
        except OSError:
            raise Closed("rank 0 is gone") from None

    def receive(self) -> Message:
        try:
            return decode(_read_frame(self._socket, MAX_FRAME))
        except OSError:
            raise Closed("rank 0 is gone") from None

    def close(self) -> None:
        _shut(self._socket)


class QueueLeader(Leader):
    """Followers in threads of this process; messages are encoded as on a socket."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.followers = [QueueFollower(rank, self._inbox) for rank in range(1, size)]

    def _deliver(self, frame: bytes) -> None:
        for follower in self.followers:
            follower.frames.put(frame)

    def close(self) -> None:
        for follower in self.followers:
            follower.frames.put(None)


class QueueFollower(Follower):
    def __init__(self, rank: int, inbox: _Inbox) -> None:
        self.frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox = inbox
        self._hello = Hello(rank=rank, host="thread", pid=0, token="")

    def send(self, message: Message) -> None:
        self._inbox.put(self._hello, decode(encode(message)))

    def receive(self) -> Message:
        frame = self.frames.get()
        if frame is None:
            raise Closed("rank 0 closed the channel")
        return decode(frame)

    def close(self) -> None:
        self._inbox.lost(self._hello, "thread ended")


def _read_frame(peer: socket.socket, limit: int) -> bytes:
    (length,) = _LENGTH.unpack(_read(peer, _LENGTH.size))
    if length > limit:
        raise ValueError(f"a frame of {length} bytes is over the limit of {limit}")
    return _read(peer, length)


def _read(peer: socket.socket, count: int) -> bytes:
    parts, left = [], count
    while left:
        part = peer.recv(min(left, 1 << 20))
        if not part:
            raise Closed("the other end closed the channel")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _family(address: str) -> socket.AddressFamily:
    return socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]


def _shut(peer: socket.socket) -> None:
    try:
        peer.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    peer.close()

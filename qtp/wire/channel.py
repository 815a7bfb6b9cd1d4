"""The control channel: rank 0 to every other rank, over sockets. A closed channel is how a death is noticed."""

import queue
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

from launch.watch import RankDied, Sign
from qtp.wire.frames import MAX_FRAME, MAX_HELLO, Closed, framed, preface, read_message, shows, shut
from qtp.wire.messages import Failure, Hello, Message, Ping, Pong, Ready, Stop, Welcome

LOST = "process is gone"
_DIFFERS = "its checkpoint or its settings differ from those of rank 0; give every rank the same"
_ACCEPT_SLICE = 0.05
_HELLO_PATIENCE = 5.0
_MOST_STRANGERS = 64


class Inbox:
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
        self.dead(RankDied(hello.rank, hello.host, hello.pid, cause))

    def dead(self, death: RankDied) -> None:
        with self.changed:
            if all(other.rank != death.rank for other in self.failed):
                self.failed.append(death)
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
        self._inbox = Inbox(size)

    def send(self, message: Message) -> None:
        """To every other rank. RankDied if one is gone."""
        self._deliver(message)
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

    def report(self, death: RankDied) -> None:
        """Adds a death that was found out otherwise."""
        self._inbox.dead(death)

    @abstractmethod
    def _deliver(self, message: Message) -> None:
        """Sends a message to every follower; whom it does not reach is noted as lost."""

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


class _Peer:
    """A follower as rank 0 sees it."""

    def __init__(self, hello: Hello, connection: socket.socket) -> None:
        self.hello, self.connection = hello, connection
        self.sending = threading.Lock()
        self.unanswered = 0
        self.entered = 0


class SocketLeader(Leader):
    """Listens on `address`, on a port of the system's choice, for `size` - 1 followers that know `token`, and says who rank 0 is
    by `welcome`. A follower whose `fingerprint` is another has failed, by a mistake of the user's: it was started with another
    model or other settings."""

    def __init__(self, address: str, size: int, token: str, fingerprint: str = "", welcome: Welcome | None = None) -> None:
        super().__init__(size)
        self._fingerprint = fingerprint
        self._token = token
        self._welcome = welcome or Welcome(host="", pid=0)
        self._listener = socket.create_server((address, 0), family=_family(address), backlog=max(size, 16))
        self.port: int = self._listener.getsockname()[1]
        self._peers: dict[int, _Peer] = {}
        self._strangers: dict[socket.socket, None] = {}  # oldest first
        self._lock = threading.Lock()

    def accept(self, timeout: float) -> None:
        """Returns once every follower has said hello; TimeoutError naming the missing ranks otherwise. Each connection is met
        in a thread of its own, so one that is silent, slow or without the token holds nobody up; of many such the oldest are
        closed. Those who have come are told, once a second, that rank 0 lives."""
        deadline = time.monotonic() + timeout
        told = time.monotonic()
        self._listener.settimeout(_ACCEPT_SLICE)
        while missing := sorted(set(range(1, self._inbox.size)) - set(self._peers)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks {missing} did not join the control channel within {timeout:g} s")
            if time.monotonic() > told + 1.0:
                told = time.monotonic()
                self.ping(counting=False)
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            while len(self._strangers) >= _MOST_STRANGERS + self._inbox.size:
                oldest = next(iter(self._strangers))
                self._strangers.pop(oldest, None)
                shut(oldest)
            self._strangers[connection] = None
            threading.Thread(target=self._meet, args=(connection,), daemon=True, name="control").start()
        self._listener.close()
        for stranger in list(self._strangers):
            shut(stranger)

    def ping(self, *, counting: bool = True) -> None:
        """Asks every follower for a sign of life. Never blocks for long: a follower that is being sent something is left out.
        counting: that it is asked counts against a follower until it answers."""
        frame = framed(Ping())
        for peer in list(self._peers.values()):
            peer.unanswered += counting
            if peer.sending.acquire(blocking=False):
                try:
                    peer.connection.sendall(frame)
                except OSError:
                    self._inbox.lost(peer.hello, LOST)
                finally:
                    peer.sending.release()

    def signs(self, tick: float) -> list[Sign]:
        """What is known of each follower, if `ping` is called every `tick` seconds."""
        peers = sorted(self._peers.items())
        return [Sign(rank, p.hello.host, p.hello.pid, p.unanswered * tick, p.entered) for rank, p in peers]

    def machine(self, rank: int) -> str:
        """Where `rank` said that its process id holds."""
        return self._peers[rank].hello.machine

    def close(self) -> None:
        self._listener.close()
        for connection in [*self._strangers, *(peer.connection for peer in self._peers.values())]:
            shut(connection)

    def _deliver(self, message: Message) -> None:
        frame = framed(message)
        for peer in self._peers.values():
            try:
                with peer.sending:
                    peer.connection.sendall(frame)
            except OSError:
                self._inbox.lost(peer.hello, LOST)

    def _meet(self, connection: socket.socket) -> None:
        """Hears a connection's hello, and then, if it is a follower's, all that follows."""
        try:
            peer = self._greet(connection)
        finally:
            self._strangers.pop(connection, None)
        if peer is None:
            shut(connection)
        else:
            self._listen(peer)

    def _greet(self, connection: socket.socket) -> _Peer | None:
        connection.settimeout(_HELLO_PATIENCE)
        try:
            hello = read_message(connection, MAX_HELLO) if shows(connection, self._token) else None
        except (Closed, ValueError, OSError):
            return None
        if not isinstance(hello, Hello):
            return None
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            if not 0 < hello.rank < self._inbox.size or hello.rank in self._peers:
                return None
            self._strangers.pop(connection, None)  # before `accept` sees that all are there and ends the strangers
            try:
                connection.sendall(framed(self._welcome))
            except OSError:
                return None
            peer = self._peers[hello.rank] = _Peer(hello, connection)
        if hello.fingerprint != self._fingerprint:
            self._inbox.put(hello, Failure(rank=hello.rank, cause=_DIFFERS, details="", user_error=True))
        return peer

    def _listen(self, peer: _Peer) -> None:
        try:
            while True:
                message = read_message(peer.connection, MAX_FRAME)
                if isinstance(message, Pong):
                    peer.unanswered, peer.entered = 0, message.entered
                else:
                    self._inbox.put(peer.hello, message)
        except (Closed, OSError):
            self._inbox.lost(peer.hello, LOST)
        except ValueError as error:
            self._inbox.lost(peer.hello, str(error))


class SocketFollower(Follower):
    """Connects to rank 0 at once, shows the token and says hello; `welcome` is rank 0's answer. Messages arrive once `hear` was
    called."""

    def __init__(self, address: str, port: int, hello: Hello, timeout: float, token: str) -> None:
        try:
            self._socket = socket.create_connection((address, port), timeout)
        except OSError as error:
            raise Closed(f"rank 0 at {address}:{port} cannot be reached: {error}") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()
        self._messages: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        self._closed = False
        try:
            self._socket.sendall(preface(token) + framed(hello))
            welcome = read_message(self._socket, MAX_HELLO)
        except (Closed, OSError):
            shut(self._socket)
            raise Closed(f"rank 0 at {address}:{port} did not let rank {hello.rank} in") from None
        if not isinstance(welcome, Welcome):
            raise ValueError(f"rank 0 answered with {type(welcome).__name__} instead of Welcome")
        self.welcome = welcome
        self._socket.settimeout(None)

    def hear(
        self,
        pong: Callable[[], Pong] = lambda: Pong(step=-1, entered=0),
        stopping: Callable[[], None] = lambda: None,
        lost: Callable[[str], None] = lambda cause: None,
        stall_timeout: float = 0.0,
    ) -> Self:
        """Starts the thread that hears rank 0: it answers pings with what `pong` gives, whatever the rank is busy with, and
        leaves the rest for `receive`. In that thread stopping() is called when a Stop arrives, and lost(cause) when rank 0 is
        gone without one: its process (LOST) or, for `stall_timeout` seconds (0: never noticed), every sign of it."""
        told = (pong, stopping, lost, stall_timeout)
        threading.Thread(target=self._listen, args=told, daemon=True, name="control").start()
        return self

    def send(self, message: Message) -> None:
        try:
            with self._sending:
                self._socket.sendall(framed(message))
        except OSError:
            raise Closed("rank 0 is gone") from None

    def receive(self) -> Message:
        message = self._messages.get()
        if isinstance(message, Exception):
            self._messages.put(message)  # for whoever asks again
            raise message
        return message

    def close(self) -> None:
        self._closed = True
        shut(self._socket)

    def _listen(
        self, pong: Callable[[], Pong], stopping: Callable[[], None], lost: Callable[[str], None], stall_timeout: float
    ) -> None:
        cause = LOST
        try:
            while True:
                message = self._next(stall_timeout)
                if isinstance(message, Ping):
                    self.send(pong())
                    continue
                self._messages.put(message)
                if isinstance(message, Stop):
                    self._messages.put(Closed("rank 0 said stop"))
                    stopping()
                    return
        except _Silent:
            cause = f"hangs: it gave no sign of life for {stall_timeout:g} s (--stall-timeout)"
        except (Closed, OSError):
            pass
        except ValueError as error:
            cause = f"sent what is no message: {error}"
        if not self._closed:
            lost(cause)
        self._messages.put(Closed(f"rank 0: {cause}"))

    def _next(self, stall_timeout: float) -> Message:
        """The next message. While nothing comes, time is counted in ticks, so that this process accuses nobody after having been
        stopped itself."""
        if not stall_timeout:
            return read_message(self._socket, MAX_FRAME)
        tick, silent = tick_of(stall_timeout), 0.0

        def waiting() -> None:
            nonlocal silent
            silent += tick
            if silent > stall_timeout:
                raise _Silent

        return read_message(self._socket, MAX_FRAME, waiting, tick)


class _Silent(Exception):
    """Rank 0 gives no sign of life."""


def tick_of(stall_timeout: float) -> float:
    """Seconds between two pings."""
    return min(1.0, stall_timeout / 8)


def _family(address: str) -> socket.AddressFamily:
    return socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]

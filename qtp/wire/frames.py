"""Frames on a socket: four bytes of length, big-endian, and that many bytes of a message."""

import hashlib
import hmac
import select
import socket
import struct
from collections.abc import Callable

from qtp.wire.codec import decode, encode
from qtp.wire.messages import Message

_LENGTH = struct.Struct(">I")
MAX_FRAME = 1 << 28
MAX_HELLO = 4096


class Closed(Exception):
    """The other end of the channel is gone."""


def framed(message: Message) -> bytes:
    """The bytes of a message on the wire."""
    frame = encode(message)
    return _LENGTH.pack(len(frame)) + frame


def preface(token: str) -> bytes:
    """What a rank shows before its first frame: bytes of a fixed length that only who knows the token can make."""
    return hashlib.sha256(f"qtp control channel, {token}".encode("utf-8", "replace")).digest()


def shows(peer: socket.socket, token: str) -> bool:
    """Whether what `peer` sends first is the preface for `token`; nothing of it is decoded."""
    expected = preface(token)
    return hmac.compare_digest(_read(peer, len(expected), lambda: None), expected)


def read_message(peer: socket.socket, limit: int, waiting: Callable[[], None] | None = None, tick: float = 1.0) -> Message:
    """The next message. ValueError if it is longer than `limit` bytes or malformed, Closed at the end of the stream. While
    nothing comes, `waiting` is called every `tick` seconds; it may raise."""
    wait = _waiter(peer, waiting, tick)
    (length,) = _LENGTH.unpack(_read(peer, _LENGTH.size, wait))
    if length > limit:
        raise ValueError(f"a frame of {length} bytes is over the limit of {limit}")
    return decode(_read(peer, length, wait))


def shut(peer: socket.socket) -> None:
    """Ends a connection, for threads that wait on it too."""
    try:
        peer.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    peer.close()


def _waiter(peer: socket.socket, waiting: Callable[[], None] | None, tick: float) -> Callable[[], None]:
    if waiting is None:
        return lambda: None
    poll = select.poll()
    poll.register(peer, select.POLLIN)

    def wait() -> None:
        while not poll.poll(tick * 1000):
            waiting()

    return wait


def _read(peer: socket.socket, count: int, wait: Callable[[], None]) -> bytes:
    parts, left = [], count
    while left:
        wait()
        part = peer.recv(min(left, 1 << 20))
        if not part:
            raise Closed("the other end closed the channel")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)

"""The control channel for ranks that are threads of one process; messages are encoded as on a socket."""

import queue

from qtp.wire.channel import Follower, Inbox, Leader
from qtp.wire.codec import decode, encode
from qtp.wire.frames import Closed
from qtp.wire.messages import Hello, Message


class QueueLeader(Leader):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.followers = [QueueFollower(rank, self._inbox) for rank in range(1, size)]

    def _deliver(self, message: Message) -> None:
        frame = encode(message)
        for follower in self.followers:
            follower.frames.put(frame)

    def close(self) -> None:
        for follower in self.followers:
            follower.frames.put(None)


class QueueFollower(Follower):
    def __init__(self, rank: int, inbox: Inbox) -> None:
        self.frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox = inbox
        self._hello = Hello(rank=rank, host="thread", pid=0)

    def send(self, message: Message) -> None:
        self._inbox.put(self._hello, decode(encode(message)))

    def receive(self) -> Message:
        frame = self.frames.get()
        if frame is None:
            raise Closed("rank 0 closed the channel")
        return decode(frame)

    def close(self) -> None:
        self._inbox.lost(self._hello, "thread ended")

"""The control channel: strangers do no harm, a death is told with rank, host and pid, and a cause travels unchanged."""

import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launch.local import new_token
from launch.watch import RankDied
from qtp.wire.channel import LOST, SocketFollower, SocketLeader, tick_of
from qtp.wire.codec import encode
from qtp.wire.frames import MAX_FRAME, MAX_HELLO, Closed, preface
from qtp.wire.messages import Chunk, Failure, Hello, Message, Pong, Ready, StepPlan, Stop, Welcome
from qtp.wire.queues import QueueLeader

HOST = "127.0.0.1"
TOKEN = "0123456789abcdef"
WELCOME = Welcome(host="the first", pid=77, machine="here")
PLAN = StepPlan(step=3, dropped=(4, 5), chunks=(Chunk(seq_id=1, start=0, count=2, sample=True, appended=(7, 8)),))


def introduce(rank: int, pid: int, fingerprint: str = "") -> Hello:
    return Hello(rank=rank, host=socket.gethostname(), pid=pid, fingerprint=fingerprint)


class Meeting:
    """A leader that accepts in a thread, and what connects to it."""

    def __init__(self, size: int) -> None:
        self.leader = SocketLeader(HOST, size, TOKEN, welcome=WELCOME)
        self.error: list[BaseException] = []
        self.closers: list[Callable[[], None]] = [self.leader.close]
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        try:
            self.leader.accept(30.0)
        except BaseException as error:
            self.error.append(error)

    def follower(self, rank: int, token: str = TOKEN) -> SocketFollower:
        follower = SocketFollower(HOST, self.leader.port, introduce(rank, 4000 + rank), 10.0, token)
        self.closers.append(follower.close)
        return follower.hear()

    def raw(self, data: bytes) -> socket.socket:
        peer = socket.create_connection((HOST, self.leader.port), 10.0)
        self.closers.append(peer.close)
        peer.sendall(data)
        return peer

    def joined(self) -> None:
        self.thread.join(30.0)
        assert not self.thread.is_alive()
        assert self.error == []


@pytest.fixture
def meet() -> Iterator[Callable[[int], Meeting]]:
    meetings: list[Meeting] = []

    def make(size: int) -> Meeting:
        meetings.append(Meeting(size))
        return meetings[-1]

    yield make
    for meeting in meetings:
        for close in meeting.closers:
            close()


def refused(peer: socket.socket) -> bool:
    """The leader closed this connection without a byte."""
    try:
        return peer.recv(1) == b""
    except ConnectionResetError:
        return True


def framed(data: bytes, length: int | None = None) -> bytes:
    return struct.pack(">I", len(data) if length is None else length) + data


def test_messages_reach_every_rank_in_order(meet: Callable[[int], Meeting]) -> None:
    meeting = meet(4)
    followers = [meeting.follower(rank) for rank in (2, 3, 1)]
    meeting.joined()
    big = StepPlan(step=9, dropped=tuple(range(300_000)))
    for message in (PLAN, big, Stop()):
        meeting.leader.send(message)
    for follower in followers:
        assert [follower.receive() for _ in range(3)] == [PLAN, big, Stop()]


def test_ready_is_collected_in_rank_order(meet: Callable[[int], Meeting]) -> None:
    meeting = meet(4)
    followers = {rank: meeting.follower(rank) for rank in (3, 1, 2)}
    meeting.joined()
    for rank in (2, 3, 1):
        followers[rank].send(Ready(rank=rank, bytes_read=10 * rank, weight_bytes=100 * rank))
    assert meeting.leader.ready(30.0) == [Ready(rank=r, bytes_read=10 * r, weight_bytes=100 * r) for r in (1, 2, 3)]
    assert meeting.leader.failure(0) is None


def test_ready_times_out_naming_who_is_missing(meet: Callable[[int], Meeting]) -> None:
    meeting = meet(4)
    followers = {rank: meeting.follower(rank) for rank in (1, 2, 3)}
    meeting.joined()
    followers[2].send(Ready(rank=2, bytes_read=1, weight_bytes=1))
    with pytest.raises(TimeoutError, match=r"ranks \[1, 3\] were not ready within 0.3 s"):
        meeting.leader.ready(0.3)


def test_accept_times_out_naming_who_is_missing() -> None:
    leader = SocketLeader(HOST, 4, TOKEN)
    joined: list[SocketFollower] = []
    joining = threading.Thread(
        target=lambda: joined.append(SocketFollower(HOST, leader.port, introduce(2, 1), 10.0, TOKEN).hear())
    )
    joining.start()
    with pytest.raises(TimeoutError, match=r"ranks \[1, 3\] did not join the control channel within 0.5 s"):
        leader.accept(0.5)
    leader.close()
    joining.join(30.0)
    with pytest.raises(Closed):
        joined[0].receive()
    joined[0].close()


@pytest.mark.parametrize("token", ["", "0", TOKEN[:-1], TOKEN + "0", TOKEN.upper(), "\N{SNOWMAN}"])
def test_a_wrong_token_is_refused(token: str, meet: Callable[[int], Meeting]) -> None:
    meeting = meet(3)
    with pytest.raises(Closed, match="did not let rank 1 in"):
        meeting.follower(1, token)
    others = [meeting.follower(1), meeting.follower(2)]
    meeting.joined()
    meeting.leader.send(PLAN)
    assert [other.receive() for other in others] == [PLAN, PLAN]
    assert meeting.leader.failure(0) is None


def hello(rank: int) -> bytes:
    return encode(Hello(rank=rank, host="elsewhere", pid=1))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        framed(b""),
        framed(b"\xff" * 40),
        framed(encode(Stop())),
        framed(encode(Ready(rank=1, bytes_read=1, weight_bytes=1))),
        framed(hello(1)[:-3]),
        framed(b"", MAX_HELLO + 1),
        framed(b"", 2**32 - 1),
        framed(hello(1), MAX_HELLO + 1),
        framed(hello(0)),
        framed(hello(3)),
        framed(hello(-1)),
        framed(hello(2**40)),
        framed(encode(Hello(rank=1, host="h" * MAX_HELLO, pid=1))),
    ],
    ids=range(14),
)
def test_a_garbage_connection_does_no_harm(data: bytes, meet: Callable[[int], Meeting]) -> None:
    meeting = meet(3)
    first = meeting.follower(2)
    assert refused(meeting.raw(preface(TOKEN) + data))
    second = meeting.follower(1)
    meeting.joined()
    meeting.leader.send(PLAN)
    assert (first.receive(), second.receive()) == (PLAN, PLAN)


@pytest.mark.parametrize("shown", [b"", preface("another"), preface(TOKEN)[:-1] + b"!", preface(TOKEN)[1:]])
def test_nothing_is_decoded_before_the_token(
    shown: bytes, meet: Callable[[int], Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr("qtp.wire.frames.decode", lambda frame: decoded.append(frame))
    meeting = meet(2)
    assert refused(meeting.raw(shown + framed(hello(1)) + b"." * 64))
    assert decoded == []
    assert refused(meeting.raw(preface(TOKEN) + framed(hello(1))))
    assert decoded == [hello(1)]


def test_a_flood_of_silent_strangers_keeps_nobody_out(meet: Callable[[int], Meeting]) -> None:
    """More than rank 0 keeps at once: the oldest are closed, and the ranks get in."""
    meeting = meet(3)
    strangers = [meeting.raw(preface(TOKEN)[:9]) for _ in range(150)]
    followers = [meeting.follower(1), meeting.follower(2)]
    meeting.joined()
    meeting.leader.send(PLAN)
    assert [follower.receive() for follower in followers] == [PLAN, PLAN]
    assert all(refused(stranger) for stranger in strangers)


def test_who_has_come_early_is_told_that_rank_0_lives(meet: Callable[[int], Meeting]) -> None:
    """While rank 0 waits for the last one, longer than the stall timeout, the first one accuses nobody."""
    meeting, told = meet(3), list[str]()
    early = SocketFollower(HOST, meeting.leader.port, introduce(1, 1), 10.0, TOKEN)
    meeting.closers.append(early.close)
    early.hear(lost=told.append, stall_timeout=2.0)
    time.sleep(5.0)
    meeting.follower(2)
    meeting.joined()
    assert told == []
    assert meeting.leader.signs(1.0)[0].silent == 0.0


def test_connections_that_end_early_do_no_harm(meet: Callable[[int], Meeting]) -> None:
    meeting, whole = meet(2), preface(TOKEN) + framed(hello(1))
    for end in range(0, len(whole), 3):
        meeting.raw(whole[:end]).close()
    follower = meeting.follower(1)
    meeting.joined()
    meeting.leader.send(PLAN)
    assert follower.receive() == PLAN


def test_random_connections_do_no_harm(meet: Callable[[int], Meeting]) -> None:
    meeting, rng = meet(2), random.Random(4)
    for _ in range(60):
        shown = rng.choice((preface(TOKEN), preface("another"), b""))
        peer = meeting.raw(shown + framed(rng.randbytes(rng.randint(40, 90))))
        assert refused(peer)
    follower = meeting.follower(1)
    meeting.joined()
    meeting.leader.send(PLAN)
    assert follower.receive() == PLAN


def test_a_second_claim_to_a_rank_is_refused(meet: Callable[[int], Meeting]) -> None:
    meeting = meet(3)
    first = meeting.follower(1)
    with pytest.raises(Closed, match="did not let rank 1 in"):
        meeting.follower(1)
    other = meeting.follower(2)
    meeting.joined()
    meeting.leader.send(PLAN)
    assert (first.receive(), other.receive()) == (PLAN, PLAN)


def told(death: RankDied | None) -> tuple[int, str, int]:
    assert death is not None
    assert f"rank {death.rank} (host {death.host}, pid {death.pid}): {death.cause}" == str(death)
    return death.rank, death.host, death.pid


def test_a_closed_follower_is_a_death(meet: Callable[[int], Meeting]) -> None:
    meeting = meet(3)
    followers = {rank: meeting.follower(rank) for rank in (1, 2)}
    meeting.joined()
    followers[2].close()
    assert told(meeting.leader.failure(30.0)) == (2, socket.gethostname(), 4002)
    with pytest.raises(RankDied, match=r"rank 2 .*pid 4002\): process is gone"):
        meeting.leader.send(PLAN)
    with pytest.raises(RankDied, match="rank 2"):
        meeting.leader.ready(30.0)
    assert followers[1].receive() == PLAN


def test_a_killed_process_is_a_death_with_its_pid(meet: Callable[[int], Meeting]) -> None:
    meeting = meet(2)
    code = (
        "import os, socket; from qtp.wire.channel import SocketFollower; from qtp.wire.messages import Hello; "
        f"h = Hello(rank=1, host=socket.gethostname(), pid=os.getpid()); "
        f"f = SocketFollower({HOST!r}, {meeting.leader.port}, h, 10.0, {TOKEN!r}).hear(); "
        "f.receive(); os.kill(os.getpid(), 9)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        meeting.joined()
        assert meeting.leader.failure(0) is None
        with suppress(RankDied):  # it may be gone before this returns
            meeting.leader.send(PLAN)
        assert told(meeting.leader.failure(30.0)) == (1, socket.gethostname(), child.pid)
        assert child.wait(30.0) == -9
    finally:
        child.kill()
        child.wait()


def test_a_failure_travels_with_its_cause(meet: Callable[[int], Meeting]) -> None:
    meeting = meet(3)
    followers = {rank: meeting.follower(rank) for rank in (1, 2)}
    meeting.joined()
    followers[1].send(Ready(rank=1, bytes_read=1, weight_bytes=1))
    followers[2].send(Failure(rank=2, cause="model x: no such folder \u2603", details="a\nb", user_error=True))
    with pytest.raises(RankDied) as caught:
        meeting.leader.ready(30.0)
    assert told(caught.value) == (2, socket.gethostname(), 4002)
    assert (caught.value.cause, caught.value.details, caught.value.user_error) == ("model x: no such folder \u2603", "a\nb", True)
    followers[2].close()
    with pytest.raises(RankDied, match="no such folder"):
        meeting.leader.send(PLAN)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (struct.pack(">I", MAX_FRAME + 1), f"a frame of {MAX_FRAME + 1} bytes is over the limit of {MAX_FRAME}"),
        (struct.pack(">I", 2**32 - 1), "is over the limit"),
        (framed(b"\x93\x09\x00\x90"), "version 9"),
        (framed(b"\xc1"), "malformed control frame"),
        (framed(encode(Stop()))[:-1], "process is gone"),
    ],
)
def test_a_follower_that_sends_garbage_is_given_up(data: bytes, cause: str, meet: Callable[[int], Meeting]) -> None:
    meeting = meet(2)
    follower = meeting.follower(1)
    meeting.joined()
    follower._socket.sendall(data)
    if cause == "process is gone":
        follower.close()
    death = meeting.leader.failure(30.0)
    assert told(death) == (1, socket.gethostname(), 4001)
    assert death is not None
    assert cause in death.cause


def test_followers_see_the_leader_close(meet: Callable[[int], Meeting]) -> None:
    meeting = meet(3)
    followers = [meeting.follower(1), meeting.follower(2)]
    meeting.joined()
    meeting.leader.send(Stop())
    meeting.leader.close()
    meeting.leader.close()
    for follower in followers:
        assert follower.receive() == Stop()
        with pytest.raises(Closed):
            follower.receive()


@pytest.mark.parametrize("data", [struct.pack(">I", MAX_FRAME + 1), framed(b"\xc1"), framed(b"\x93\x09\x00\x90")])
def test_a_follower_refuses_a_bad_frame(data: bytes, meet: Callable[[int], Meeting]) -> None:
    meeting = meet(2)
    follower = meeting.follower(1)
    meeting.joined()
    meeting.leader._peers[1].connection.sendall(data)
    with pytest.raises(Closed, match="frame"):
        follower.receive()


def test_a_rank_with_another_model_is_the_users_mistake() -> None:
    leader = SocketLeader(HOST, 3, TOKEN, "one model")
    accepting = threading.Thread(target=leader.accept, args=(30.0,), daemon=True)
    accepting.start()
    same = SocketFollower(HOST, leader.port, introduce(1, 7, fingerprint="one model"), 10.0, TOKEN)
    other = SocketFollower(HOST, leader.port, introduce(2, 8, fingerprint="another"), 10.0, TOKEN)
    with pytest.raises(RankDied, match=r"rank 2 .*pid 8\): its checkpoint or its settings differ from those of rank 0") as caught:
        leader.ready(30.0)
    assert caught.value.user_error
    accepting.join(30.0)
    for end in (same, other, leader):
        end.close()


def test_both_ends_know_who_the_other_is(meet: Callable[[int], Meeting]) -> None:
    meeting = meet(2)
    assert meeting.follower(1).welcome == WELCOME
    meeting.joined()
    (sign,) = meeting.leader.signs(0.5)
    assert (sign.rank, sign.host, sign.pid, sign.silent, sign.entered) == (1, socket.gethostname(), 4001, 0.0, 0)


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_follower_answers_whatever_it_is_busy_with(meet: Callable[[int], Meeting]) -> None:
    """Nobody calls `receive`, and yet pings are answered, with how far the rank is; plans wait in their order."""
    meeting = meet(3)
    busy, silent = (SocketFollower(HOST, meeting.leader.port, introduce(rank, 4000 + rank), 10.0, TOKEN) for rank in (1, 2))
    meeting.closers += [busy.close, silent.close]
    busy.hear(pong=lambda: Pong(step=4, entered=31))
    meeting.joined()
    for _ in range(3):
        meeting.leader.ping()
    meeting.leader.send(PLAN)
    expected = [(1, 0.0, 31), (2, 1.5, 0)]
    assert eventually(lambda: [(s.rank, s.silent, s.entered) for s in meeting.leader.signs(0.5)] == expected)
    assert busy.receive() == PLAN
    assert silent.hear().receive() == PLAN, "a ping is no message for the rank"
    assert eventually(lambda: [sign.silent for sign in meeting.leader.signs(0.5)] == [0.0, 0.0])


@pytest.mark.parametrize("farewell", [Stop(), None])
def test_a_follower_tells_a_stop_from_a_death(farewell: Message | None, meet: Callable[[int], Meeting]) -> None:
    meeting, told = meet(2), list[str]()
    follower = SocketFollower(HOST, meeting.leader.port, introduce(1, 1), 10.0, TOKEN)
    follower.hear(stopping=lambda: told.append("stop"), lost=told.append)
    meeting.joined()
    if farewell is not None:
        meeting.leader.send(farewell)
        assert follower.receive() == farewell
    meeting.leader.close()
    with pytest.raises(Closed):
        follower.receive()
    assert eventually(lambda: bool(told))
    assert told == [LOST if farewell is None else "stop"]
    follower.close()


def test_a_leader_without_a_sign_of_life_is_lost(meet: Callable[[int], Meeting]) -> None:
    """As long as pings come the follower waits, however long; after the last one for the stall timeout."""
    meeting, told = meet(2), list[str]()
    follower = SocketFollower(HOST, meeting.leader.port, introduce(1, 1), 10.0, TOKEN)
    follower.hear(lost=told.append, stall_timeout=0.4)
    meeting.joined()
    for _ in range(24):
        time.sleep(tick_of(0.4))
        meeting.leader.ping()
    assert told == []
    before = time.monotonic()
    with pytest.raises(Closed, match=r"rank 0: hangs: it gave no sign of life for 0.4 s \(--stall-timeout\)"):
        follower.receive()
    assert 0.3 < time.monotonic() - before < 5.0
    assert len(told) == 1
    follower.close()


def test_no_leader_is_said_in_one_line() -> None:
    with socket.create_server((HOST, 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(Closed, match=rf"rank 0 at {HOST}:{port} cannot be reached"):
        SocketFollower(HOST, port, introduce(1, os.getpid()), 5.0, TOKEN)


def test_a_lone_leader_has_nobody_to_wait_for() -> None:
    leader = SocketLeader(HOST, 1, TOKEN)
    leader.accept(5.0)
    assert leader.ready(5.0) == []
    leader.send(PLAN)
    assert leader.failure(0) is None
    leader.close()


def test_tokens_differ() -> None:
    tokens = {new_token() for _ in range(50)}
    assert len(tokens) == 50
    assert all(len(token) == 32 and int(token, 16) >= 0 for token in tokens)


def test_queues_do_as_sockets_do() -> None:
    leader = QueueLeader(4)
    leader.send(PLAN)
    assert [follower.receive() for follower in leader.followers] == [PLAN] * 3
    for rank in (3, 1):
        leader.followers[rank - 1].send(Ready(rank=rank, bytes_read=rank, weight_bytes=1))
    with pytest.raises(TimeoutError, match=r"ranks \[2\] were not ready"):
        leader.ready(0.1)
    leader.followers[1].send(Ready(rank=2, bytes_read=2, weight_bytes=1))
    assert [ready.rank for ready in leader.ready(5.0)] == [1, 2, 3]
    leader.followers[1].send(Failure(rank=2, cause="out of luck", details="trace", user_error=False))
    leader.followers[2].close()
    with pytest.raises(RankDied, match=r"rank 2 .*out of luck") as caught:
        leader.send(PLAN)
    assert caught.value.details == "trace"
    leader.close()
    for follower in leader.followers:
        assert follower.receive() == PLAN
        with pytest.raises(Closed):
            follower.receive()


def test_a_queue_follower_that_leaves_is_a_death() -> None:
    leader = QueueLeader(3)
    leader.followers[0].close()
    assert told(leader.failure(5.0)) == (1, "thread", 0)

"""Random and mutated frames to the codec, and a share of them to a live control channel: `python scripts/fuzz_wire.py`.

Prints how many frames ended how, and how memory grew. Exit code 1 on any finding: an error that is no clean refusal, a message
that changes on a second trip, a stranger let in, a follower disturbed, a thread or a descriptor left, memory that grows.
"""

import argparse
import hmac
import math
import os
import random
import resource
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgpack

from launch.watch import RankDied
from qtp.wire.channel import SocketFollower, SocketLeader
from qtp.wire.codec import VERSION, decode, encode
from qtp.wire.frames import framed, preface
from qtp.wire.messages import (
    Chunk,
    Failure,
    Hello,
    Message,
    NewSequence,
    Ping,
    Pong,
    Ready,
    Sample,
    SamplingSpec,
    StepPlan,
    StepResult,
    Stop,
    TokenLogprobs,
    Welcome,
)

HOST, TOKEN, RANKS, MISSING = "127.0.0.1", "00112233445566778899aabbccddeeff", 4, 3
MIB = 1 << 20
ALLOWED_GROWTH = 32 * MIB
SLOW = 2.0
CLAIMS = [b"\xdd", b"\xdb", b"\xc6", b"\xdf", b"\xc9"]  # array, str, bin, map and ext, each with four bytes of length
HOSTILE: list[Any] = [
    *(-1, 2**31, 2**63, 2**64 - 1, -(2**63), 0, True, None, math.nan, math.inf, -0.0, "", "\0", "x" * 70_000, b"", b"x" * 300),
    *(
        [],
        {},
        [[]],
        [None] * 50,
        {"a": 1},
        {1: {2: {}}},
        msgpack.ExtType(5, b""),
        msgpack.ExtType(5, b"abc"),
        msgpack.Timestamp(1),
    ),
]


def ids(rng: random.Random, most: int = 6) -> tuple[int, ...]:
    return tuple(rng.choice((rng.randrange(100), rng.randrange(2**31))) for _ in range(rng.randrange(most)))


def text(rng: random.Random) -> str:
    return "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xD800)))) for _ in range(rng.randrange(12)))


def logprobs(rng: random.Random) -> TokenLogprobs:
    return TokenLogprobs(token_ids=ids(rng), logprobs=(rng.uniform(-9, 0),) * rng.randrange(3), ranks=ids(rng))


def sequence(rng: random.Random) -> NewSequence:
    seed, told = rng.randrange(2**63), rng.choice((None, 2))
    sampling = SamplingSpec(temperature=rng.random(), seed=seed, stop_token_ids=ids(rng), logprobs=told)
    return NewSequence(seq_id=rng.randrange(99), token_ids=ids(rng, 40), prompt_len=rng.randrange(40), sampling=sampling)


def chunk(rng: random.Random) -> Chunk:
    start, count = rng.randrange(9), rng.randrange(99)
    return Chunk(seq_id=rng.randrange(9), start=start, count=count, sample=True, appended=ids(rng), new_blocks=ids(rng))


def sample(rng: random.Random) -> Sample:
    prompt = tuple(logprobs(rng) for _ in range(rng.randrange(3)))
    own = rng.choice((None, logprobs(rng)))
    return Sample(seq_id=rng.randrange(9), token=rng.choice((None, 7)), logprobs=own, prompt_logprobs=prompt)


def hello(rng: random.Random) -> Hello:
    rank = rng.choice((0, 1, 2, RANKS, 2**31 - 1))
    return Hello(rank=rank, host=text(rng), pid=rng.randrange(9), machine=text(rng))


VALID: tuple[Callable[[random.Random], Message], ...] = (
    hello,
    lambda rng: Welcome(host=text(rng), pid=rng.randrange(99), machine=text(rng)),
    lambda rng: Ready(rank=rng.randrange(9), bytes_read=rng.randrange(2**40), weight_bytes=rng.randrange(2**40), cores=text(rng)),
    lambda rng: Failure(rank=rng.randrange(9), cause=text(rng), details=text(rng), user_error=rng.random() < 0.5),
    lambda rng: Stop(),
    lambda rng: StepPlan(
        step=rng.randrange(99),
        dropped=ids(rng),
        started=tuple(sequence(rng) for _ in range(rng.randrange(3))),
        chunks=tuple(chunk(rng) for _ in range(rng.randrange(4))),
    ),
    lambda rng: StepResult(step=rng.randrange(99), samples=tuple(sample(rng) for _ in range(rng.randrange(3)))),
    lambda rng: Ping(),
    lambda rng: Pong(step=rng.randrange(-1, 99), entered=rng.randrange(2**40)),
)


def noise(rng: random.Random, frame: bytes) -> bytes:
    start = rng.choice((b"", frame[: rng.randrange(5)], bytes((0x93, VERSION, rng.randrange(10)))))
    return start + rng.randbytes(rng.randrange(64))


def flips(rng: random.Random, frame: bytes) -> bytes:
    changed = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncated(rng: random.Random, frame: bytes) -> bytes:
    return frame[: rng.randrange(len(frame))]


def spliced(rng: random.Random, frame: bytes) -> bytes:
    other = encode(rng.choice(VALID)(rng))
    at, to = rng.randrange(len(frame)), rng.randrange(len(other))
    return frame[:at] + other[to : to + rng.randrange(20)] + frame[at + rng.randrange(8) :]


def claims(rng: random.Random, frame: bytes) -> bytes:
    at = rng.randrange(len(frame))
    length = rng.choice((2**32 - 1, 2**31, 2**20 + 1, rng.randrange(2**16)))
    return frame[:at] + rng.choice(CLAIMS) + struct.pack(">I", length) + frame[at + rng.randrange(6) :]


def nested(rng: random.Random, frame: bytes) -> bytes:
    """Arrays in arrays, each of which claims as many items as the frame has bytes."""
    depth = rng.choice((8, 100, 600, 1100))
    layer = rng.choice((b"\x91", b"\xdc\x0c\x00", b"\xdd\x00\x00\x0c\x00", b"\x81\x01", b"\xde\x01\x00\x01"))
    return frame[: rng.randrange(len(frame))] + layer * min(depth, 3300 // len(layer)) + b"\xc0" * rng.randrange(700)


def hostile(rng: random.Random, frame: bytes) -> bytes:
    """A hostile value somewhere in a valid frame."""
    outer: Any = msgpack.unpackb(frame)
    inner = outer
    while True:
        at = rng.randrange(len(inner)) if inner else -1
        if at < 0 or not isinstance(inner[at], list) or not inner[at] or rng.random() < 0.15:
            break
        inner = inner[at]
    if at < 0:
        inner.append(rng.choice(HOSTILE))
    else:
        inner[at] = rng.choice(HOSTILE)
    return bytes(msgpack.packb(outer))


WAYS = (noise, flips, truncated, spliced, claims, nested, hostile, lambda rng, frame: frame)


def frames(rng: random.Random, valid: tuple[Callable[[random.Random], Message], ...] = VALID) -> Iterator[tuple[str, bytes]]:
    """(way, frame) without end."""
    while True:
        way = rng.choice(WAYS)
        yield getattr(way, "__name__", "").replace("<lambda>", "valid"), way(rng, encode(rng.choice(valid)(rng)))


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz_codec(count: int, seed: int, found: list[str]) -> None:
    outcomes: Counter[str] = Counter()
    source = frames(random.Random(seed))
    before, slowest = (0, 0), 0.0
    for turn in range(count):
        if turn == count // 10:
            before = rss(), peak()
        way, frame = next(source)
        start = time.perf_counter()
        try:
            message = decode(frame)
        except ValueError as error:
            outcome = "refused"
            if not str(error).startswith("malformed control frame: ") or len(str(error)) > 300:
                found.append(f"{way} {frame[:80]!r}: refused in unclear words: {str(error)[:300]}")
        except BaseException as error:
            outcome = "CRASH"
            found.append(f"{way} {frame[:80]!r}: {type(error).__name__}: {error}")
        else:
            outcome = f"read as {type(message).__name__}"
            again = encode(message)
            if encode(decode(again)) != again:
                found.append(f"{way} {frame[:80]!r}: read as {message}, which changes on the next trip")
        slowest = max(slowest, time.perf_counter() - start)
        outcomes[outcome] += 1
        if way == "valid" and outcome == "refused":
            found.append(f"a valid frame was refused: {frame[:80]!r}")
    print(f"codec: {count} frames, slowest {slowest * 1e3:.1f} ms")
    for outcome, times in sorted(outcomes.items()):
        print(f"  {outcome}: {times}")
    grown, risen = (rss() - before[0]) / MIB, (peak() - before[1]) / MIB
    print(f"  memory after the first tenth {before[0] / MIB:.1f} MiB, grown by {grown:.1f} MiB, its peak by {risen:.1f} MiB")
    if max(grown, risen) > ALLOWED_GROWTH / MIB:
        found.append(f"memory grew by {grown:.1f} MiB and its peak by {risen:.1f} MiB")
    if slowest > SLOW:
        found.append(f"a frame took {slowest:.1f} s")


def enclosed(rng: random.Random, frame: bytes) -> bytes:
    """With its length in front, or a lie about it."""
    lies = (0, len(frame) + 1, 2**32 - 1, 4096, 4097, rng.randrange(2**32))
    return struct.pack(">I", rng.choice(lies) if rng.random() < 0.15 else len(frame)) + frame


def lets_in(data: bytes) -> bool:
    """Whether `data` is what a rank that belongs here would say."""
    shown, data = data[: len(preface(TOKEN))], data[len(preface(TOKEN)) :]
    try:
        (length,) = struct.unpack_from(">I", data)
        message = decode(data[4 : 4 + length])
    except (struct.error, ValueError):
        return False
    return hmac.compare_digest(shown, preface(TOKEN)) and isinstance(message, Hello) and message.rank == MISSING


def opening(rng: random.Random) -> bytes:
    """What a stranger shows first: mostly the token, so that what follows is read; otherwise another, a part of it, or none."""
    shown = preface(TOKEN)
    return shown if rng.random() < 0.7 else rng.choice((preface("another"), rng.randbytes(32), shown[: rng.randrange(32)], b""))


def answer(rng: random.Random, port: int, data: bytes) -> bytes:
    """What the listener answers to a stranger that says `data`: nothing, if it is well."""
    origin = f"127.0.0.{rng.randint(1, 250)}"
    with socket.create_connection((HOST, port), 20.0, source_address=(origin, 0)) as peer:
        try:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            return peer.recv(1)
        except (ConnectionError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            return b""


def fuzz_listener(count: int, seed: int, found: list[str]) -> None:
    """Strangers at the listener while ranks 1 and 2 are connected; then rank 3 joins and a plan goes to all."""
    rng, outcomes = random.Random(seed), Counter[str]()
    strangers = frames(rng, (hello, hello, hello, *VALID))
    leader = SocketLeader(HOST, RANKS, TOKEN)
    accepting = threading.Thread(target=leader.accept, args=(3600.0,), daemon=True)
    accepting.start()
    ranks = [_join(leader.port, rank) for rank in (1, 2)]
    silent = [socket.create_connection((HOST, leader.port)) for _ in range(20)]
    before = 0
    for turn in range(count):
        if turn == count // 10:
            before = rss()
        way, frame = next(strangers)
        data = opening(rng) + (enclosed(rng, frame) if rng.random() < 0.95 else frame)
        if lets_in(data):
            continue
        try:
            answered = answer(rng, leader.port, data)
        except OSError as error:
            found.append(f"{way} {data[:80]!r}: the listener gave no end: {error}")
            break
        outcomes["LET IN" if answered else "refused"] += 1
        if answered:
            found.append(f"{way} {data[:80]!r}: let in")
    grown = rss() - before
    ranks.append(_join(leader.port, MISSING))
    accepting.join(30.0)
    plan = StepPlan(step=7, dropped=(4, 5), chunks=(Chunk(seq_id=1, start=0, count=2, sample=True, appended=(7, 8)),))
    try:
        leader.send(plan)
        for rank, follower in enumerate(ranks, 1):
            if (got := follower.receive()) != plan:
                found.append(f"rank {rank} received {got}")
    except Exception as error:
        found.append(f"the plan did not go through: {type(error).__name__}: {error}")
    for end in (*silent, *ranks, leader):
        end.close()
    print(f"listener: {sum(outcomes.values())} connections, then a plan to {len(ranks)} ranks")
    for outcome, times in sorted(outcomes.items()):
        print(f"  {outcome}: {times}")
    print(f"  memory grown by {grown / MIB:.1f} MiB after the first tenth")
    if grown > ALLOWED_GROWTH:
        found.append(f"memory grew by {grown / MIB:.1f} MiB at the listener")


def _join(port: int, rank: int) -> SocketFollower:
    return SocketFollower(HOST, port, Hello(rank=rank, host="here", pid=os.getpid()), 20.0, TOKEN).hear()


def fuzz_member(count: int, seed: int, found: list[str]) -> None:
    """A rank that knows the token and then sends anything: its own end must be told, and nothing else happen."""
    rng, outcomes = random.Random(seed), Counter[str]()
    source = frames(rng)
    for _ in range(count):
        leader = SocketLeader(HOST, 2, TOKEN)
        accepting = threading.Thread(target=leader.accept, args=(20.0,), daemon=True)
        accepting.start()
        way, frame = next(source)
        data = enclosed(rng, frame)
        with socket.create_connection((HOST, leader.port), 20.0) as peer:
            peer.sendall(preface(TOKEN) + framed(Hello(rank=1, host="here", pid=1)))
            (length,) = struct.unpack(">I", peer.recv(4, socket.MSG_WAITALL))
            peer.recv(length, socket.MSG_WAITALL)
            accepting.join(20.0)
            try:
                peer.sendall(data)
            except ConnectionError:  # it was refused before it was read
                pass
        death = leader.failure(20.0)
        leader.close()
        outcomes["told" if isinstance(death, RankDied) else "NOT TOLD"] += 1
        if not isinstance(death, RankDied) or death.rank != 1 or len(death.cause) > 200_000:
            found.append(f"{way} {data[:80]!r}: the end of rank 1 was told as {death}")
    print(f"ranks with the token that send anything: {count}")
    for outcome, times in sorted(outcomes.items()):
        print(f"  {outcome}: {times}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1_000_000, help="to the codec")
    parser.add_argument("--connections", type=int, default=30_000, help="to a listener")
    parser.add_argument("--members", type=int, default=1_000, help="ranks with the token that send anything")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    found: list[str] = []
    threading.excepthook = lambda told: found.append(f"thread {told.thread}: {told.exc_type.__name__}: {told.exc_value}")
    fuzz_codec(args.frames, args.seed, found)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    fuzz_listener(args.connections, args.seed, found)
    fuzz_member(args.members, args.seed, found)
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline and threading.active_count() > threads:
        time.sleep(0.05)
    left = threading.active_count() - threads, len(os.listdir("/proc/self/fd")) - descriptors
    print(f"left: {left[0]} threads, {left[1]} descriptors")
    if left[0] > 0 or left[1] > 0:
        found.append(f"{left[0]} threads and {left[1]} descriptors were left")
    for finding in found[:50]:
        print(f"FINDING {finding}")
    print(f"{len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

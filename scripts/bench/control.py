"""What a step's control traffic costs: rank 0 and its followers over sockets on the loopback interface.

    python scripts/bench/control.py [--ranks 64] [--steps 300] [--json FILE]

For decode steps of 1, 64 and 256 sequences it prints, as median and 99th percentile: the time that rank 0's thread spends to
encode the plan and send it to all (its own CPU time, system calls included), the wall time of that, and the wall time until the
last follower has decoded it. First with all ranks as threads of one process, where they share one interpreter lock: the wall
times then hold the decoding of all followers, one after the other. Then with the followers in a second process, as in a run
rank 0 is alone in its own: exit code 1 if the median of its own time is over 2 ms in any of these rows.
"""

import argparse
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.local import new_token
from qtp.plan import decode_step
from qtp.wire.channel import SocketFollower, SocketLeader
from qtp.wire.codec import decode, encode
from qtp.wire.frames import Closed
from qtp.wire.messages import Hello

HOST, LIMIT_MS, LENGTH, BLOCK_SIZE = "127.0.0.1", 2.0, 4096, 128
BATCHES = (1, 64, 256)


class Arrivals:
    """When the last of `count` followers had decoded each step."""

    def __init__(self, count: int) -> None:
        self._count, self._left = count, count
        self._lock = threading.Lock()
        self._times: queue.SimpleQueue[float] = queue.SimpleQueue()

    def arrived(self) -> None:
        now = time.perf_counter()
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._left = self._count
                self._times.put(now)

    def last(self) -> float:
        return self._times.get(timeout=60.0)


def follow(follower: SocketFollower, arrivals: Arrivals) -> None:
    try:
        while True:
            follower.receive()
            arrivals.arrived()
    except Closed:
        pass


def join(port: int, token: str, ranks: int) -> tuple[Arrivals, list[SocketFollower]]:
    """Ranks 1 and up, as threads of this process."""
    arrivals, followers = Arrivals(ranks - 1), []
    for rank in range(1, ranks):
        hello = Hello(rank=rank, host="here", pid=rank)
        followers.append(SocketFollower(HOST, port, hello, 60.0, token).hear())
        threading.Thread(target=follow, args=(followers[-1], arrivals), daemon=True).start()
    return arrivals, followers


def apart(port: int, ranks: int) -> None:
    """The second process: reads the token from its standard input, joins and prints when each step had arrived."""
    arrivals, _ = join(port, sys.stdin.readline().strip(), ranks)
    while True:
        print(arrivals.last(), flush=True)


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """(median, 99th percentile) in milliseconds."""
    ordered = sorted(seconds)
    return 1e3 * statistics.median(ordered), 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def measure(leader: SocketLeader, arrival: Callable[[], float], batch: int, steps: int) -> dict[str, tuple[float, float]]:
    plan = decode_step(batch, LENGTH, BLOCK_SIZE)
    own, sent, decoded = [], [], []
    for step in range(steps + 10):
        cpu, start = time.thread_time(), time.perf_counter()
        leader.send(plan)
        spent, wall = time.thread_time() - cpu, time.perf_counter() - start
        last = arrival() - start
        if step >= 10:
            own.append(spent)
            sent.append(wall)
            decoded.append(last)
    return {"own": percentiles(own), "sent": percentiles(sent), "decoded": percentiles(decoded)}


def codec(batch: int) -> tuple[int, float, float]:
    """(bytes of the frame, milliseconds to encode it, to decode it), medians."""
    plan = decode_step(batch, LENGTH, BLOCK_SIZE)
    frame = encode(plan)
    encoding, decoding = [], []
    for _ in range(200):
        start = time.perf_counter()
        encode(plan)
        middle = time.perf_counter()
        decode(frame)
        encoding.append(middle - start)
        decoding.append(time.perf_counter() - middle)
    return len(frame), percentiles(encoding)[0], percentiles(decoding)[0]


@contextmanager
def meeting(ranks: int, together: bool) -> Iterator[tuple[SocketLeader, Callable[[], float]]]:
    """A leader that all have joined, and what waits until the last has decoded a step and says when that was."""
    token = new_token()
    leader = SocketLeader(HOST, ranks, token)
    accepting = threading.Thread(target=leader.accept, args=(60.0,))
    accepting.start()
    if together:
        arrivals, followers = join(leader.port, token, ranks)
        accepting.join()
        yield leader, arrivals.last
        for end in (*followers, leader):
            end.close()
        return
    command = [sys.executable, __file__, "--ranks", str(ranks), "--apart", str(leader.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        told = child.stdout
        try:
            child.stdin.write(f"{token}\n")
            child.stdin.flush()
            accepting.join()
            yield leader, lambda: float(told.readline())
        finally:
            child.kill()
            leader.close()


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=64)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--json", type=Path)
    p.add_argument("--apart", type=int, metavar="PORT", help="used by this script itself")
    args = p.parse_args()

    if args.apart:
        apart(args.apart, args.ranks)
    print(f"{args.ranks} ranks, {args.steps} decode steps each; milliseconds, median and 99th percentile")
    print("batch  frame(bytes)  encode  decode   rank 0's own time    wall until sent    wall until the last has decoded")
    report = {}
    for place in ("one process", "followers apart"):
        with meeting(args.ranks, place == "one process") as (leader, arrival):
            print(place)
            for batch in BATCHES:
                size, encoding, decoding = codec(batch)
                times = measure(leader, arrival, batch, args.steps)
                report[f"{place}, batch {batch}"] = {"bytes": size, "encode": encoding, "decode": decoding, **times}
                shown = "   ".join(f"{times[key][0]:8.2f} {times[key][1]:8.2f}" for key in ("own", "sent", "decoded"))
                print(f"{batch:5}  {size:12}  {encoding:6.3f}  {decoding:6.3f}   {shown}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))
    return 1 if any(each["own"][0] > LIMIT_MS for place, each in report.items() if "apart" in place) else 0


if __name__ == "__main__":
    sys.exit(main())

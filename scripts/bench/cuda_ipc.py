"""Checks the communicator cuda_ipc between processes of this host and times it beside the one it is built on.

    python scripts/bench/cuda_ipc.py [--ranks 2] [--seconds 50]

Rank r runs on card r, or r modulo the number of cards: ranks that share one take turns, and the times then tell of that. First
sums of every dtype, from 1 KiB to 1 MiB, are compared with those in float64 and between ranks, outside of CUDA graphs and in one;
then microseconds a sum in bfloat16 are printed as medians on rank 0: calls from Python, and replays of a graph of them. Here the
kernel takes up to 1 MiB, so that one sees where NCCL is faster. Ends within --seconds, whatever happens, with exit code 1 if
anything was wrong.
"""

import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # where a collectives.py and a cuda.py are that are not meant

import argparse
import faulthandler
import os
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
from torch import Tensor

from collectives import Communicator, Rendezvous, create
from collectives.cuda_ipc import SUMMED, CudaIpc
from collectives.staged import Staged

MOST = 1 << 20
SIZES = tuple(1 << k for k in range(10, 21))
_MANTISSA = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}


def drawn(rank: int, n: int, dtype: torch.dtype, salt: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    if dtype == torch.int32:
        return torch.randint(-(2**28), 2**28, (n,), generator=generator, dtype=dtype)
    return torch.randn(n, generator=generator).to(dtype)


def wrong(x: Tensor, comm: Communicator, salt: int) -> str:
    """What is wrong with the sum x of what all ranks drew; "" if nothing is."""
    found, inputs = x.cpu().double(), [drawn(r, x.numel(), x.dtype, salt).double() for r in range(comm.size)]
    expected, size = sum(inputs), torch.stack(inputs).abs().sum(0)
    bound = 0 if x.dtype == torch.int32 else size * 2.0**-22 + expected.abs() * 2.0 ** -_MANTISSA[x.dtype]
    rows = comm.all_gather(x.view(torch.int8)[None])
    if not bool(((found - expected).abs() <= bound).all()):
        return f"{x.dtype} x {x.numel()}: off by {float((found - expected).abs().max()):.3g}"
    return "" if bool((rows == rows[0]).all()) else f"{x.dtype} x {x.numel()}: ranks have other bits"


def graph_of(calls: Callable[[], object]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        calls()
    return graph


def check(ipc: CudaIpc) -> list[str]:
    """Sums one by one, and all of a dtype in a graph that is replayed with other numbers."""
    troubles = []
    for dtype in SUMMED:
        lengths = [size // dtype.itemsize for size in SIZES] + [1, 77, 4099]
        held = [drawn(ipc.rank, n, dtype, 0).to(ipc.device) for n in lengths]
        for x in held:
            ipc.all_reduce(x)
        troubles += [wrong(x, ipc.inner, 0) for x in held]
        graph = graph_of(lambda held=held: [ipc.all_reduce(x) for x in held])
        for salt in (1, 2, 3):
            for x in held:
                x.copy_(drawn(ipc.rank, x.numel(), dtype, salt))
            graph.replay()
        troubles += [wrong(x, ipc.inner, 3) for x in held]
    return [trouble for trouble in troubles if trouble]


def microseconds(run: Callable[[], object], inner: Communicator, count: int, rounds: int) -> float:
    """The median over `rounds` of what one of the `count` sums of a run takes, by events."""
    times = []
    for _ in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        inner.barrier()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times[1:])


def measured(ipc: CudaIpc, bytes_: int, shared: bool) -> list[float]:
    """cuda_ipc from Python and in a graph; the inner communicator too (no graph where it goes through host memory)."""
    x, count, rounds = torch.zeros(bytes_ // 2, dtype=torch.bfloat16, device=ipc.device), (4 if shared else 50), 5

    def times(comm: Communicator) -> Callable[[], object]:
        return lambda: [comm.all_reduce(x) for _ in range(count)]

    row = []
    for comm in (ipc, ipc.inner):
        times(comm)()
        row.append(microseconds(times(comm), ipc.inner, count, rounds))
        if not isinstance(comm, Staged):
            graph = graph_of(times(comm))
            row.append(microseconds(graph.replay, ipc.inner, count, rounds))
    return row


def run_rank(args: argparse.Namespace) -> int:
    faulthandler.dump_traceback_later(args.seconds - 3, exit=True)
    deadline = time.monotonic() + 0.6 * args.seconds
    cards = torch.cuda.device_count()
    device = torch.device("cuda", args.rank % cards)
    torch.cuda.set_device(device)
    listener = args.listener if args.rank == 0 else None
    place = {"rank": args.rank, "size": args.ranks, "local_rank": args.rank, "local_size": args.ranks}
    comm = create("cuda_ipc", Rendezvous(**place, port=args.port, listener=listener, timeout=args.seconds / 3), device)
    assert isinstance(comm, CudaIpc)
    ipc = CudaIpc(comm.inner, args.seconds / 3, limit=MOST)
    first, shared = args.rank == 0, isinstance(comm.inner, Staged)
    begin = time.monotonic()
    troubles = check(ipc)
    for trouble in troubles:
        print(f"rank {args.rank}: {trouble}", flush=True)
    if first:
        names = {torch.cuda.get_device_name(card) for card in range(min(cards, args.ranks))}
        places = "one card" if cards == 1 else f"{min(cards, args.ranks)} cards"
        print(f"{args.ranks} ranks on {places} ({', '.join(names)}), torch {torch.__version__}, over {inner_name(comm.inner)}")
        print(f"checks: {'wrong' if troubles else 'right'} ({time.monotonic() - begin:.1f} s)")
        heads = ["cuda_ipc", "in a graph", inner_name(comm.inner), *([] if shared else ["in a graph"])]
        print(f"{'bytes':>8}" + "".join(f"{head:>12}" for head in heads) + "   microseconds a sum", flush=True)
    for bytes_ in SIZES:
        late = comm.inner.broadcast(torch.tensor([int(time.monotonic() > deadline)], device=device))
        if int(late):
            if first:
                print("the rest was left out: no time", flush=True)
            break
        row = measured(ipc, bytes_, shared)
        if first:
            print(f"{bytes_:>8}" + "".join(f"{time_:>12.1f}" for time_ in row), flush=True)
    comm.inner.barrier()
    ipc.close()
    comm.close()
    faulthandler.cancel_dump_traceback_later()
    return 1 if troubles else 0


def inner_name(inner: Communicator) -> str:
    return "gloo" if isinstance(inner, Staged) else "nccl"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--seconds", type=float, default=50.0)
    p.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    p.add_argument("--port", type=int, help=argparse.SUPPRESS)
    p.add_argument("--listener", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if not torch.cuda.is_available():
        print("cuda_ipc.py: no CUDA device", file=sys.stderr)
        return 2
    if args.rank is not None:
        return run_rank(args)
    listener = socket.create_server(("127.0.0.1", 0))
    own = ["--port", str(listener.getsockname()[1]), "--listener", str(listener.fileno()), *sys.argv[1:]]
    command = [sys.executable, __file__, *own, "--rank"]
    deadline = time.monotonic() + args.seconds
    ranks = [
        subprocess.Popen([*command, str(rank)], pass_fds=[listener.fileno()] if rank == 0 else [], start_new_session=True)
        for rank in range(args.ranks)
    ]
    listener.close()
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline and not any(r.poll() for r in ranks):
            time.sleep(0.05)
    finally:
        for rank in ranks:
            if rank.poll() is None and (time.monotonic() >= deadline or any(r.returncode for r in ranks)):
                os.killpg(rank.pid, signal.SIGKILL)
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        print(f"cuda_ipc.py: the ranks ended with {codes}", file=sys.stderr)
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())

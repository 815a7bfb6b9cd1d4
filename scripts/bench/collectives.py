"""Latency of all-reduce over gloo, mpi and shm among the ranks of this host, in one run.

    python scripts/bench/collectives.py [--ranks 2] [--rounds 40] [--backends gloo,mpi,shm]

Starts its own ranks by the mpiexec beside this Python, each with one thread on a core of its own; all communicators live in the
same processes. Backends take turns within each of many short rounds, and a figure is the median, or the best, over the rounds of
a round's mean, in microseconds, on rank 0. The tensors stay in the cache if they fit.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.remove(str(Path(__file__).resolve().parent))  # this file has the name of the package that it measures

from collectives import Communicator, Rendezvous, create

SIZES = tuple(1024 << k for k in range(15))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU = torch.device("cpu")


def timed(call: Callable[[], object], times: int) -> float:
    """Microseconds a call."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times * 1e6


def measure(comms: dict[str, Communicator], rounds: int, bytes_: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """The median and the best for each backend. All ranks take the same number of turns."""
    x = torch.zeros(bytes_ // dtype.itemsize, dtype=dtype)
    found: dict[str, list[float]] = {name: [] for name in comms}
    times = {name: max(2, min(50, 300_000 // bytes_ if name == "gloo" else 2_000_000 // bytes_)) for name in comms}
    for turn in range(rounds + 1):
        for name, comm in comms.items():
            comm.barrier()
            microseconds = timed(lambda comm=comm: comm.all_reduce(x), times[name])  # type: ignore[misc]
            if turn:  # the first round warms up
                found[name].append(microseconds)
    return {name: [median(values), min(values)] for name, values in found.items()}


def run_rank(args: argparse.Namespace) -> None:
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    comms: dict[str, Communicator] = {}
    for turn, name in enumerate(args.backends.split(",")):
        rendezvous = Rendezvous(rank=rank, size=size, local_rank=rank, local_size=size, port=args.ports[turn], timeout=60.0)
        comms[name] = create(name, rendezvous, CPU)
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    for dtype in DTYPES:
        for bytes_ in SIZES:
            row = measure(comms, args.rounds, bytes_, DTYPES[dtype])
            if rank == 0:
                print(json.dumps({"dtype": dtype, "bytes": bytes_, **row}), flush=True)
    for comm in comms.values():
        comm.close()


def table(lines: list[str]) -> str:
    rows = [json.loads(line) for line in lines]
    names = [name for name in rows[0] if name not in ("dtype", "bytes")]
    ratio = "shm" in names and "mpi" in names
    heads = [f"{name:>11} {'best':>8}" for name in names] + ([f"{'shm/mpi':>9} {'best':>5}"] if ratio else [])
    out = ["".join([f"{'dtype':<9}{'size':>7}", *heads])]
    for row in rows:
        size = f"{row['bytes'] // 1024} KB" if row["bytes"] < 1 << 20 else f"{row['bytes'] >> 20} MB"
        figures = [f"{row[name][0]:>11.1f} {row[name][1]:>8.1f}" for name in names]
        if ratio:
            figures.append("{:>9.2f} {:>5.2f}".format(*(row["shm"][i] / row["mpi"][i] for i in range(2))))
        out.append("".join([f"{row['dtype']:<9}{size:>7}", *figures]))
    return "\n".join(out)


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--backends", default="gloo,mpi,shm")
    p.add_argument("--ports", type=json.loads, default=None, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.ports is not None:
        run_rank(args)
        return
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        sys.exit("error: no mpiexec beside this Python; pip install 'qtp[mpi]'")
    ports = free_ports(args.backends.count(",") + 1)
    ours = [sys.executable, __file__, "--rounds", str(args.rounds), "--backends", args.backends, "--ports", json.dumps(ports)]
    done = subprocess.run([str(mpiexec), "-n", str(args.ranks), *ours], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: the ranks ended with {done.returncode}")
    print(f"all-reduce, {args.ranks} ranks on one host, microseconds (median of {args.rounds} rounds)")
    print(table(done.stdout.splitlines()))


if __name__ == "__main__":
    main()

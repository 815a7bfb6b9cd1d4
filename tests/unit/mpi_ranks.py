"""One rank, started by mpiexec, of the tests of the communicator 'mpi'. Arguments: what to do, a folder for FOLDER/RANK.json."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from collectives import CollectiveError, Communicator, Rendezvous
from collectives.mpi import create, library
from launch.detect import detect

CPU = torch.device("cpu")


def same_bits(folder: Path) -> dict[str, str]:
    """Sums of random floats, by both ways of adding them, agree to the bit on all ranks and are near the true sum."""
    comm = create(detect(), CPU)
    bad = []
    for length in (1, 2, 3, 1000, 4096, 4097, 16384, 16385, 50001, 300007):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            inputs = [torch.randn(length, generator=torch.Generator().manual_seed(91 + r)).to(dtype) for r in range(comm.size)]
            found = comm.all_reduce(inputs[comm.rank].clone())
            rows = comm.all_gather(found[None])
            true = torch.stack(inputs).double().sum(0)
            near = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.04, torch.float16: 0.005}[dtype]
            once = torch.stack(inputs).float().sum(0).to(dtype)
            exact = dtype not in (torch.bfloat16, torch.float16) or comm.size > 2 or torch.equal(found, once)
            if not torch.equal(rows, found.expand(comm.size, -1)) or (found.double() - true).abs().max() > near or not exact:
                bad.append(f"{dtype} {length}")
    comm.close()
    return {"bad": ", ".join(bad)}


def failing(name: str, call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, CollectiveError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{name} raised nothing"


def refused(folder: Path) -> dict[str, str]:
    """What is refused, in words."""
    here = detect()
    told = {
        "device": failing("device", lambda: create(here, torch.device("meta"))),
        "rank": failing("rank", lambda: create(Rendezvous(rank=0, size=3, local_size=3), CPU)),
    }
    comm = create(here, CPU)
    long = torch.ones(1, dtype=torch.uint8).expand(2**31)
    told["long sum"] = failing("long sum", lambda: comm.all_reduce(long))
    told["long scatter"] = failing("long scatter", lambda: comm.reduce_scatter(long))
    told["long broadcast"] = failing("long broadcast", lambda: comm.broadcast(long))
    told["long exchange"] = failing("long exchange", lambda: comm.all_to_all([long] * comm.size))
    told["bool"] = failing("bool", lambda: comm.all_reduce(torch.ones(3, dtype=torch.bool)))
    told["complex"] = failing("complex", lambda: comm.reduce_scatter(torch.ones(2 * comm.size, dtype=torch.complex64)))
    told["still works"] = str(comm.all_reduce(torch.full((2,), comm.rank + 1.5)).tolist())
    gathered = comm.all_gather(torch.tensor([True, comm.rank == 0]), 0)
    told["bool gathered"] = str(gathered.tolist())
    child = comm.split(range(comm.size))
    assert child is not None
    child.abort()
    child.abort()
    told["aborted"] = failing("aborted", lambda: child.all_reduce(torch.ones(3)))
    child.close()
    comm.barrier()
    comm.close()
    comm.close()
    told["closed"] = failing("closed", comm.barrier)
    return told


def no_mpi(folder: Path) -> dict[str, str]:
    """As if mpi4py were not installed."""
    sys.modules["mpi4py"] = None  # type: ignore[assignment]
    return {"told": failing("no mpi4py", lambda: create(Rendezvous(), CPU))}


def lone(folder: Path) -> dict[str, str]:
    """A process that no mpirun started: one rank is fine, two are not."""
    told = {"two": failing("two", lambda: create(Rendezvous(rank=1, size=2, local_rank=1, local_size=2), CPU))}
    with create(Rendezvous(), CPU) as comm:
        told["one"] = str(comm.all_reduce(torch.full((2,), 2.5)).tolist())
    return told


def late(folder: Path) -> dict[str, str]:
    """The others are done while rank 0 still works; they must not take it with them."""
    with create(detect(), CPU) as comm:
        comm.all_reduce(torch.ones(3))
        rank = comm.rank
    if rank == 0:
        time.sleep(4.0)
    return {"done": "yes", "seconds of cpu": str(time.process_time())}


def raises(folder: Path) -> dict[str, str]:
    """Rank 1 fails while rank 0 waits for it in a collective."""
    comm: Communicator = create(detect(), CPU)
    comm.barrier()
    if comm.rank == 1:
        raise RuntimeError("rank 1 is broken")
    comm.barrier()
    return {}


def busy(folder: Path) -> dict[str, str]:
    """Rank 0 ends in order while rank 1 does not: it does not wait for it for long."""
    with create(detect(), CPU) as comm:
        comm.barrier()
    if comm.rank == 1:
        time.sleep(60.0)
    return {"done": "yes"}


def theirs(folder: Path) -> dict[str, str]:
    """The program uses MPI itself: its messages and ours stay apart, and its end of MPI stays its own."""
    from mpi4py import MPI

    with create(detect(), CPU) as comm:
        assert not library().ours
        summed = torch.full((3,), comm.rank + 1.0)
        comm.all_reduce(summed)
        own = torch.full((3,), 10.0 * (comm.rank + 1)).numpy()
        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, own)
        comm.barrier()
    return {"ours": str(summed.tolist()), "own": str(own.tolist())}


CALLS = (same_bits, refused, no_mpi, lone, late, raises, busy, theirs)

if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, place = detect().rank, Path(sys.argv[2])
    found = {call.__name__: call for call in CALLS}[sys.argv[1]](place)
    (place / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    sys.exit(0)

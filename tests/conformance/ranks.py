"""One rank of the conformance suite in a process of its own: runs every case over gloo and writes what came of it as JSON.

Arguments: rank, number of processes, the listening ports (one a world size, then one for a peer that is silent and one for a
peer that ends), their descriptors (rank 0), a folder. Results go to FOLDER/RANK.json: a text a case, "ok" or the traceback.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from communicator_cases import CASES, PROCESS_SIZES, WRAPPERS

from collectives import CollectiveError, Communicator, Rendezvous, create


def join(rank: int, size: int, port: int, listener: int | None, timeout: float) -> Communicator:
    rendezvous = Rendezvous(rank=rank, size=size, local_rank=rank, local_size=size, port=port, listener=listener, timeout=timeout)
    return create("gloo", rendezvous, torch.device("cpu"))


def attempt_all(comm: Communicator, shared: Path, results: dict[str, str]) -> None:
    """Every case through every wrapper. After a failure the ranks may be out of step, so the rest is not run."""
    for wrapper, wrap in WRAPPERS.items():
        if comm.size not in PROCESS_SIZES[wrapper]:
            continue
        for name, case in CASES.items():
            place = shared / f"{comm.size}-{wrapper}"
            place.mkdir(exist_ok=True)
            try:
                case(wrap(comm), place)
            except BaseException:
                results[f"{comm.size}/{wrapper}/{name}"] = traceback.format_exc()
                return
            results[f"{comm.size}/{wrapper}/{name}"] = "ok"


def expect_error(comm: Communicator) -> str:
    try:
        while True:
            comm.all_reduce(torch.full((5,), 3.0))
    except CollectiveError as error:
        return f"ok: {error}"
    except BaseException:
        return traceback.format_exc()


def main() -> None:
    torch.set_num_threads(1)
    rank, count = int(sys.argv[1]), int(sys.argv[2])
    ports, descriptors, folder = json.loads(sys.argv[3]), json.loads(sys.argv[4]), Path(sys.argv[5])
    results: dict[str, str] = {}
    for size in range(1, count + 1):
        if rank < size:
            with join(rank, size, ports[size - 1], descriptors[size - 1] if rank == 0 else None, timeout=30.0) as comm:
                attempt_all(comm, folder, results)
                comm.barrier()
    silent = join(rank, count, ports[count], descriptors[count] if rank == 0 else None, timeout=30.0)
    gone = join(rank, count, ports[count + 1], descriptors[count + 1] if rank == 0 else None, timeout=30.0)
    short = Rendezvous(rank=rank, size=count, timeout=1.5)
    silent._rendezvous = short  # type: ignore[attr-defined]  # a group among the same ranks with a short timeout
    group = silent.split(range(count))
    assert group is not None
    if rank == count - 1:
        silent.barrier()
    else:
        results["silent"] = expect_error(group)
        silent.barrier()
    if rank != count - 1:
        results["gone"] = expect_error(gone)
    (folder / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

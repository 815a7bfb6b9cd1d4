"""The ranks of the conformance suite in processes of their own: each runs every case and all failures, and tells what came of it.

Argument: a JSON object. backend, device: see `Place`; sizes: for each wrapper the numbers of ranks to try; scenes: which
failures; count: how many processes; ports and, for rank 0, descriptors of as many listeners: one for each number of ranks, then
one a scene; folder. Results go to FOLDER/RANK.json: a text a case, "ok" or the traceback. Without ports this is one rank, started
by mpiexec; else this process forks them all once torch is imported, and prints the codes with which they ended.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from communicator_cases import CASES, WRAPPERS, Case
from ipc_cases import GRAPH_CASES, IPC_CASES, OnCard
from tree_cases import TREE_CASES

from collectives import CollectiveError, Communicator, Rendezvous, create
from collectives.cuda_ipc import CudaIpc
from collectives.hierarchical import Hierarchical
from collectives.tree import TreeReduce

CPU = torch.device("cpu")
ENOUGH = 60.0
SHORT = 4.0
ALL_WRAPPERS = WRAPPERS | {"tree": TreeReduce, "ipc": lambda comm: comm}


def cases_of(wrapper: str, device: str) -> dict[str, Case]:
    """ipc: none around it, and cases of cuda_ipc alone."""
    if wrapper == "ipc":
        return CASES | IPC_CASES | (GRAPH_CASES if device == "cuda" else {})
    return CASES | TREE_CASES if wrapper == "tree" else CASES


class Place:
    """Where the ranks meet. backend: a name of the registry, or hierarchical or hierarchical+mpi followed by the host that each
    rank is to believe it is on, as in hierarchical/0112. Over MPI all ranks meet once, and smaller numbers are split off. device:
    cuda_ipc runs on the cards, which ranks share in turn, or, on cpu, over gloo in Triton's interpreter."""

    def __init__(self, spec: dict[str, Any], rank: int) -> None:
        self.name, _, hosts = spec["backend"].partition("/")
        self.hosts = [int(digit) for digit in hosts]
        self.count, self.ports, self.descriptors = spec["count"], spec["ports"], spec["descriptors"]
        self.device = spec["device"]
        self.rank = rank
        self.world: Communicator | None = None
        if "mpi" in self.name:
            from mpi4py import MPI

            self.rank = MPI.COMM_WORLD.rank
            self.world = create("mpi", self.rendezvous(self.count, 0, ENOUGH), CPU)

    def rendezvous(self, size: int, turn: int, timeout: float) -> Rendezvous:
        listener = self.descriptors[turn] if self.rank == 0 and self.descriptors else None
        port = self.ports[turn] if self.ports else 0
        return Rendezvous(
            rank=self.rank, size=size, local_rank=self.rank, local_size=size, port=port, listener=listener, timeout=timeout
        )

    def join(self, size: int, turn: int, timeout: float) -> Communicator | None:
        """Called by all ranks. None on those that are not among the first `size`."""
        if self.world is not None:
            base = self.world.split(range(size))
        elif self.rank < size and self.name == "cuda_ipc":
            return self.cuda_ipc(self.rendezvous(size, turn, timeout))
        elif self.rank < size:
            base = create("gloo" if self.hosts else self.name, self.rendezvous(size, turn, timeout), CPU)
        else:
            base = None
        return base if base is None or not self.hosts else Hierarchical(base, timeout, self.hosts[:size])

    def cuda_ipc(self, rendezvous: Rendezvous) -> Communicator:
        if self.device == "cuda":
            device = torch.device("cuda", self.rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
            return OnCard(create("cuda_ipc", rendezvous, device))
        from cuda_stand_in import LIMIT, StandIn

        return CudaIpc(create("gloo", rendezvous, CPU), rendezvous.timeout, limit=LIMIT, driver=StandIn())


def attempt_all(comm: Communicator, wrapper: str, device: str, shared: Path, results: dict[str, str]) -> bool:
    """Every case through a wrapper. After a failure the ranks may be out of step, so the rest is not run."""
    shared.mkdir(exist_ok=True)
    for name, case in cases_of(wrapper, device).items():
        try:
            case(ALL_WRAPPERS[wrapper](comm), shared)
        except BaseException:
            results[f"{comm.size}/{wrapper}/{name}"] = traceback.format_exc()
            return False
        results[f"{comm.size}/{wrapper}/{name}"] = "ok"
    return True


def expect_error(comm: Communicator) -> str:
    """ "ok", the seconds since some start that all processes share, and what was raised."""
    try:
        while True:
            comm.all_reduce(torch.full((5,), 3.0))
    except CollectiveError as error:
        return f"ok {time.monotonic():.3f} {error}"
    except BaseException:
        return traceback.format_exc()


def meet_in(folder: Path, name: str, rank: int, others: int) -> None:
    """Waits, by files, for `others` ranks."""
    (folder / f"{name}-{rank}").touch()
    deadline = time.monotonic() + ENOUGH
    while len(list(folder.glob(f"{name}-*"))) < others and time.monotonic() < deadline:
        time.sleep(0.02)


def scene(name: str, comm: Communicator, last: bool, folder: Path, results: dict[str, str]) -> None:
    comm.barrier()
    if last and name == "gone":
        (folder / "0.time").write_text(str(time.monotonic()), encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)
    if not last:
        if name == "aborted":
            threading.Timer(0.3, comm.abort).start()
        start = time.monotonic()
        results[name] = expect_error(comm)
        results[f"{name} took"] = f"{time.monotonic() - start:.3f}"
        start = time.monotonic()
        comm.close()  # while the last one still neither comes nor goes
        results[f"closing {name} took"] = f"{time.monotonic() - start:.3f}"
    if name != "gone":
        meet_in(folder, name, comm.rank, comm.size)
    comm.close()
    try:
        comm.barrier()
    except CollectiveError as error:
        results["closed"] = f"ok {error}"


def attend(spec: dict[str, Any], rank: int = 0) -> None:
    """rank: of no meaning under mpiexec."""
    place, folder, results = Place(spec, rank), Path(spec["folder"]), dict[str, str]()
    sizes = sorted({size for tried in spec["sizes"].values() for size in tried})
    report = folder / f"{place.rank}.json"
    try:
        for turn, size in enumerate(sizes):
            comm = place.join(size, turn, ENOUGH)
            if comm is None:
                continue
            with comm:
                wrappers = [wrapper for wrapper, tried in spec["sizes"].items() if size in tried]
                device = place.device
                if not all(attempt_all(comm, name, device, folder / f"{size}-{name}", results) for name in wrappers):
                    return
                comm.barrier()
        for turn, name in enumerate(spec["scenes"], len(sizes)):
            comm = place.join(place.count, turn, SHORT if name == "silent" else ENOUGH)
            assert comm is not None
            report.write_text(json.dumps(results), encoding="utf-8")
            scene(name, comm, comm.rank == place.count - 1, folder, results)
    except BaseException:
        results["error"] = traceback.format_exc()
    finally:
        report.write_text(json.dumps(results), encoding="utf-8")
        sys.stdout.flush()
        if place.world is not None and "error" not in results:
            place.world.close()
        else:
            os._exit(0)


def fork(spec: dict[str, Any]) -> list[int]:
    """The exit codes of all ranks."""
    children = []
    for rank in range(spec["count"]):
        pid = os.fork()
        if not pid:
            for descriptor in spec["descriptors"] if rank else ():
                os.close(descriptor)
            attend(spec, rank)
            os._exit(1)  # is not reached
        children.append(pid)
    for descriptor in spec["descriptors"]:
        os.close(descriptor)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    if given["ports"]:
        print(json.dumps(fork(given)))
    else:
        attend(given)

"""The suite on the communicators of one process, solo and loopback (1 to 4 threads), plain and through the wrappers; how the
others meet; and the registry. For those whose ranks are processes see test_processes.py.
"""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from communicator_cases import CASES, WRAPPERS

from collectives import CollectiveError, Communicator, Rendezvous, available, create
from collectives.checked import Checked
from collectives.loopback import loopback
from collectives.pulse import Pulse, Pulsed

CPU = torch.device("cpu")
SIZES = (1, 2, 3, 4)


def run_threads(comms: list[Any], call: Callable[[Any], object], seconds: float = 60.0) -> list[object]:
    """`call` on every rank's communicator at once; what each returned or raised, by rank. A rank that hangs fails the test."""
    results: list[object] = ["hangs"] * len(comms)

    def run(rank: int) -> None:
        try:
            results[rank] = call(comms[rank])
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(comms))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), results
    return results


def raise_first(results: list[object]) -> None:
    """Raises what a rank raised, rather the cause than a peer's report of it."""
    errors = [r for r in results if isinstance(r, BaseException)]
    for error in sorted(errors, key=lambda e: isinstance(e, CollectiveError)):
        raise error


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_solo(wrapper: str, case: str, tmp_path: Path) -> None:
    CASES[case](WRAPPERS[wrapper](create("solo", Rendezvous(), CPU)), tmp_path)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_loopback(wrapper: str, size: int, case: str, tmp_path: Path) -> None:
    comms = [WRAPPERS[wrapper](comm) for comm in loopback(size, timeout=30.0)]
    raise_first(run_threads(comms, lambda comm: CASES[case](comm, tmp_path)))


def test_gloo_names_the_ranks_that_do_not_join() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    rendezvous = Rendezvous(size=3, local_size=3, port=port, listener=listener.detach(), timeout=0.5)
    with pytest.raises(CollectiveError, match=r"ranks \[1, 2\] did not join within 0.5 s"):
        create("gloo", rendezvous, CPU)


@pytest.mark.parametrize("names", [("gloo", "shm", "gloo"), ("hierarchical", "gloo", "gloo")])
def test_ranks_that_chose_different_communicators_are_told_so(names: tuple[str, ...]) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port, descriptor = listener.getsockname()[1], listener.detach()
    told = "; ".join(f"rank {rank}: {name}" for rank, name in enumerate(names))

    def call(rank: int) -> None:
        first = descriptor if rank == 0 else None
        create(names[rank], Rendezvous(rank=rank, size=3, local_size=3, port=port, listener=first, timeout=20.0), CPU)

    for result in run_threads([0, 1, 2], call):
        assert isinstance(result, ValueError), result
        assert str(result) == f"ranks chose different communicators ({told}); give every rank the same one"


class LateWork:
    """Is done just after the first wait for it has timed out."""

    def __init__(self, failure: str) -> None:
        self.failure, self.waits = failure, 0

    def is_completed(self) -> bool:
        return self.waits > 0

    def wait(self, timeout: object) -> None:
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.failure:
            raise RuntimeError(self.failure)


def test_gloo_takes_work_that_is_done_right_after_a_slice_for_done() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    comm = create("gloo", Rendezvous(port=listener.getsockname()[1], listener=listener.detach(), timeout=10.0), CPU)
    comm._run(lambda: LateWork(""))  # type: ignore[attr-defined]
    with pytest.raises(CollectiveError, match="gloo: Connection closed by peer"):
        comm._run(lambda: LateWork("Connection closed by peer"))  # type: ignore[attr-defined]
    comm.close()


def test_an_aborted_one_fails_its_check() -> None:
    """What its work on a device left behind is of no use, and nothing else would tell."""
    listener = socket.create_server(("127.0.0.1", 0))
    comm = Pulsed(
        create("gloo", Rendezvous(port=listener.getsockname()[1], listener=listener.detach(), timeout=10.0), CPU), Pulse()
    )
    comm.check()
    comm.abort()
    with pytest.raises(CollectiveError, match="gloo: the communicator was aborted"):
        comm.check()
    comm.close()


def test_a_closed_gloo_communicator_says_so() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    comm = create("gloo", Rendezvous(port=listener.getsockname()[1], listener=listener.detach(), timeout=10.0), CPU)
    comm.barrier()
    comm.close()
    comm.close()
    with pytest.raises(CollectiveError, match="closed"):
        comm.barrier()


@pytest.mark.parametrize("size", [2, 4])
def test_loopback_raises_when_a_peer_closes(size: int) -> None:
    def call(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == size - 1:
            comm.close()
        else:
            while True:
                comm.all_reduce(torch.ones(3))

    results = run_threads(list(loopback(size, timeout=30.0)), call)
    assert results[-1] is None or isinstance(results[-1], CollectiveError)
    assert all(isinstance(r, CollectiveError) for r in results[:-1]), results


def test_loopback_raises_when_a_peer_is_silent() -> None:
    results = run_threads(
        list(loopback(3, timeout=0.2)), lambda comm: comm.all_reduce(torch.ones(3)) if comm.rank != 1 else "silent"
    )
    assert results[1] == "silent"
    assert isinstance(results[0], CollectiveError)
    assert isinstance(results[2], CollectiveError)


def test_loopback_raises_when_a_peer_fails_inside() -> None:
    """A shape that does not fit fails on the ranks that see it, and the others do not wait for them."""
    results = run_threads(list(loopback(3, timeout=30.0)), lambda comm: comm.all_reduce(torch.ones(3 if comm.rank else 4)))
    assert all(isinstance(r, RuntimeError) for r in results), results


def test_a_rank_may_close_as_soon_as_its_own_last_collective_is_done() -> None:
    """Its peers have met it in that collective, so they get their results as well."""
    for turn in range(50):

        def call(comm: Communicator) -> float:
            with comm:
                return float(comm.all_reduce(torch.full((3,), comm.rank + 1.5)).sum())

        assert run_threads(list(loopback(4, timeout=30.0)), call) == [36.0] * 4, turn


def test_checked_passes_close_and_size_on() -> None:
    first, second = loopback(2)
    checked = Checked(first)
    assert (checked.rank, checked.size, checked.device) == (0, 2, CPU)
    checked.close()
    with pytest.raises(CollectiveError):
        second.barrier()


def test_registry_names_what_there_is() -> None:
    assert {"solo", "shm", "gloo", "mpi", "hierarchical", "hierarchical+mpi", "nccl", "cuda_ipc", "hccl"} <= set(available())
    with pytest.raises(ValueError, match=r"'glue' is unknown.*gloo.*nccl.*solo"):
        create("glue", Rendezvous(), CPU)


def test_solo_refuses_more_than_one_rank() -> None:
    with pytest.raises(ValueError, match=r"solo.*one rank, not 2"):
        create("solo", Rendezvous(size=2), CPU)


def test_nccl_refuses_the_cpu_in_one_line() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    rendezvous = Rendezvous(port=listener.getsockname()[1], listener=listener.detach(), timeout=10.0)
    with pytest.raises(ValueError, match=r"'nccl'.*(cuda|CUDA)") as caught:
        create("nccl", rendezvous, CPU)
    assert "\n" not in str(caught.value)

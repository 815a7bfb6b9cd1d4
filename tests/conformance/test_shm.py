"""What only shm does: threads as ranks, the segment, how ranks find it, and a stress of thousands of collectives."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_communicators import raise_first, run_threads

from collectives import CollectiveError, Communicator, Rendezvous, _native, create, shm
from collectives.checked import Checked
from collectives.loopback import _sum as loopback_sum
from collectives.loopback import loopback
from collectives.pulse import Pulse, Pulsed
from collectives.traced import Traced

CPU = torch.device("cpu")
STRESS = Path(__file__).with_name("stress_ranks.py")


class Meeting:
    """An exchange among threads. `change` may falsify what a rank gets to see."""

    def __init__(self, size: int, change: Callable[[int, list[bytes]], list[bytes]] = lambda rank, blobs: blobs) -> None:
        self.barrier, self.blobs, self.change = threading.Barrier(size, timeout=20.0), [b""] * size, change

    def of(self, rank: int) -> Callable[[bytes], list[bytes]]:
        def exchange(blob: bytes) -> list[bytes]:
            self.blobs[rank] = blob
            self.barrier.wait()
            blobs = list(self.blobs)
            self.barrier.wait()
            return self.change(rank, blobs)

        return exchange


def connected(size: int, timeout: float = 20.0) -> list[Communicator]:
    """The communicators of `size` threads, by rank."""
    meeting = Meeting(size)
    comms = run_threads(list(range(size)), lambda rank: shm.connect(meeting.of(rank), rank, range(size), CPU, timeout))
    raise_first(comms)
    return comms  # type: ignore[return-value]


def test_the_sums_are_those_of_loopback_bit_for_bit() -> None:
    def sums(comm: Communicator) -> list[torch.Tensor]:
        found = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for length in (1, 17, 4099, 20_011, 300_007):
                generator = torch.Generator().manual_seed(13 * comm.rank + length)
                x = torch.randn(length, generator=generator, dtype=torch.float64) * 2.0 ** torch.randint(
                    -30, 10, (length,), generator=generator
                )
                found.append(comm.all_reduce(x.to(dtype)))
        return found

    expected = run_threads(list(loopback(3, timeout=30.0)), sums)
    raise_first(expected)
    found = run_threads(connected(3), sums)
    raise_first(found)
    for rank in range(3):
        for a, b in zip(found[rank], expected[rank], strict=True):  # type: ignore[call-overload]
            assert torch.equal(a.view(torch.int8), b.view(torch.int8)), (rank, a.dtype, a.shape)


def test_a_sum_for_native_code_is_the_all_reduce() -> None:
    """Counted as one where collectives are; a wrapper that is to see each operation has none."""

    def sums(comm: Communicator) -> list[torch.Tensor]:
        pulse, found = Pulse(), []
        pulsed = Pulsed(comm, pulse)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(77, generator=torch.Generator().manual_seed(comm.rank)).to(dtype)
            for each in (comm, pulsed):
                y, native = x.clone(), each.sum_at(dtype)
                assert native is not None
                native[0](y.data_ptr(), y.numel(), native[1])
                found.append(y)
            found.append(comm.all_reduce(x))
            assert pulsed.sum_at(torch.complex64) is None
        assert pulse.entered == 3
        assert Traced(comm).sum_at(torch.float32) is None
        assert Checked(comm).sum_at(torch.float32) is None
        return found

    found = run_threads(connected(2), sums)
    raise_first(found)
    for native, counted, plain in zip(*[iter(found[0])] * 3, strict=True):  # type: ignore[call-overload]
        assert torch.equal(native, plain)
        assert torch.equal(counted, plain)
    assert connected(1)[0].sum_at(torch.float32) is None


def native_sum(isa: int, inputs: list[torch.Tensor]) -> torch.Tensor:
    """By the code for one instruction set; what it wrote beyond the result shows."""
    memory = torch.full((inputs[0].numel() + 64,), 77, dtype=inputs[0].dtype)
    out = memory[: inputs[0].numel()]
    code = list(shm._SUMMED).index(out.dtype)
    _native.sum(isa, out.data_ptr(), out.numel(), code, *[x.data_ptr() for x in inputs])
    assert bool((memory[out.numel() :] == 77).all())
    return out


each_isa = pytest.mark.parametrize("isa", range(len(_native.ISAS)), ids=_native.ISAS)


@each_isa
def test_every_half_is_read_and_rounded_as_torch_does(isa: int) -> None:
    """All float16 and bfloat16 numbers, NaN apart, plus one that moves the sum to another number or to half way."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        every = bits.view(dtype)
        every = every[~every.isnan()]
        for other in (2.0**-24, 2.0**-14, 0.33325195, -1.0, 1024.5, 3.0e4, -float("inf")):
            added = torch.full_like(every, other)
            expected = (every.float() + added.float()).to(dtype)
            known = ~expected.isnan()
            found = native_sum(isa, [every, added])
            assert torch.equal(found[known].view(torch.int16), expected[known].view(torch.int16)), (dtype, other)
            assert bool(found[~known].isnan().all())


@each_isa
@pytest.mark.parametrize("count", [2, 3, 5])
def test_sums_of_all_lengths(isa: int, count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for dtype in shm._SUMMED:
        for length in (*range(1, 70), 511, 512, 513, 1030):
            if dtype.is_floating_point:
                inputs = [torch.randn(length + 1, generator=generator).to(dtype)[1:] for _ in range(count)]
            else:
                limits = torch.iinfo(dtype)
                inputs = [
                    torch.randint(limits.min, limits.max, (length + 1,), generator=generator, dtype=dtype)[1:]
                    for _ in range(count)
                ]
            assert torch.equal(native_sum(isa, inputs), loopback_sum(inputs)), (dtype, length)


def test_bytes_of_any_dtype_travel() -> None:
    def call(comm: Communicator) -> None:
        for dtype in (torch.bool, torch.int16, torch.uint8, torch.float64, torch.complex64, torch.float8_e4m3fn):
            inputs = [(torch.arange(7) * 3 + r + 1).to(torch.int32).remainder(2 + r).to(dtype) for r in range(3)]
            found = comm.all_gather(inputs[comm.rank])
            assert torch.equal(found.view(torch.uint8), torch.cat(inputs).view(torch.uint8)), dtype
            found = comm.broadcast(inputs[comm.rank].clone(), 1)
            assert torch.equal(found.view(torch.uint8), inputs[1].view(torch.uint8)), dtype
            found = torch.stack(comm.all_to_all([inputs[comm.rank]] * 3))
            assert torch.equal(found.view(torch.uint8), torch.stack(inputs).view(torch.uint8)), dtype
        with pytest.raises(ValueError, match=r"'shm' does not sum tensors of dtype bool"):
            comm.all_reduce(torch.tensor([True]))
        with pytest.raises(ValueError, match=r"'shm' works on cpu, not on device meta"):
            comm.all_reduce(torch.empty(3, device="meta"))
        assert comm.all_reduce(torch.tensor([7.5])).item() == 22.5

    raise_first(run_threads(connected(3), call))


def test_a_rank_may_close_as_soon_as_its_own_last_collective_is_done() -> None:
    for turn in range(30):

        def call(comm: Communicator) -> float:
            with comm:
                return float(comm.all_reduce(torch.full((200_000,), comm.rank + 1.5)).sum())

        assert run_threads(connected(4), call) == [200_000 * 12.0] * 4, turn


def test_a_peer_that_closes_ends_the_wait() -> None:
    def call(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == 1:
            comm.close()
        while True:
            comm.all_reduce(torch.ones(3))

    start = time.monotonic()
    results = run_threads(connected(3), call)
    assert time.monotonic() - start < 2.0
    assert str(results[1]) == "shm: the communicator is closed"
    for rank in (0, 2):
        assert isinstance(results[rank], CollectiveError)
        assert "rank 1 (pid " in str(results[rank]) or "failed in a collective" in str(results[rank]), results[rank]


def test_ranks_that_disagree_are_told_what_each_was_about_to_do() -> None:
    def call(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.all_reduce(torch.ones(5))
        else:
            comm.barrier()

    for result in run_threads(connected(2), call):
        assert isinstance(result, CollectiveError)
        assert str(result) == "shm: ranks disagree: rank 0: all_reduce of 5; rank 1: barrier of 0"


def test_closing_from_another_thread_ends_the_wait() -> None:
    comms = connected(2)
    threading.Timer(0.2, comms[0].close).start()
    with pytest.raises(CollectiveError, match="closed"):
        comms[0].all_reduce(torch.ones(5))
    comms[0].close()
    with pytest.raises(CollectiveError, match="closed"):
        comms[0].all_reduce(torch.ones(5))


def test_control_c_ends_the_wait() -> None:
    """In a process of its own, whose only other rank, a thread, does not come."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import signal, threading, torch, test_shm\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "comm, silent = test_shm.connected(2, timeout=60.0)\n"
        "print('waits', flush=True)\n"
        "try:\n    comm.all_reduce(torch.ones(3))\nexcept KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
        "try:\n    comm.barrier()\nexcept RuntimeError as error:\n    print(error, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            time.sleep(0.3)
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
            assert time.monotonic() - start < 1.0
            assert process.stdout.readline() == "shm: the communicator failed before\n"
        finally:
            process.kill()


def test_nothing_is_left_open() -> None:
    def descriptors() -> dict[str, str]:
        return {entry: os.readlink(f"/proc/self/fd/{entry}") for entry in os.listdir("/proc/self/fd") if _lives(entry)}

    def mapped() -> int:
        return Path("/proc/self/maps").read_text(encoding="ascii").count("memfd:qtp-shm")

    gc.collect()
    before = mapped()
    comms = connected(3)
    assert not [name for name in descriptors().values() if "qtp-shm" in name]
    assert mapped() == before + 3
    children = run_threads(comms, lambda comm: comm.split([0, 2]))
    assert mapped() == before + 5
    for comm in [*comms, *[child for child in children if child is not None]]:
        comm.close()  # type: ignore[attr-defined]
    assert mapped() == before


def _lives(entry: str) -> bool:
    return os.path.exists(f"/proc/self/fd/{entry}") or os.path.islink(f"/proc/self/fd/{entry}")


def falsified(rank: int, **changes: object) -> Callable[[int, list[bytes]], list[bytes]]:
    """What rank 1 is made to see of a rank's card."""

    def change(seen_by: int, blobs: list[bytes]) -> list[bytes]:
        if seen_by == 1 and blobs[rank].startswith(b"{"):
            blobs[rank] = json.dumps(json.loads(blobs[rank]) | changes).encode()
        return blobs

    return change


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"nonce": "00" * 16}, r"rank 1: found other memory than that of rank 0 \(pid \d+\); choose gloo"),
        ({"descriptor": 987654}, r"rank 1: cannot share memory with rank 0 \(pid \d+\): .*No such file.*; choose gloo"),
        ({"machine": "another"}, r"rank 1: it is not on the host of rank 0 .*; choose gloo"),
    ],
)
def test_memory_that_cannot_be_shared_is_refused_on_every_rank(changes: dict[str, object], told: str) -> None:
    meeting = Meeting(3, falsified(0, **changes))
    for result in run_threads([0, 1, 2], lambda rank: shm.connect(meeting.of(rank), rank, range(3), CPU, 20.0)):
        assert isinstance(result, ValueError), result
        with pytest.raises(ValueError, match=f"^communicator 'shm': {told}$"):
            raise result


def test_ranks_of_several_hosts_are_refused_in_one_line() -> None:
    rendezvous = Rendezvous(rank=0, size=4, local_rank=0, local_size=2)
    with pytest.raises(ValueError, match=r"'shm' serves the ranks of one host, and only 2 of 4 .*; choose hierarchical or gloo"):
        create("shm", rendezvous, CPU)
    with pytest.raises(ValueError, match="'shm' works on cpu, not on device cuda"):
        create("shm", replace(rendezvous, local_size=4), torch.device("cuda"))


@pytest.mark.parametrize(("size", "count"), [(2, 20_000), (3, 6_000), (4, 6_000)])
def test_stress(size: int, count: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port, descriptor = listener.getsockname()[1], listener.fileno()
    processes = [
        subprocess.Popen(
            [sys.executable, str(STRESS), *map(str, (rank, size, port, descriptor, count, 100))],
            pass_fds=[descriptor] if rank == 0 else (),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    listener.close()
    try:
        errors = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * size, errors

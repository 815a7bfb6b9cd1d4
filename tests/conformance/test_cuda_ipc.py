"""cuda_ipc without a card: the steps of its kernel one by one, in orders that ranks can come in, under Triton's interpreter; who
sums what; what is refused, and that nothing is left behind then. What runs it in processes, here or on cards, is
test_processes.py.
"""

import ctypes
import itertools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from cuda_stand_in import LIMIT, StandIn
from test_communicators import raise_first, run_threads
from torch import Tensor

from collectives import CollectiveError, Rendezvous, create, cuda_driver, cuda_ipc, cuda_segment, torch_group
from collectives.communicator import Communicator
from collectives.cuda_driver import HANDLE_BYTES, CudaDriver, DriverError
from collectives.cuda_ipc import SUMMED, CudaIpc
from collectives.cuda_ipc_kernel import launch
from collectives.cuda_segment import PROGRAM_BYTES, TABLE, Layout
from collectives.loopback import loopback
from collectives.staged import Staged
from collectives.traced import Traced

CPU = torch.device("cpu")


def joined(size: int, timeout: float = 30.0, wrapper: Callable[[Any], Communicator] = lambda comm: comm) -> list[CudaIpc]:
    """The ranks of one process, over loopback."""
    inner = [wrapper(comm) for comm in loopback(size, timeout=timeout)]
    found = run_threads(inner, lambda comm: CudaIpc(comm, timeout, limit=LIMIT, driver=StandIn()))
    raise_first(found)
    return found  # type: ignore[return-value]


def write(comm: CudaIpc, x: Tensor) -> None:
    assert comm._segment is not None
    launch(x, comm._segment, comm.rank, comm.size, comm._timeout, writes=True, sums=False)


def sum_up(comm: CudaIpc, x: Tensor) -> None:
    assert comm._segment is not None
    launch(x, comm._segment, comm.rank, comm.size, comm._timeout, writes=False, sums=True)


def all_reduce(comms: list[CudaIpc], tensors: list[Tensor]) -> None:
    for step in (write, sum_up):
        for comm, x in zip(comms, tensors, strict=True):
            step(comm, x)


def drawn(size: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    """Numbers in memory with NaN around, the first and the last of more than two so large that their sum depends on the order
    even in half precision; integers in all bits."""
    generator = torch.Generator().manual_seed(n)
    if dtype == torch.int32:
        return [torch.randint(-(2**31), 2**31, (n,), generator=generator).to(dtype) for _ in range(size)]
    tensors = [torch.full((n + 64,), float("nan"), dtype=dtype)[32:-32] for _ in range(size)]
    for x in tensors:
        x.copy_(torch.randn(n, generator=generator) / 1024)
    if size > 2:
        tensors[0].mul_(2.0**24)
        tensors[-1].copy_(-tensors[0])
    return tensors


def in_order(tensors: list[Tensor]) -> Tensor:
    wide = torch.int32 if tensors[0].dtype == torch.int32 else torch.float32
    total = tensors[0].to(wide)
    for x in tensors[1:]:
        total = total + x.to(wide)
    return total.to(tensors[0].dtype)


@pytest.mark.parametrize("dtype", SUMMED)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_taken_in_the_order_of_the_ranks(size: int, dtype: torch.dtype) -> None:
    comms, program = joined(size), PROGRAM_BYTES // dtype.itemsize
    for n in (1, 7, program, program + 1, 3 * program):
        tensors = drawn(size, n, dtype)
        expected, other = in_order(tensors), in_order([tensors[0], *tensors[:0:-1]])
        assert dtype == torch.int32 or size == 2 or n < 100 or not torch.equal(expected, other), "no order can be told"
        all_reduce(comms, tensors)
        for rank, x in enumerate(tensors):
            assert torch.equal(x, expected), (rank, n)
    for comm in comms:
        comm.close()


def test_what_lies_beside_a_tensor_stays() -> None:
    comms = joined(2)
    memory = [torch.full((n,), 7, dtype=torch.int32) for n in (1200, 1200)]
    all_reduce(comms, [m[32:1100] for m in memory])
    for m in memory:
        assert m[32:1100].unique().tolist() == [14]
        assert m[:32].unique().tolist() == m[1100:].unique().tolist() == [7]


def test_a_rank_may_be_one_turn_ahead() -> None:
    """It has written turn 2 before the others have read turn 1; and so on, so that each half is used again."""
    comms = joined(3)
    inputs = [[torch.full((2000,), 10.0**r * (t + 1)) for t in range(4)] for r in range(3)]
    for x, comm in zip(inputs, comms, strict=True):
        write(comm, x[0])
    for t in range(3):
        for rank in (2, 0, 1):
            sum_up(comms[rank], inputs[rank][t])
            write(comms[rank], inputs[rank][t + 1])
        for rows in inputs:
            assert rows[t].unique().tolist() == [111.0 * (t + 1)], t


def test_programs_count_their_turns_by_themselves() -> None:
    comms = joined(2)
    for n in (3000, 5, 1025, 2, 3000, 1, 2049):
        tensors = drawn(2, n, torch.float32)
        expected = in_order(tensors)
        all_reduce(comms, tensors)
        assert torch.equal(tensors[0], expected)
        assert torch.equal(tensors[1], expected)


def test_parts_of_a_slot_belong_to_one_program() -> None:
    """Whatever the dtype: the first turn of program 1, in bfloat16, comes before another rank has read that of program 0."""
    comms = joined(2)
    wide = [torch.full((1024,), 10.0**r) for r in range(2)]
    narrow = [torch.full((3000,), r + 1.0, dtype=torch.bfloat16) for r in range(2)]
    for rank in range(2):
        write(comms[rank], wide[rank])
    sum_up(comms[1], wide[1])
    write(comms[1], narrow[1])
    sum_up(comms[0], wide[0])
    write(comms[0], narrow[0])
    for rank in range(2):
        sum_up(comms[rank], narrow[rank])
        assert (wide[rank].unique().tolist(), narrow[rank].unique().tolist()) == ([11.0], [3.0])


def test_turns_go_round() -> None:
    """After 2^31 sums, a few days, they are negative, and halves still take turns."""
    comms = joined(2)
    for comm in comms:
        assert comm._segment is not None
        ctypes.c_int32.from_address(comm._segment.address + comm._segment.layout.turns).value = 2**31 - 3
    for t in range(6):
        tensors = [torch.full((9,), float(t + 1)), torch.full((9,), 100.0)]
        all_reduce(comms, tensors)
        assert [x.unique().tolist() for x in tensors] == [[101.0 + t]] * 2


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
def test_a_peer_that_does_not_come_is_named_and_nobody_waits_for_it_again(turns: int) -> None:
    """Also where flags and slots still hold what it wrote turns ago."""
    comms = joined(3, timeout=0.3)
    for _ in range(turns):
        all_reduce(comms, drawn(3, 5, torch.float32))
    x = torch.ones(5)
    for comm in comms[:2]:
        write(comm, x.clone())
    start = time.monotonic()
    sum_up(comms[0], x)
    assert 0.25 < time.monotonic() - start < 3.0
    sum_up(comms[1], x.clone())
    start = time.monotonic()
    for _ in range(3):
        launch(x, comms[0]._segment, 0, 3, 30.0)
    assert time.monotonic() - start < 5.0, "a kernel waited although one before it had given up"
    line = "cuda_ipc: rank 2 did not come within 0.3 s"
    for call in (lambda: comms[0].all_reduce(x), comms[0].barrier, lambda: comms[0].split([0])):
        with pytest.raises(CollectiveError, match=line):
            call()
    comms[0].close()
    with pytest.raises(CollectiveError, match=line):
        comms[1].close()  # where nobody has seen it
    comms[1].close()
    comms[2].close()
    for comm in comms:
        with pytest.raises(CollectiveError, match="is closed"):
            comm.all_reduce(x)


def test_what_comes_of_a_sum_that_was_given_up_is_given_to_nobody() -> None:
    """Else a peer that was merely late would add it, and know of nothing."""
    comms = joined(2, timeout=0.3)
    x = torch.ones(5)
    write(comms[0], x)
    sum_up(comms[0], x)  # in vain
    write(comms[0], x)
    for comm in comms[1:]:
        mine = torch.ones(5)
        write(comm, mine)
        sum_up(comm, mine)  # of the first turn, which came in time
        assert mine.tolist() == [2.0] * 5
        comm.check()
        write(comm, mine)
        sum_up(comm, mine)
        with pytest.raises(CollectiveError, match=r"rank 0 did not come within 0.3 s"):
            comm.check()
    for comm in comms:
        comm.abort()
        comm.close()


def test_an_abort_ends_a_kernel_that_waits() -> None:
    comms = joined(2)
    x = torch.ones(9000 // 4)
    threading.Timer(0.2, comms[0].abort).start()
    start = time.monotonic()
    write(comms[0], x)
    sum_up(comms[0], x)
    assert 0.1 < time.monotonic() - start < 2.0
    with pytest.raises(CollectiveError, match="cuda_ipc: the communicator was aborted"):
        comms[0].all_reduce(x)
    comms[0].close()
    comms[0].abort()


def test_who_sums_what(monkeypatch: pytest.MonkeyPatch) -> None:
    comms = joined(2, wrapper=Traced)
    kernel: list[tuple[torch.dtype, int]] = []
    monkeypatch.setattr(CudaIpc, "_sum", lambda self, x: kernel.append((x.dtype, x.nbytes)))
    for comm in comms:
        comm.inner.calls.clear()  # type: ignore[attr-defined]
    small = [torch.zeros(3, dtype=dtype) for dtype in SUMMED] + [torch.zeros(LIMIT // 2, dtype=torch.bfloat16)]
    other = [torch.zeros(LIMIT // 2 + 1, dtype=torch.bfloat16), *(torch.zeros(3, dtype=d) for d in (torch.int64, torch.float64))]
    raise_first(run_threads(comms, lambda comm: [comm.all_reduce(x.clone()) for x in [*small, *other, torch.zeros(0)]]))
    assert sorted(map(str, kernel)) == sorted(str((x.dtype, x.nbytes)) for x in small + small)
    for comm in comms:
        assert [call.bytes for call in comm.inner.calls] == [x.nbytes for x in other]  # type: ignore[attr-defined]


def test_small_parts_are_gathered_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits of all dtypes, as the inner communicator gathers them; and what that must do itself."""
    comms = joined(3, wrapper=Traced)
    monkeypatch.setattr(CudaIpc, "_sum", lambda self, x: self.inner.inner.all_reduce(x))  # which takes its turns in threads
    special = torch.tensor([[-0.0, float("nan"), float("-inf")], [1e-42, 3e38, -1.0]])
    bytes_, large_number = torch.arange(5, dtype=torch.uint8), torch.full((1, 1), 2**62)
    small = [special, special.double(), special.bfloat16(), special > 0, bytes_, large_number]
    large = torch.zeros(LIMIT // 4)
    assert all(comm.captures(LIMIT) and not comm.captures(LIMIT + 1) for comm in comms)

    def gather(comm: CudaIpc) -> None:
        comm.inner.calls.clear()  # type: ignore[attr-defined]
        for x in small:
            mine = x.roll(comm.rank)
            for dim in range(x.dim()):
                found, wanted = comm.all_gather(mine, dim), comm.inner.inner.all_gather(mine, dim)  # type: ignore[attr-defined]
                assert found.shape == wanted.shape
                assert torch.equal(*(each.contiguous().view(torch.uint8) for each in (found, wanted)))
        assert comm.inner.calls == []  # type: ignore[attr-defined]
        comm.all_gather(large)
        comm.all_gather(special[: comm.rank], 0, sizes=[0, 1, 2])
        assert [call.op for call in comm.inner.calls] == ["all_gather"] * 2  # type: ignore[attr-defined]

    raise_first(run_threads(comms, gather))


def test_what_is_not_dense_or_aligned_goes_through_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    comm = joined(2)[0]

    def doubled(self: CudaIpc, x: Tensor) -> None:
        assert x.is_contiguous()
        assert x.data_ptr() % 16 == 0
        x.mul_(2)

    monkeypatch.setattr(CudaIpc, "_sum", doubled)
    memory = torch.arange(64.0)
    for view in (memory[1:5], memory[8:20:2], memory[32:48].view(4, 4).t()):
        before = view.clone()
        assert comm.all_reduce(view) is view
        assert torch.equal(view, before * 2)
    assert memory[[0, 5, 9, 11, 48]].tolist() == [0, 5, 9, 11, 48]


def test_one_rank_needs_no_memory() -> None:
    comm = CudaIpc(loopback(1)[0], 1.0, driver=StandIn("allocate"))
    x = torch.ones(3)
    assert comm.all_reduce(x) is x
    comm.close()
    with pytest.raises(CollectiveError, match="cuda_ipc: the communicator is closed"):
        comm.all_reduce(x)


@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_parts_of_a_segment_lie_apart(size: int) -> None:
    for limit in (PROGRAM_BYTES, cuda_ipc.LIMIT):
        layout = Layout.of(size, limit)
        assert layout.programs * PROGRAM_BYTES == limit
        assert TABLE + 8 * size <= layout.turns
        assert layout.turns + 4 * layout.programs <= layout.flags
        assert layout.flags + 4 * 2 * layout.programs * size <= layout.slots
        assert layout.slots % 4096 == 0
        assert layout.slots + 2 * size * limit == layout.total < 2**31


@pytest.mark.parametrize("fails", ["allocate", "allocate_words", "handle", "open"])
def test_a_driver_that_cannot_is_told_by_every_rank_and_leaves_nothing(fails: str) -> None:
    drivers = [StandIn(fails if rank == 1 else "") for rank in range(3)]
    found = run_threads(list(loopback(3)), lambda comm: CudaIpc(comm, 5.0, limit=LIMIT, driver=drivers[comm.rank]))
    peer = "cannot open the memory of rank 0: " if fails == "open" else ""
    line = f"communicator 'cuda_ipc': rank 1: {peer}{fails}: not today (801); choose nccl, or gloo where ranks share a card"
    assert [(type(error), str(error)) for error in found] == [(ValueError, line)] * 3
    assert [driver.held for driver in drivers] == [{}] * 3


def test_a_closed_communicator_and_what_was_split_off_hold_nothing() -> None:
    drivers = [StandIn() for _ in range(3)]

    def call(comm: Communicator) -> tuple[int, int]:
        ipc = CudaIpc(comm, 5.0, limit=LIMIT, driver=drivers[comm.rank])
        child = ipc.split([0, 2])
        assert (child is None) == (comm.rank == 1)
        held = len(drivers[comm.rank].held)
        if child is not None:
            assert isinstance(child, CudaIpc)
            assert child._limit == LIMIT
            child.close()
        after = len(drivers[comm.rank].held)
        ipc.close()
        return held, after

    assert run_threads(list(loopback(3)), call) == [(5, 3), (3, 3), (5, 3)]
    assert [driver.held for driver in drivers] == [{}] * 3


def test_another_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(cuda_segment, "machine_identity", lambda: f"machine {next(numbers)}")
    found = run_threads(list(loopback(2)), lambda comm: CudaIpc(comm, 5.0, limit=LIMIT, driver=StandIn()))
    for error in found:
        assert isinstance(error, ValueError)
        assert "rank 0: it is not on the host of rank 1 (or in another container); choose nccl" in str(error)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'cuda_ipc' works on cuda, not on device cpu; choose shm or gloo"):
        create("cuda_ipc", Rendezvous(), CPU)
    with pytest.raises(ValueError, match="serves the ranks of one host, and only 2 of 4 are on this one; choose nccl"):
        create("cuda_ipc", Rendezvous(size=4, local_size=2), torch.device("cuda", 0))
    monkeypatch.setattr(cuda_ipc, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'cuda_ipc': the package triton is not installed; pip install triton, or choose nccl"):
        create("cuda_ipc", Rendezvous(), torch.device("cuda", 0))


def test_ranks_that_share_a_card_talk_through_host_memory_and_others_by_nccl() -> None:
    """Which a torch without CUDA refuses."""
    for cards, kind in ((("a", "a"), Staged), (("a", "b"), ValueError)):
        listener = socket.create_server(("127.0.0.1", 0))
        port, descriptor = listener.getsockname()[1], listener.detach()

        def call(rank: int, port: int = port, descriptor: int = descriptor, cards: tuple[str, str] = cards) -> Communicator:
            first = descriptor if rank == 0 else None
            rendezvous = Rendezvous(rank=rank, size=2, local_rank=rank, local_size=2, port=port, listener=first, timeout=20.0)
            return torch_group.nccl_or_gloo(rendezvous, torch.device("cuda", 0), "cuda_ipc", cards[rank])

        found = run_threads([0, 1], call)
        assert [type(comm) for comm in found] == [kind] * 2, found
        for comm in found:
            assert "'nccl'" in str(comm) if isinstance(comm, ValueError) else comm.close() is None  # type: ignore[attr-defined]


def test_nccl_says_which_ranks_have_the_same_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """And takes those whose launcher shows each its own."""
    monkeypatch.setattr(torch_group, "NCCL", replace(torch_group.NCCL, group=Mock(side_effect=ValueError("made"))))
    for cards, words in ((("a", "b", "a"), "ranks 0 and 2 have the same one; start fewer"), (("a", "b", "c"), "made")):
        listener = socket.create_server(("127.0.0.1", 0))
        port, descriptor = listener.getsockname()[1], listener.detach()

        def call(rank: int, port: int = port, descriptor: int = descriptor, cards: Sequence[str] = cards) -> Communicator:
            first = descriptor if rank == 0 else None
            rendezvous = Rendezvous(rank=rank, size=3, local_rank=rank, local_size=3, port=port, listener=first, timeout=20.0)
            return torch_group.over_nccl(rendezvous, torch.device("cuda", 0), cards[rank])

        for error in run_threads([0, 1, 2], call):
            assert isinstance(error, ValueError)
            assert words in str(error)


class Library:
    """As the driver's, with one allocation at 0x7f0000400000."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            self.asked.append((name, [getattr(arg, "value", arg) for arg in args[1:]]))
            if name == "cuMemAlloc_v2":
                args[0]._obj.value = 0x7F0000400000
            elif name == "cuIpcGetMemHandle":
                args[0]._obj.data[:] = [0, 1, 0, 255, *range(60)]
            elif name == "cuIpcOpenMemHandle_v2":
                assert bytes(args[1].data) == bytes([0, 1, 0, 255, *range(60)])
                args[0]._obj.value = 0x7F1000000000
            elif name == "cuMemFree_v2":
                return 201
            elif name == "cuGetErrorString":
                args[1]._obj.value = b"invalid device context"
            return 0

        return call


def test_the_driver_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(query=lambda: True))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    library = Library()
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: library)
    driver = CudaDriver(torch.device("cuda", 0))
    address = driver.allocate(5)
    assert address == 0x7F0000400000
    assert library.asked == [("cuMemAlloc_v2", [2 << 20]), ("cuMemsetD8_v2", [0, 2 << 20]), ("cuCtxSynchronize", [])]
    handle = driver.handle(address)
    assert len(handle) == HANDLE_BYTES
    assert driver.open(handle) == 0x7F1000000000
    with pytest.raises(DriverError, match=r"cuMemFree_v2: invalid device context \(201\)"):
        driver.free(address)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", missing)
    found = run_threads(list(loopback(2)), lambda comm: CudaIpc(comm, 5.0))
    for error in found:
        assert isinstance(error, ValueError)
        assert str(error).startswith("communicator 'cuda_ipc': rank 0: libcuda.so.1: cannot open shared object file; choose nccl")

"""What `cuda_ipc` must do besides: cases that run where its ranks are, and what brings the suite's tensors to a card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from communicator_cases import Case, added, same, values
from torch import Tensor

from collectives.communicator import Communicator
from collectives.cuda_ipc import SUMMED, CudaIpc
from collectives.wrapped import Wrapped


class OnCard(Wrapped):
    """Carries tensors of the host, with all of the memory that they are views of, to the card of `inner`, and back."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.device = torch.device("cpu")

    def all_reduce(self, x: Tensor) -> Tensor:
        memory, there = self._there(x)
        assert self.inner.all_reduce(there) is there
        return self._back(x, memory)

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        return self.inner.all_gather(self._there(x)[1], dim, sizes).cpu()

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return self.inner.reduce_scatter(self._there(x)[1], dim).cpu()

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        memory, there = self._there(x)
        assert self.inner.broadcast(there, src) is there
        return self._back(x, memory)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part.cpu() for part in self.inner.all_to_all([self._there(part)[1] for part in parts])]

    def _there(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(self.inner.device)  # type: ignore[call-overload]
        return memory, memory.as_strided(x.shape, x.stride(), x.storage_offset())

    def _back(self, x: Tensor, memory: Tensor) -> Tensor:
        torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).copy_(memory)  # type: ignore[call-overload]
        return x

    def _before(self, op: str, tensors: Sequence[Tensor], choice: Any = None) -> None: ...

    def _around(self, child: Communicator) -> "OnCard":
        return OnCard(child)


def own(comm: Communicator) -> CudaIpc:
    found = comm.inner if isinstance(comm, OnCard) else comm
    assert isinstance(found, CudaIpc)
    return found


def sums_around_the_limit(comm: Communicator, shared: Path) -> None:
    """Of every length between programs, and what is a little too large for the kernel; the same bits on every rank."""
    ipc = own(comm)
    for dtype in SUMMED:
        program, most = 4096 // dtype.itemsize, ipc._limit // dtype.itemsize
        for n in (1, program - 1, program, program + 1, program + 16, most - 1, most, most + 1):
            expected = added([values(r, (n,), dtype, salt=n) for r in range(comm.size)])
            x = values(comm.rank, (n,), dtype, salt=n).to(ipc.device)
            assert ipc.all_reduce(x) is x
            same(x.cpu(), expected, dtype, n)


def many_sums_without_a_pause(comm: Communicator, shared: Path) -> None:
    """Nobody waits for a device between them, and some ranks come late: halves and flags must not mix turns. Lengths differ, so
    that programs have different turns."""
    ipc = own(comm)
    turns = 400 if ipc.device.type == "cuda" else 30
    lengths = [(1, 5000, 300, 8000, 2048)[t % 5] for t in range(turns)]
    inputs = [[values(r, (n,), torch.bfloat16, salt=t).to(ipc.device) for t, n in enumerate(lengths)] for r in range(comm.size)]
    mine = [x.clone() for x in inputs[comm.rank]]
    for t, x in enumerate(mine):
        if t % 7 == comm.rank and ipc.device.type == "cuda":
            torch.cuda._sleep(300_000)
        ipc.all_reduce(x)
    for t, x in enumerate(mine):
        same(x.cpu(), added([rows[t].cpu() for rows in inputs]), t, lengths[t])


def sums_in_a_graph(comm: Communicator, shared: Path) -> None:
    """Captured once, replayed with other numbers, between sums outside of the graph."""
    ipc = own(comm)
    lengths = (3584, 1, 8192, 3000)
    held = [torch.zeros(n, dtype=torch.bfloat16, device=ipc.device) for n in lengths]
    for x in held:
        ipc.all_reduce(x)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for x in held:
            ipc.all_reduce(x)
    for turn in range(20):
        for x in held:
            x.copy_(values(comm.rank, tuple(x.shape), torch.bfloat16, salt=turn))
        graph.replay()
        between = ipc.all_reduce(values(comm.rank, (5000,), torch.float32, salt=turn).to(ipc.device))
        same(between.cpu(), added([values(r, (5000,), torch.float32, salt=turn) for r in range(comm.size)]), turn)
        for x in held:
            same(x.cpu(), added([values(r, tuple(x.shape), torch.bfloat16, salt=turn) for r in range(comm.size)]), turn, x.shape)


IPC_CASES: dict[str, Case] = {case.__name__: case for case in (sums_around_the_limit, many_sums_without_a_pause)}
GRAPH_CASES: dict[str, Case] = {sums_in_a_graph.__name__: sums_in_a_graph}

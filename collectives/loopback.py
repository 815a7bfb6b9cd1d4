"""N ranks as threads of one process, for tests and small experiments.

The reduction order is fixed: rank 0 first, then 1, 2, ... in float32 for half precision. A rank that fails breaks the
barrier, so that the others raise CollectiveError instead of waiting.
"""

from collections.abc import Callable, Sequence
from threading import Barrier, BrokenBarrierError, Lock

import torch
from torch import Tensor

from collectives.communicator import (
    CollectiveError,
    Communicator,
    check_all_to_all,
    check_parts,
    check_ranks,
    check_sizes,
    check_src,
)


class _Meeting:
    """What the ranks of one loopback communicator share: a slot a rank and a barrier."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size = size
        self.timeout = timeout
        self.barrier = Barrier(size)
        self.slots: list[object] = [None] * size
        self.arrived = [0] * size
        self.lock = Lock()
        self.children: dict[tuple[int, tuple[int, ...]], _Meeting] = {}


class Loopback(Communicator):
    def __init__(self, meeting: _Meeting, rank: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, meeting.size, device
        self._meeting = meeting
        self._splits = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._exchange(x, _sum, into=x)

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        check_sizes(x, dim, sizes, self.rank, self.size)
        return self._exchange(x, lambda all_x: torch.cat(all_x, dim))

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        part = check_parts(x, dim, self.size)
        return self._exchange(x, lambda all_x: _sum([t.narrow(dim, self.rank * part, part) for t in all_x]))

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        check_src(src, self.size)
        return self._exchange(x, lambda all_x: all_x[src].clone(), into=x)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        check_all_to_all(parts, self.size)
        return list(self._exchange(torch.stack(list(parts)), lambda all_x: torch.stack([t[self.rank] for t in all_x])))

    def barrier(self) -> None:
        self._wait()

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        chosen = check_ranks(ranks, self.size)
        self._splits += 1
        key = (self._splits, tuple(chosen))
        with self._meeting.lock:
            child = self._meeting.children.setdefault(key, _Meeting(len(chosen), self._meeting.timeout))
        return Loopback(child, chosen.index(self.rank), self.device) if self.rank in chosen else None

    def abort(self) -> None:
        self._meeting.barrier.abort()

    def close(self) -> None:
        self._meeting.barrier.abort()

    def _exchange(self, x: Tensor, compute: Callable[[list[Tensor]], Tensor], into: Tensor | None = None) -> Tensor:
        self._meeting.slots[self.rank] = x
        self._wait()
        try:
            result = compute(self._meeting.slots)  # type: ignore[arg-type]
        except BaseException:
            self._meeting.barrier.abort()
            raise
        self._wait()
        return result if into is None else into.copy_(result)

    def _wait(self) -> None:
        arrived = self._meeting.arrived
        arrived[self.rank] += 1
        try:
            self._meeting.barrier.wait(self._meeting.timeout)
        except BrokenBarrierError:  # also when a rank that went on breaks it before this one woke up
            if min(arrived) < arrived[self.rank]:
                raise CollectiveError("a loopback rank left or failed during a collective") from None


def loopback(size: int, device: torch.device | None = None, timeout: float = 60.0) -> list[Loopback]:
    """The communicators of `size` threads, by rank."""
    meeting = _Meeting(size, timeout)
    return [Loopback(meeting, rank, device or torch.device("cpu")) for rank in range(size)]


def _sum(tensors: list[Tensor]) -> Tensor:
    half = tensors[0].dtype in (torch.bfloat16, torch.float16)
    total = tensors[0].to(torch.float32) if half else tensors[0].clone()
    for t in tensors[1:]:
        total = total + t
    return total.to(tensors[0].dtype)

"""A communicator that counts what goes through it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from collectives.communicator import Communicator


@dataclass(frozen=True, slots=True)
class Call:
    """One collective: its name and the bytes of this rank's input tensors."""

    op: str
    bytes: int


class Traced(Communicator):
    """Passes everything to `inner` and appends a `Call` to `calls`, in order. Communicators split off share the list."""

    def __init__(self, inner: Communicator, calls: list[Call] | None = None) -> None:
        self.rank, self.size, self.device = inner.rank, inner.size, inner.device
        self.inner = inner
        self.calls: list[Call] = [] if calls is None else calls

    def all_reduce(self, x: Tensor) -> Tensor:
        self._note("all_reduce", x)
        return self.inner.all_reduce(x)

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        self._note("all_gather", x)
        return self.inner.all_gather(x, dim, sizes)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        self._note("reduce_scatter", x)
        return self.inner.reduce_scatter(x, dim)

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        self._note("broadcast", x)
        return self.inner.broadcast(x, src)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        self._note("all_to_all", *parts)
        return self.inner.all_to_all(parts)

    def barrier(self) -> None:
        self._note("barrier")
        self.inner.barrier()

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        child = self.inner.split(ranks)
        return None if child is None else Traced(child, self.calls)

    def close(self) -> None:
        self.inner.close()

    def _note(self, op: str, *tensors: Tensor) -> None:
        self.calls.append(Call(op, sum(t.numel() * t.element_size() for t in tensors)))

"""What all communicators that wrap another one share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor

from collectives.communicator import Communicator, check_all_to_all, check_ranks


class Wrapped(Communicator):
    """Passes every operation on to `inner`, after telling `_before` of it."""

    def __init__(self, inner: Communicator) -> None:
        self.rank, self.size, self.device, self.abortable = inner.rank, inner.size, inner.device, inner.abortable
        self.inner = inner

    @abstractmethod
    def _before(self, op: str, tensors: Sequence[Tensor], choice: Any = None) -> None:
        """Called with the operation's name, this rank's inputs and what else all ranks must agree on."""

    @abstractmethod
    def _around(self, child: Communicator) -> Self:
        """A wrapper like this one around a communicator that was split off."""

    def all_reduce(self, x: Tensor) -> Tensor:
        self._before("all_reduce", [x])
        return self.inner.all_reduce(x)

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        self._before("all_gather", [x], (dim, None if sizes is None else list(sizes)))
        return self.inner.all_gather(x, dim, sizes)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        self._before("reduce_scatter", [x], dim)
        return self.inner.reduce_scatter(x, dim)

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        self._before("broadcast", [x], src)
        return self.inner.broadcast(x, src)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        check_all_to_all(parts, self.size)
        self._before("all_to_all", parts)
        return self.inner.all_to_all(parts)

    def check(self) -> None:
        self.inner.check()

    def barrier(self) -> None:
        self._before("barrier", [])
        self.inner.barrier()

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        chosen = check_ranks(ranks, self.size)
        self._before("split", [], chosen)
        child = self.inner.split(chosen)
        return None if child is None else self._around(child)

    def abort(self) -> None:
        self.inner.abort()

    def close(self) -> None:
        self.inner.close()

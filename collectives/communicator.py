"""The contract that every backend keeps."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from collectives.errors import CollectiveError

__all__ = ["CollectiveError", "Communicator", "check_all_to_all", "check_parts", "check_ranks", "check_sizes", "check_src"]


class Communicator(ABC):
    """`size` ranks that call the same operations in the same order with the same shapes and dtypes.

    Every operation blocks until its result can be used (on a stream device: by work queued after it on the same stream).
    A backend that cannot do something for a dtype or device raises ValueError on every rank before it sends anything; a
    peer that is gone, or a timeout, raises CollectiveError. Empty tensors are allowed everywhere.
    """

    rank: int
    size: int
    device: torch.device
    abortable: bool = True

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums `x` over all ranks, in place, and returns it. Half precision is summed in float32 and rounded once where the
        backend can. All ranks get the same bits."""

    def sum_at(self, dtype: torch.dtype) -> "tuple[Callable[[int, int, int], None], int] | None":
        """all_reduce for native code: f and c, f(address, count, c) being that of so many elements of `dtype` in this process's
        memory. None where there is no such thing, or something is to see each operation."""
        return None

    def captures(self, nbytes: int) -> bool:
        """Whether all_reduce, and all_gather without sizes of parts of whole 4 bytes, can be part of a CUDA graph where the
        result has up to `nbytes` bytes. The same on every rank."""
        return False

    def check(self) -> None:
        """Raises CollectiveError if one that was begun before, perhaps by a CUDA graph, is known to have failed."""
        return

    @abstractmethod
    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        """The tensors of all ranks joined along `dim`, in rank order. Shapes are equal, except that with `sizes` rank i's
        tensor has length sizes[i] along `dim`; every rank must pass the same sizes."""

    @abstractmethod
    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """The sum over all ranks, of which this rank gets the part number `rank` of `size` equal parts along `dim`.
        Raises ValueError if size does not divide x.shape[dim]."""

    @abstractmethod
    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        """Fills `x` with rank src's, in place, and returns it."""

    @abstractmethod
    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """parts[i] goes to rank i; entry i of the result came from rank i. All parts on all ranks have one shape and dtype."""

    @abstractmethod
    def barrier(self) -> None:
        """Returns once every rank has called it."""

    @abstractmethod
    def split(self, ranks: Sequence[int]) -> "Communicator | None":
        """A communicator among `ranks` of this one (ascending, the same list on every rank), or None where this rank is not
        among them. Every rank of this communicator must call it."""

    @abstractmethod
    def abort(self) -> None:
        """Called from another thread: a collective that this rank is in, or enters later, raises CollectiveError within a
        second instead of waiting for its peers. A backend that cannot do this (mpi) has `abortable` False. Harmless when
        repeated or closed."""

    @abstractmethod
    def close(self) -> None:
        """Releases sockets, threads and memory. Harmless when repeated."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_parts(x: Tensor, dim: int, size: int) -> int:
    """Length of one of `size` equal parts along `dim`; ValueError if it does not come out even."""
    if x.shape[dim] % size:
        raise ValueError(f"reduce_scatter: dimension {dim} of shape {tuple(x.shape)} is not a multiple of {size} ranks")
    return x.shape[dim] // size


def check_all_to_all(parts: Sequence[Tensor], size: int) -> None:
    if len(parts) != size or any(p.shape != parts[0].shape or p.dtype != parts[0].dtype for p in parts):
        raise ValueError(f"all_to_all: needs {size} tensors of one shape and dtype")


def check_src(src: int, size: int) -> None:
    if not 0 <= src < size:
        raise ValueError(f"broadcast: src {src} is not one of the {size} ranks")


def check_sizes(x: Tensor, dim: int, sizes: Sequence[int] | None, rank: int, size: int) -> None:
    if sizes is not None and (len(sizes) != size or x.shape[dim] != sizes[rank]):
        raise ValueError(
            f"all_gather: sizes {list(sizes)} do not describe shape {tuple(x.shape)} along {dim} on rank {rank} of {size}"
        )


def check_ranks(ranks: Sequence[int], size: int) -> list[int]:
    chosen = list(ranks)
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= size:
        raise ValueError(f"split: {chosen} must be ascending ranks below {size}")
    return chosen

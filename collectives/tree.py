"""Sums along one fixed binary tree: which bits come out depends on the summands and their order alone, not on the backend, the
length of the tensors, or how the summands are shared out over ranks.

The tree of n summands adds that of the first k to that of the rest, where k is the largest power of two below n:
((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)). So where 8 summands lie evenly on 1, 2, 4 or 8 ranks, `tree_sum` on each rank
and `TreeReduce` over the ranks give the bits that `tree_sum` of all 8 gives on one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from collectives.communicator import Communicator, check_parts
from collectives.wrapped import Wrapped

_SMALL = 256 * 1024  # bytes of a tensor, up to which every rank gets all ranks' and adds by itself; measured over shm at 4


def tree_sum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of floating-point tensors of one shape, as a new tensor: in float64 if they are of that dtype, else in float32.
    ValueError if there are none."""
    if not tensors:
        raise ValueError("tree_sum: needs at least one tensor")
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    if len(tensors) == 1:
        return tensors[0].to(wide, copy=True)
    return _added([x.to(wide) for x in tensors])


def _added(wide: Sequence[Tensor]) -> Tensor:
    if len(wide) == 1:
        return wide[0]
    first = 1 << (len(wide) - 1).bit_length() - 1
    left, right = _added(wide[:first]), _added(wide[first:])
    return left + right if first == 1 else left.add_(right)


class TreeReduce(Wrapped):
    """Passes everything to `inner`, except that all_reduce and reduce_scatter add floats along the tree of the ranks: halves in
    float32, rounded once at the end. Communicators split off do the same, along the tree of their own ranks.

    Two ranks leave float32 and float64 to `inner`, whose only addition is the tree. More send as much as a ring would
    (2 (n - 1) / n of the tensor a rank), in two collectives, or, up to 256 KiB, n - 1 times the tensor in one.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._adds_alike(x.dtype):
            return self.inner.all_reduce(x)
        if x.nbytes <= _SMALL:
            return x.copy_(tree_sum(self.inner.all_gather(x[None]).unbind()))
        flat = x.reshape(-1)
        part = -(-flat.numel() // self.size)
        parts = pad(flat, (0, part * self.size - flat.numel())).chunk(self.size)
        whole = self.inner.all_gather(self._own_sum(parts))
        return x.copy_(whole[: flat.numel()].view(x.shape))

    def sum_at(self, dtype: torch.dtype) -> tuple[Callable[[int, int, int], None], int] | None:
        return self.inner.sum_at(dtype) if self._adds_alike(dtype) else None

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        check_parts(x, dim, self.size)
        if self._adds_alike(x.dtype):
            return self.inner.reduce_scatter(x, dim)
        return self._own_sum(x.chunk(self.size, dim))

    def _adds_alike(self, dtype: torch.dtype) -> bool:
        """Whether `inner` adds along the tree, or in any order."""
        two = self.size == 2 and dtype in (torch.float32, torch.float64)
        return self.size == 1 or two or not dtype.is_floating_point

    def _own_sum(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of the part number `rank` of all ranks, in their dtype."""
        return tree_sum(self.inner.all_to_all(parts)).to(parts[0].dtype)

    def _before(self, op: str, tensors: Sequence[Tensor], choice: Any = None) -> None:
        pass

    def _around(self, child: Communicator) -> "TreeReduce":
        return TreeReduce(child)

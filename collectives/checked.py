"""A communicator that asserts that all ranks call the same operation on the same shape and dtype.

Costs one small all_gather more a call: for tests and for finding out why ranks hang.
"""

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

from collectives.communicator import CollectiveError, Communicator, check_all_to_all, check_ranks

_OPS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "barrier", "split")
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_MAX_DIMS = 6


class Checked(Communicator):
    """Raises CollectiveError on every rank, naming what each was about to do, when ranks disagree."""

    def __init__(self, inner: Communicator) -> None:
        self.rank, self.size, self.device = inner.rank, inner.size, inner.device
        self.inner = inner

    def all_reduce(self, x: Tensor) -> Tensor:
        self._agree("all_reduce", x)
        return self.inner.all_reduce(x)

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        same = x if sizes is None else x.narrow(dim, 0, 0)
        self._agree("all_gather", same, dim if sizes is None else crc32(repr((dim, list(sizes))).encode()))
        return self.inner.all_gather(x, dim, sizes)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        self._agree("reduce_scatter", x, dim)
        return self.inner.reduce_scatter(x, dim)

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        self._agree("broadcast", x, src)
        return self.inner.broadcast(x, src)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        check_all_to_all(parts, self.size)
        self._agree("all_to_all", parts[0])
        return self.inner.all_to_all(parts)

    def barrier(self) -> None:
        self._agree("barrier")
        self.inner.barrier()

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        chosen = check_ranks(ranks, self.size)
        self._agree("split", torch.empty(len(chosen)), sum(1 << r for r in chosen) % (2**61 - 1))
        child = self.inner.split(chosen)
        return None if child is None else Checked(child)

    def close(self) -> None:
        self.inner.close()

    def _agree(self, op: str, x: Tensor | None = None, extra: int = 0) -> None:
        shape = () if x is None else tuple(x.shape)
        dtype = -1 if x is None else _DTYPES.index(x.dtype)
        row = [_OPS.index(op), extra, dtype, len(shape), *shape, *[0] * (_MAX_DIMS - len(shape))]
        rows = self.inner.all_gather(torch.tensor([row], dtype=torch.int64, device=self.device)).tolist()
        if any(other != rows[0] for other in rows):
            told = "; ".join(f"rank {rank}: {_tell(other)}" for rank, other in enumerate(rows))
            raise CollectiveError(f"ranks disagree: {told}")


def _tell(row: list[int]) -> str:
    op, extra, dtype, dims = row[:4]
    shape = row[4 : 4 + dims]
    return f"{_OPS[op]}({'' if dtype < 0 else f'{shape} {_DTYPES[dtype]}'}, {extra})".replace("torch.", "")

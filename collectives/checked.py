"""A communicator that asserts that all ranks call the same operation on the same shape and dtype.

Costs one small all_gather more a call: for tests and for finding out why ranks hang.
"""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from collectives.communicator import CollectiveError, Communicator
from collectives.wrapped import Wrapped

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


class Checked(Wrapped):
    """Raises CollectiveError on every rank, naming what each was about to do, when ranks disagree."""

    def _before(self, op: str, tensors: Sequence[Tensor], choice: Any = None) -> None:
        x = tensors[0] if tensors else None
        shape = [] if x is None else list(x.shape)
        if op == "all_gather" and choice[1] is not None:
            shape[choice[0]] = 0  # the one length that may differ
        extra = choice if isinstance(choice, int) else 0 if choice is None else crc32(repr(choice).encode())
        dtype = -1 if x is None else _DTYPES.index(x.dtype)
        row = [_OPS.index(op), extra, dtype, len(shape), *shape, *[0] * (_MAX_DIMS - len(shape))]
        rows = self.inner.all_gather(torch.tensor([row], dtype=torch.int64, device=self.device)).tolist()
        if any(other != rows[0] for other in rows):
            told = "; ".join(f"rank {rank}: {_tell(other)}" for rank, other in enumerate(rows))
            raise CollectiveError(f"ranks disagree: {told}")

    def _around(self, child: Communicator) -> "Checked":
        return Checked(child)


def _tell(row: list[int]) -> str:
    op, extra, dtype, dims = row[:4]
    shape = row[4 : 4 + dims]
    return f"{_OPS[op]}({'' if dtype < 0 else f'{shape} {_DTYPES[dtype]}'}, {extra})".replace("torch.", "")

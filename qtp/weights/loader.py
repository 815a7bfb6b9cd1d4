"""Fills the tensors of one rank from a Store: each byte is read once, straight to where it stays."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtp.layout.spec import Part, Spec
from qtp.layout.split import Grid
from qtp.weights.store import Store

Shard = dict[str, Tensor]

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(
    store: Store,
    specs: Sequence[Spec],
    rank: int,
    grid: Grid,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int], None] = lambda count: None,
) -> Shard:
    """The tensors of `rank` by `Spec.name`; empty where it holds nothing. `progress` is told the number of
    checkpoint bytes after each tensor. Memory beyond the result: one tensor, if dtype or device differ from the file's."""
    return {spec.name: _tensor(store, spec, rank, grid, dtype, progress).to(device) for spec in specs}


def _tensor(store: Store, spec: Spec, rank: int, grid: Grid, dtype: torch.dtype, progress: Callable[[int], None]) -> Tensor:
    out = torch.empty(spec.shape(rank, grid), dtype=dtype)
    row = 0
    for part in spec.parts:
        rows = len(part.split.box(part.shape, rank, grid)[0])
        _fill(store, part, rank, grid, out[row : row + rows], progress)
        row += rows
    return out


def _fill(store: Store, part: Part, rank: int, grid: Grid, into: Tensor, progress: Callable[[int], None]) -> None:
    stored = FLOAT_DTYPES[store.entries[part.name].dtype]
    target = into if stored == into.dtype else torch.empty_like(into, dtype=stored)
    raw = target.view(-1).view(torch.uint8).numpy()
    store.read_into(part.name, part.split.box(part.shape, rank, grid), raw.data)
    if target is not into:
        into.copy_(target)
    progress(raw.nbytes)

"""Tensors as bytes, and the float tensors of a checkpoint."""

import torch
from torch import Tensor

from qtp.weights.dtypes import TORCH_DTYPES
from qtp.weights.store import FLOATS, Store


def read(store: Store, name: str, rows: range | None = None) -> Tensor:
    """A float tensor, or these rows of it, in float32."""
    entry = store.entries[name]
    box = tuple(range(n) for n in entry.shape)
    if rows is not None:
        box = (rows, *box[1:])
    if entry.dtype not in FLOATS:
        raise ValueError(f"{entry.file}: tensor {name} is of type {entry.dtype}, not of floats; give a float checkpoint")
    dtype = TORCH_DTYPES[entry.dtype]
    shape = tuple(len(r) for r in box)
    out = torch.empty(shape, dtype=dtype)
    store.read_into(name, box, as_bytes(out))
    return out.float()


def as_bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(x.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

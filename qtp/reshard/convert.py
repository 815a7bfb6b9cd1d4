"""Floats of one dtype as another, rounded to nearest; what is finite stays finite or is refused."""

import torch

from qtp.weights.dtypes import TORCH_DTYPES


def convert(data: memoryview, stored: str, wanted: str) -> memoryview:
    """`data` in dtype `wanted`. Raises ValueError if a number is beyond its range."""
    x = torch.frombuffer(data, dtype=TORCH_DTYPES[stored])
    y = x.to(TORCH_DTYPES[wanted])
    if (y.isinf() & ~x.isinf()).any():
        raise ValueError(
            f"some weights are beyond the range of {TORCH_DTYPES[wanted]}, the largest {x.abs().max()}; choose another --dtype"
        )
    return memoryview(y.view(torch.uint8).numpy().data)

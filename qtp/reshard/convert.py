"""Floats of one dtype as another, rounded to nearest; what is finite stays finite or is refused."""

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def convert(data: memoryview, stored: str, wanted: str) -> memoryview:
    """`data` in dtype `wanted`. Raises ValueError if a number is beyond its range."""
    x = torch.frombuffer(data, dtype=DTYPES[stored])
    y = x.to(DTYPES[wanted])
    if (y.isinf() & ~x.isinf()).any():
        raise ValueError(
            f"some weights are beyond the range of {DTYPES[wanted]}, the largest {x.abs().max()}; choose another --dtype"
        )
    return memoryview(y.view(torch.uint8).numpy().data)

"""Random weights in place of a checkpoint's, made on the device: what a run of a shape costs, without its files."""

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

from qtp.layout.spec import COMPRESSED, FLOAT8, FLOAT32, INT8, INT32, SCALE_BITS, Spec
from qtp.layout.split import Grid

_SPREAD = 0.02


def dummy(specs: Sequence[Spec], rank: int, grid: Grid, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The tensors of `rank` by `Spec.name`, as `load` gives them, of numbers that keep activations within bounds: norms about 1,
    all else small and none of it zero but the offsets of weights, which are symmetric unless one asks for more. Raises ValueError
    for a compressed weight, whose streams are not made of chance."""
    tensors = {}
    for spec in specs:
        boxes = [part.split.box(part.shape, rank, grid) for part in spec.parts]  # ranks with the same one have the same numbers
        generator = torch.Generator(device).manual_seed(crc32(f"{spec.name} {boxes}".encode()))
        tensors[spec.name] = _random(spec, spec.shape(rank, grid), dtype, generator)
    return tensors


def _random(spec: Spec, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    device = generator.device
    if spec.dtype == COMPRESSED:
        raise ValueError(f"load_format 'dummy' makes no compressed weights ({spec.name}); use auto")
    if spec.dtype in (INT8, INT32):
        most, held = (128, torch.int8) if spec.dtype == INT8 else (1000, torch.int32)
        return torch.randint(-most, most, shape, dtype=held, device=device, generator=generator)
    if spec.dtype in (FLOAT32, SCALE_BITS):
        if spec.name.endswith("weight_offset"):
            return torch.zeros(shape, device=device)
        if "offset" in spec.name:
            return torch.randint(-64, 64, shape, device=device, generator=generator).float()
        return torch.rand(shape, device=device, generator=generator) * 1e-3 + 1e-4
    values = torch.empty(shape, dtype=torch.float32 if spec.dtype == FLOAT8 else dtype, device=device)
    values.normal_(1.0 if len(shape) == 1 and "norm" in spec.name else 0.0, _SPREAD, generator=generator)
    return (values * 400).clamp_(-448, 448).to(torch.float8_e4m3fn) if spec.dtype == FLOAT8 else values

"""Quantized weights of linear layers, as a rank holds them. Data alone; `torch_quantized` has the arithmetic. Imports no torch.

N outputs, D this rank's input columns, G groups of input columns. int8 is -128 ... 127. Every tensor is contiguous, except that
the rows of `weight` may lie apart. The formulas are those of msModelSlim, in whose formats the checkpoints come.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor, dtype


@dataclass(frozen=True, slots=True, eq=False)
class _Matrix:
    weight: "Tensor"

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class W8A8(_Matrix):
    """y = (x_q W^T + quant_bias) * deq_scale, where x_q = clamp(round(x / input_scale + input_offset)), rounded half to even.

    weight int8 [N, D]; deq_scale float32 [N]; quant_bias int32 [N], which holds bias / deq_scale - input_offset * (the sum of
    a whole row of W): where columns are cut, it is that on the rank of the first column and zeros elsewhere."""

    input_scale: float
    input_offset: float
    quant_bias: "Tensor"
    deq_scale: "Tensor"


@dataclass(frozen=True, slots=True, eq=False)
class W8A8SC:
    """As W8A8, its weight compressed by `qtp.weights.codec` (docs/w8a8sc.md), which says whether a stream is whole.

    data int8 [bytes]; index int8 [8 (blocks of 16 rows + 1)]; info int64 [5]."""

    data: "Tensor"
    index: "Tensor"
    info: "Tensor"
    input_scale: float
    input_offset: float
    quant_bias: "Tensor"
    deq_scale: "Tensor"

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.info[1]), int(self.info[2])


@dataclass(frozen=True, slots=True, eq=False)
class W8A8Dynamic(_Matrix):
    """y = (x_q W^T) * s_x * weight_scale + bias, where s_x = max |x| / 127 of each token over ALL input columns (1 where x is 0),
    and x_q = round(x / s_x), half to even. weight int8 [N, D]; weight_scale float32 [N]; bias [N] in the run's dtype, or None."""

    weight_scale: "Tensor"
    bias: "Tensor | None"


@dataclass(frozen=True, slots=True, eq=False)
class W8A8FP8(_Matrix):
    """y = (x_q W^T) * s_x * weight_scale + bias, where s_x = max |x| / 448 of each token over ALL input columns (1 where x is 0),
    and x_q = x / s_x, held within -448 ... 448 and rounded to float8_e4m3fn, half to even. weight float8_e4m3fn [N, D];
    weight_scale float32 [N]; bias [N] in the run's dtype, or None. The sums are of floats: there is no `Unscaled` of it."""

    weight_scale: "Tensor"
    bias: "Tensor | None"


@dataclass(frozen=True, slots=True, eq=False)
class W8A16(_Matrix):
    """y = x w^T + bias, where w[n, d] = (weight[n, d] - offset[n, g]) * scale[n, g]. weight int8 [N, D]; scale, offset float32
    [N, G]; bias [N] in the run's dtype, or None.

    Column d is of group g = (phase + d) // group: phase is how many columns of the first group other ranks hold. group 0: all
    columns are one group."""

    scale: "Tensor"
    offset: "Tensor"
    bias: "Tensor | None"
    group: int
    phase: int


@dataclass(frozen=True, slots=True, eq=False)
class Float(_Matrix):
    """A part of a packed weight that was left in float: weight [N, D], bias [N] or None."""

    bias: "Tensor | None"


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Weights over the same input, whose outputs follow each other: what cannot be one, since formats or input scales differ."""

    parts: "tuple[Quantized | Float, ...]"

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]


Quantized = W8A8 | W8A8SC | W8A8Dynamic | W8A8FP8 | W8A16
Weight: TypeAlias = "Tensor | Quantized | Packed"


@dataclass(frozen=True, slots=True, eq=False)
class Unscaled:
    """A partial sum in integers, which are exact: to be added over the ranks first and scaled then, for the same bits at every
    world size. total int32 [T, N]; y = total * scale, with scale float32 [N] or [T, N], in dtype."""

    total: "Tensor"
    scale: "Tensor"
    dtype: "dtype"

    def scaled(self, total: "Tensor") -> "Tensor":
        """y [T, N] of `total`, the sum of all ranks' totals."""
        return (total.float() * self.scale).to(self.dtype)


def row_part(weight: Quantized | Float) -> Weight:
    """A weight, or a part of one, as a row linear takes it: without a float bias, which at every world size would be rounded in
    other places."""
    assert isinstance(weight, W8A8 | W8A8SC) or weight.bias is None, "a row linear with a float bias"
    return weight.weight if isinstance(weight, Float) else weight

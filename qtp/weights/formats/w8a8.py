"""W8A8, static, and W8A8S, which differs in its values alone: int8 weights, activations by one scale and offset a layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qtp.layout.spec import FLOAT32, INT8, INT32, SCALE_BITS, Part, Spec
from qtp.layout.split import Grid, With
from qtp.weights.formats.format import Format, Linear, Tensors, check_offsets, check_scales, matrix

if TYPE_CHECKING:
    from torch import Tensor
from qtp.weights.quantized import W8A8


class W8A8Format(Format):
    """A newer writer's weight_scale, weight_offset and float bias are redundant, and not read: deq_scale and quant_bias hold
    them."""

    def specs(self, linear: Linear) -> Sequence[Spec]:
        return linear.weight(INT8), *static_specs(linear)

    def assemble(self, linear: Linear, tensors: Tensors, rank: int, grid: Grid) -> Sequence[W8A8]:
        weight, deq_scale = (tensors[f"{linear.own}.{name}"] for name in ("weight", "deq_scale"))
        quant_bias = whole_quant_bias(linear, tensors)
        return [
            W8A8(weight[r], scale, offset, quant_bias[r], deq_scale[r])
            for r, scale, offset in activations(linear, tensors, rank, grid)
        ]


def static_specs(linear: Linear) -> Sequence[Spec]:
    """What goes with an int8 weight whose activations are quantized by one scale and offset."""

    def whole(part: Part) -> With:
        return With(part.split, matrix(part))

    return (
        linear.spec("input_scale", FLOAT32, lambda part: (1,), whole),
        linear.spec("input_offset", FLOAT32, lambda part: (1,), whole),
        linear.outputs("quant_bias", INT32, once=True),
        linear.outputs("deq_scale", SCALE_BITS),
    )


def whole_quant_bias(linear: Linear, tensors: Tensors) -> "Tensor":
    """Zeros where columns are cut and another rank adds it."""
    quant_bias, outputs = tensors[f"{linear.own}.quant_bias"], len(tensors[f"{linear.own}.deq_scale"])
    return quant_bias if len(quant_bias) else quant_bias.new_zeros(outputs)


def activations(linear: Linear, tensors: Tensors, rank: int, grid: Grid) -> list[tuple[slice, float, float]]:
    """(outputs, input_scale, input_offset), the same for as many parts as have the same two. Raises ValueError for scales that
    cannot be."""
    scales, offsets = tensors[f"{linear.own}.input_scale"], tensors[f"{linear.own}.input_offset"]
    check_scales(linear, "input_scale", scales)
    check_offsets(linear, "input_offset", offsets)
    check_scales(linear, "deq_scale", tensors[f"{linear.own}.deq_scale"])
    found: list[tuple[slice, float, float]] = []
    for rows, scale, offset in zip(linear.rows(rank, grid), scales.tolist(), offsets.tolist(), strict=True):
        if found and found[-1][1:] == (scale, offset):
            found[-1] = (slice(found[-1][0].start, rows.stop), scale, offset)
        else:
            found.append((slice(rows.start, rows.stop), scale, offset))
    return found

"""W8A8_FP8: float8 e4m3 weights with a scale for each output; activations are rounded to float8 by token as they come."""

from collections.abc import Sequence

from qtp.layout.spec import FLOAT8, FLOAT32, Spec
from qtp.layout.split import Grid
from qtp.weights.formats.format import Format, Linear, Tensors, check_scales
from qtp.weights.quantized import W8A8FP8


class W8A8FP8Format(Format):
    def specs(self, linear: Linear) -> Sequence[Spec]:
        return linear.weight(FLOAT8), linear.outputs("weight_scale", FLOAT32, 1), *linear.bias()

    def assemble(self, linear: Linear, tensors: Tensors, rank: int, grid: Grid) -> Sequence[W8A8FP8]:
        scale = tensors[f"{linear.own}.weight_scale"]
        check_scales(linear, "weight_scale", scale)
        return (W8A8FP8(tensors[f"{linear.own}.weight"], scale.flatten(), tensors.get(f"{linear.own}.bias")),)

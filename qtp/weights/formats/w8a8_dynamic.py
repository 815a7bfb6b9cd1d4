"""W8A8_DYNAMIC: int8 weights with a scale for each output; activations are quantized by token as they come."""

from collections.abc import Sequence

from qtp.layout.spec import FLOAT32, INT8, Spec
from qtp.layout.split import Grid
from qtp.weights.formats.format import Format, Linear, Tensors, check_scales, sibling
from qtp.weights.quantized import W8A8Dynamic


class W8A8DynamicFormat(Format):
    def specs(self, linear: Linear) -> Sequence[Spec]:
        scales = (linear.outputs(name, FLOAT32, 1) for name in ("weight_scale", "weight_offset"))
        return linear.weight(INT8), *scales, *linear.bias()

    def assemble(self, linear: Linear, tensors: Tensors, rank: int, grid: Grid) -> Sequence[W8A8Dynamic]:
        weight, scale = tensors[f"{linear.own}.weight"], tensors[f"{linear.own}.weight_scale"]
        check_scales(linear, "weight_scale", scale)
        if bool(tensors[f"{linear.own}.weight_offset"].any()):
            name = sibling(linear.parts[0], "weight_offset")
            raise ValueError(f"{name}: is not zero; W8A8_DYNAMIC weights are symmetric, quantize the checkpoint again with w_sym")
        return (W8A8Dynamic(weight, scale.flatten(), tensors.get(f"{linear.own}.bias")),)

"""W8A16: int8 weights with a scale and an offset for each output, or for each group of its input columns; float activations."""

from collections.abc import Sequence

from qtp.layout.spec import FLOAT32, INT8, Part, Spec
from qtp.layout.split import Grid, OfGroups
from qtp.weights.formats.format import Format, Linear, Tensors, check_offsets, check_scales, matrix
from qtp.weights.quantized import W8A16


class W8A16Format(Format):
    def granularity(self, group_size: int) -> int:
        return group_size or 1

    def specs(self, linear: Linear) -> Sequence[Spec]:
        size = linear.group_size or max(part.shape[1] for part in linear.parts)

        def shape(part: Part) -> tuple[int, int]:
            return part.shape[0], -(-part.shape[1] // size)

        scales = (
            linear.spec(name, FLOAT32, shape, lambda part: OfGroups(part.split, matrix(part), size))
            for name in ("weight_scale", "weight_offset")
        )
        return linear.weight(INT8), *scales, *linear.bias()

    def assemble(self, linear: Linear, tensors: Tensors, rank: int, grid: Grid) -> Sequence[W8A16]:
        weight, scale, offset = (tensors[f"{linear.own}.{name}"] for name in ("weight", "weight_scale", "weight_offset"))
        check_scales(linear, "weight_scale", scale)
        check_offsets(linear, "weight_offset", offset)
        first = linear.parts[0].split.box(linear.parts[0].shape, rank, grid)[1].start
        phase = first % linear.group_size if linear.group_size else 0
        return (W8A16(weight, scale, offset, tensors.get(f"{linear.own}.bias"), linear.group_size, phase),)

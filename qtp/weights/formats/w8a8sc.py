"""W8A8SC: W8A8S whose weights each rank compressed after they were cut (docs/w8a8sc.md)."""

from collections.abc import Sequence

from qtp.layout.spec import COMPRESSED, Spec
from qtp.layout.split import Grid
from qtp.weights.formats.format import Linear, Tensors
from qtp.weights.formats.w8a8 import activations, static_specs, whole_quant_bias
from qtp.weights.quantized import W8A8SC


class W8A8SCFormat:
    def specs(self, linear: Linear) -> Sequence[Spec]:
        return linear.weight(COMPRESSED), *static_specs(linear)

    def assemble(self, linear: Linear, tensors: Tensors, rank: int, grid: Grid) -> Sequence[W8A8SC]:
        """One weight for each part, since each is a stream of its own."""
        quant_bias, deq_scale = whole_quant_bias(linear, tensors), tensors[f"{linear.own}.deq_scale"]
        activations(linear, tensors, rank, grid)
        scales, offsets = (tensors[f"{linear.own}.{name}"].tolist() for name in ("input_scale", "input_offset"))
        weights = []
        for i, rows in enumerate(linear.rows(rank, grid)):
            data, index, info = (tensors[f"{linear.own}.weight.{i}.{name}"] for name in ("data", "index", "info"))
            some = slice(rows.start, rows.stop)
            weights.append(W8A8SC(data, index, info, scales[i], offsets[i], quant_bias[some], deq_scale[some]))
        return weights

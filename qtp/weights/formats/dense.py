"""FLOAT: a layer that fell back to float beside quantized ones of the same input."""

from collections.abc import Sequence

from qtp.layout.spec import RUN, Spec
from qtp.layout.split import Grid
from qtp.weights.formats.format import Format, Linear, Tensors
from qtp.weights.quantized import Float


class DenseFormat(Format):
    def specs(self, linear: Linear) -> Sequence[Spec]:
        return linear.weight(RUN), *linear.bias()

    def assemble(self, linear: Linear, tensors: Tensors, rank: int, grid: Grid) -> Sequence[Float]:
        return (Float(tensors[f"{linear.own}.weight"], tensors.get(f"{linear.own}.bias")),)

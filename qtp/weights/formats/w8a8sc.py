"""W8A8SC: W8A8S whose weights each rank compressed after they were cut (docs/w8a8sc.md)."""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qtp.layout.spec import COMPRESSED, Spec
from qtp.layout.split import Grid
from qtp.weights.formats.format import Format, Linear, Tensors
from qtp.weights.formats.w8a8 import activations, static_specs, whole_quant_bias
from qtp.weights.quantized import W8A8SC

if TYPE_CHECKING:
    from torch import Tensor


class W8A8SCFormat(Format):
    def specs(self, linear: Linear) -> Sequence[Spec]:
        return linear.weight(COMPRESSED), *static_specs(linear)

    def assemble(self, linear: Linear, tensors: Tensors, rank: int, grid: Grid) -> Sequence[W8A8SC]:
        """One weight for each stream and for each scale of activations in it."""
        quant_bias, deq_scale = whole_quant_bias(linear, tensors), tensors[f"{linear.own}.deq_scale"]
        scales = activations(linear, tensors, rank, grid)
        weights: list[W8A8SC] = []
        first, i = 0, 0
        while f"{linear.own}.weight.{i}.info" in tensors:
            data, index, info = (tensors[f"{linear.own}.weight.{i}.{name}"] for name in ("data", "index", "info"))
            end = first + int(info[1])
            for rows, scale, offset in scales:
                some = slice(max(first, rows.start), min(end, rows.stop))
                if some.start < some.stop or not len(deq_scale):
                    part = _rows((data, index, info), some.start - first, some.stop - first)
                    weights.append(W8A8SC(*part, scale, offset, quant_bias[some], deq_scale[some]))
            first, i = end, i + 1
        return weights


def _rows(stream: "tuple[Tensor, Tensor, Tensor]", start: int, stop: int) -> "tuple[Tensor, Tensor, Tensor]":
    """Parts with other scales begin where streams were joined, at a multiple of 16."""
    if (start, stop) == (0, int(stream[2][1])):
        return stream
    on_host = [tensor.cpu() for tensor in stream]
    data, index, info = importlib.import_module("qtp.weights.codec").cut(*on_host, start, stop)  # it needs torch
    device = stream[0].device
    return data.to(device), index.to(device), info.to(device)

"""Exact products with compressed weights: x_q W^T in int32, to be scaled by who calls. T tokens, D input columns, N outputs."""

import torch
from torch import Tensor

from qtp.kernels.extension import native, why_not
from qtp.kernels.interface import Op
from qtp.weights.codec import decompress
from qtp.weights.quantized import W8A8SC


def torch_products(weight: W8A8SC) -> Op:
    """From x_q int8 [T, D] to x_q W^T int32 [T, N], on any device; what `native_products` is tested against.

    float64 holds every sum: D * 2^14 is below 2^53."""
    whole = decompress(weight.data.cpu(), weight.index.cpu(), weight.info.cpu()).to(weight.data.device)
    return lambda x: (x.double() @ whole.double().T).to(torch.int64).to(torch.int32)


def native_products(weight: W8A8SC) -> Op:
    """As torch_products, computed from the compressed form. The rows of x may lie apart. Raises ValueError for a stream whose
    lengths or columns would lead out of it; `codec.check` says more."""
    return SparseLinear(weight)


class SparseLinear:
    """What `native_products` returns. Holds its weight."""

    __slots__ = ("_outputs", "_run", "_weight")

    def __init__(self, weight: W8A8SC) -> None:
        data, index = weight.data, weight.index
        assert why_not() is None, why_not()
        assert data.is_contiguous(), "a stream is contiguous"
        assert index.is_contiguous(), "a stream is contiguous"
        self._weight, self._outputs = weight, weight.shape[0]
        place = (data.data_ptr(), data.numel(), index.data_ptr(), index.numel())
        self._run = native.SparseLinear(*weight.shape, *place).run

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.int8, x.dtype
        assert x.shape[1:] == self._weight.shape[1:], (x.shape, self._weight.shape)
        assert x.stride(1) == 1 or min(x.shape) < 2, "x is row-major"
        out = torch.empty(x.shape[0], self._outputs, dtype=torch.int32)
        self._run(x.data_ptr(), x.shape[0], x.stride(0), out.data_ptr(), self._outputs)
        return out

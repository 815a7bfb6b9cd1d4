"""Native kernels of quantized weights; they give what `torch_quantized` gives, sums of integers bit for bit.

int8 weights are read where they lie, compressed ones too. W8A16 adds up in float32 in an order that depends on the weight alone.
For W8A8FP8 there is no native code but the product of bfloat16, to which it is widened at each call (`_FP8`).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.tree import tree_sum
from qtp.kernels.extension import native
from qtp.kernels.interface import Cuts, Expert, Experts, Kernels, Norm, Op
from qtp.kernels.torch_kernels import grouped, top
from qtp.kernels.torch_quantized import Product, expanded, leaves, leaves_of, side_by_side, token_maxima, token_scales, wide
from qtp.weights.quantized import W8A8, W8A8FP8, W8A8SC, W8A16, Float, Packed, Quantized, Unscaled, W8A8Dynamic, Weight, row_part

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_RUN_DTYPE, _FLOAT, _INTEGER, _GATED = range(4)  # what comes out of a handle; gated: silu(gate) * up
_TILE = 512  # tokens; what is larger comes as fresh memory from the system each time
_WIDENED = 1 << 20  # elements of a weight in float8 that are brought to bfloat16 at a time


def linear(
    kernels: Kernels,
    weight: Quantized | Float | Packed,
    *,
    norm: Norm | None = None,
    cuts: Cuts | None = None,
    across: Communicator | None = None,
) -> Callable[[Tensor], Any]:
    """`Kernels.linear`, of `kernels` for the float parts."""
    if isinstance(weight, Packed):
        return side_by_side([linear(kernels, part, norm=norm, cuts=cuts) for part in weight.parts])
    if isinstance(weight, Float):
        return kernels.linear(weight.weight, weight.bias, norm=norm, cuts=cuts)
    if across is not None and not isinstance(weight, W8A8FP8 | W8A16):
        return _Across(weight, norm, across)
    if cuts is None:
        return _FP8(kernels, weight, norm, across) if isinstance(weight, W8A8FP8) else _Linear(weight, norm)
    assert norm is None, "a row linear with a norm"
    parts = linear_leaves(kernels, weight, cuts, across)
    return lambda x: tree_sum(parts(x).unbind())


def linear_leaves(kernels: Kernels, weight: Quantized | Packed, cuts: Cuts, across: Communicator | None = None) -> Op:
    if isinstance(weight, Packed):
        ops = [kernels.linear_leaves(row_part(part), cuts, across) for part in weight.parts]
        return lambda x: torch.cat([op(x) for op in ops], dim=2)
    row_part(weight)
    whole = expanded(weight)
    if isinstance(whole, W8A8FP8):
        product = _fp8_product(kernels)
        return lambda x: leaves(whole, x, cuts, across, product)
    handles = [Handle(leaf) for leaf in leaves_of(whole, cuts)]
    outputs = weight.shape[0]

    def run(x: Tensor) -> Tensor:
        maxima = token_maxima(x, across) if isinstance(weight, W8A8Dynamic) else None
        out = torch.empty(len(handles), x.shape[0], outputs, dtype=torch.float32)
        for handle, leaf, (a, b) in zip(handles, out, pairwise(cuts), strict=True):
            handle.run(x[:, a:b], leaf, _FLOAT, maxima)
        return out

    return run


def gated(kernels: Kernels, weight: Quantized | Packed, *, norm: Norm | None = None) -> Op:
    if not isinstance(weight, Packed | W8A8FP8):
        return _Linear(weight, norm, _GATED)
    both, width = linear(kernels, weight, norm=norm), weight.shape[0] // 2

    def run(x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], width, dtype=x.dtype)
        for some, into in zip(x.split(_TILE), out.split(_TILE), strict=True):
            gate_up = both(some)
            native.silu_and_mul(DTYPES[x.dtype], gate_up.data_ptr(), len(some), width, into.data_ptr())
        return out

    return run


class QuantizedHead:
    def __init__(self, kernels: Kernels, weight: Quantized | Packed) -> None:
        self.logits = _wide(kernels, weight)

    def best(self, x: Tensor, count: int, allowed: int) -> tuple[Tensor, Tensor]:
        return top(self.logits(x)[:, :allowed], count)


def experts(kernels: Kernels, experts: Mapping[int, Expert], leaves: Sequence[range] | None = None) -> Experts:
    """`Kernels.experts`, expert after expert; each token's experts are added up in float32 and rounded once."""
    add = grouped({i: (kernels.gated(e.gate_up), _wide(kernels, e.down)) for i, e in experts.items()}, leaves)
    if leaves is not None:
        return add
    return lambda x, weights, chosen, partial: partial.add_(add(x, weights, chosen, torch.zeros(partial.shape)))


def _wide(kernels: Kernels, weight: "Weight | Float") -> Op:
    """As `linear`, to float32."""
    if isinstance(weight, Packed):
        return side_by_side([_wide(kernels, part) for part in weight.parts])
    if isinstance(weight, Float) and weight.bias is not None:
        product, bias = _wide(kernels, weight.weight), weight.bias.float()
        return lambda x: product(x).add_(bias)
    if isinstance(weight, Float):
        return _wide(kernels, weight.weight)
    if isinstance(weight, Tensor):
        return kernels.linear(weight, cuts=(0, weight.shape[1]))
    if isinstance(weight, W8A8FP8):
        return _FP8(kernels, weight, dtype=torch.float32)
    return _Linear(weight, form=_FLOAT)


class _Linear:
    __slots__ = ("_dtype", "_form", "_handle", "_outputs", "_run")

    def __init__(self, weight: Quantized, norm: Norm | None = None, form: int = _RUN_DTYPE) -> None:
        self._handle, self._form = Handle(weight, norm), form
        self._run = self._handle.native
        self._outputs = weight.shape[0] // (2 if form == _GATED else 1)
        self._dtype = torch.float32 if form == _FLOAT else None

    def __call__(self, x: Tensor) -> Tensor:
        tokens, outputs, dtype = x.shape[0], self._outputs, x.dtype
        out = torch.empty(tokens, outputs, dtype=self._dtype or dtype)
        self._run(DTYPES[dtype], x.data_ptr(), tokens, x.stride(0), 0, out.data_ptr(), outputs, self._form)
        return out


class _FP8:
    """A W8A8FP8 by `torch_quantized`, its product by the native one. dtype: of y, if it is not that of x."""

    __slots__ = ("_across", "_dtype", "_norm", "_product", "_weight")

    def __init__(
        self,
        kernels: Kernels,
        weight: W8A8FP8,
        norm: Norm | None = None,
        across: Communicator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._weight, self._across, self._dtype, self._product = weight, across, dtype, _fp8_product(kernels)
        self._norm = norm if norm is None or norm.anti is None else norm.anti

    def __call__(self, x: Tensor) -> Tensor:
        before = x if self._norm is None else normed(x.contiguous(), self._norm)
        return wide(self._weight, before, self._across, self._product).to(self._dtype or x.dtype)


def _fp8_product(kernels: Kernels) -> Product:
    """In bfloat16, which has every value of float8 e4m3."""

    def run(x_TD: Tensor, w_ND: Tensor) -> Tensor:
        x, columns = x_TD.to(torch.bfloat16), w_ND.shape[1]
        pieces = (w.to(torch.bfloat16) for w in w_ND.split(max(1, _WIDENED // max(1, columns))))
        return torch.cat([kernels.linear(w, cuts=(0, columns))(x) for w in pieces], dim=1)

    return run


class _Across:
    """A row linear in integers."""

    __slots__ = ("_across", "_handle", "_outputs", "_weight")

    def __init__(self, weight: W8A8 | W8A8SC | W8A8Dynamic, norm: Norm | None, across: Communicator) -> None:
        row_part(weight)
        assert norm is None, "a row linear with a norm"
        self._weight, self._across, self._handle = weight, across, Handle(weight)
        self._outputs = weight.shape[0]

    def __call__(self, x: Tensor) -> Unscaled:
        weight, maxima = self._weight, None
        if isinstance(weight, W8A8Dynamic):
            maxima = token_maxima(x, self._across)
            scale = token_scales(maxima)[:, None] * weight.weight_scale
        else:
            scale = weight.deq_scale
        total = torch.empty(x.shape[0], self._outputs, dtype=torch.int32)
        self._handle.run(x, total, _INTEGER, maxima)
        return _Unscaled(total, scale, x.dtype)


class _Unscaled(Unscaled):
    __slots__ = ()

    def scaled(self, total: Tensor) -> Tensor:
        scale, (tokens, outputs) = self.scale, total.shape
        out = torch.empty(tokens, outputs, dtype=self.dtype)
        apart = outputs if scale.dim() == 2 else 0
        native.scale_sums(DTYPES[self.dtype], total.data_ptr(), tokens, outputs, scale.data_ptr(), apart, out.data_ptr())
        return out


class Handle:
    """A weight in the words of the extension module, with what keeps its memory alive. Raises ValueError for a compressed one
    whose lengths or columns would lead out of it; `codec.check` says more."""

    __slots__ = ("_columns", "_held", "native")

    def __init__(self, weight: Quantized, norm: Norm | None = None) -> None:
        rows, columns = weight.shape
        if isinstance(weight, W8A8SC):
            assert weight.data.is_contiguous(), "a stream is contiguous"
            assert weight.index.is_contiguous(), "a stream is contiguous"
            place = (weight.data.data_ptr(), weight.data.numel(), weight.index.data_ptr(), weight.index.numel())
        else:
            w = weight.weight
            assert w.stride(1) == 1 or min(w.shape) < 2, "a weight is row-major"
            place = (w.data_ptr(), w.stride(0), 0, 0)
        if norm is not None and norm.anti is not None:
            norm = norm.anti
        quant_bias, bias, offset, kind, groups = None, None, None, 1, (0, 0, 0)
        input_scale, input_offset = 1.0, 0.0
        if isinstance(weight, W8A8 | W8A8SC):
            kind, scale, quant_bias = 3 * isinstance(weight, W8A8SC), weight.deq_scale, weight.quant_bias
            input_scale, input_offset = weight.input_scale, weight.input_offset
        elif isinstance(weight, W8A8Dynamic):
            scale, bias = weight.weight_scale, weight.bias
        else:
            assert isinstance(weight, W8A16), "it has a native form"
            kind, scale, bias = 2, weight.scale, weight.bias
            offset = weight.offset if weight.offset.any() else None
            groups = (scale.stride(0), weight.group, weight.phase if weight.group else 0)
            assert offset is None or offset.stride() == scale.stride(), "scale and offset lie alike"
            needed = -(-(weight.phase + columns) // weight.group) if weight.group else 1
            assert not columns or scale.shape[1] >= needed, f"{columns} columns from {weight.phase} of a group on: {scale.shape}"
        self._columns, self._held = columns, (weight, norm)
        self.native = native.Int8Linear(
            *(kind, rows, columns, *place, input_scale, input_offset),
            *(_address(quant_bias), scale.data_ptr(), _address(offset), *groups, _address(bias)),
            *((0, 0, 0.0) if norm is None else (norm.weight.data_ptr(), _address(norm.bias), norm.eps)),
        ).run

    def run(self, x: Tensor, out: Tensor, form: int, maxima: Tensor | None = None) -> None:
        """x [T, D], whose rows may lie apart, to out [T, N]."""
        assert x.shape[1] == self._columns, (x.shape, self._columns)
        place = (out.data_ptr(), out.stride(0))
        self.native(DTYPES[x.dtype], x.data_ptr(), x.shape[0], x.stride(0), _address(maxima), *place, form)


def normed(x: Tensor, norm: Norm) -> Tensor:
    out = torch.empty_like(x)
    bias = 0 if norm.bias is None else norm.bias.data_ptr()
    native.rms_norm(DTYPES[x.dtype], x.data_ptr(), x.shape[0], x.shape[1], norm.weight.data_ptr(), bias, norm.eps, out.data_ptr())
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

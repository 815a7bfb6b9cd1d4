"""Quantized linear layers on CUDA devices: which kernel of `triton.quantized`, or which product of torch's, takes which format.

They give what `torch_quantized` gives, sums of integers bit for bit. Nothing here waits for the device, except while an op is
made. An op may run on one stream at a time. T tokens, D columns, N outputs.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.tree import tree_sum
from qtp.kernels.interface import Cuts, Deferred, Kernels, Norm, Op, RowOp
from qtp.kernels.torch_quantized import (
    expanded,
    fp8_product,
    fp8_token_scales,
    joint_maxima,
    leaves_of,
    side_by_side,
    to_fp8,
    token_maxima,
)
from qtp.kernels.triton import quantized
from qtp.kernels.triton.launch import has_fp8
from qtp.kernels.triton.norm import rms_norm, silu_and_mul
from qtp.kernels.triton.quantized import ADDED, FP8_LEVELS, GATED, INT8_LEVELS, INTEGER, RUN, Matrix
from qtp.kernels.triton.vocabulary import VocabularyHead, top
from qtp.weights.quantized import W8A8, W8A8FP8, W8A16, Float, Packed, Quantized, Unscaled, W8A8Dynamic, Weight, row_part

FEW, FEW_FP8 = 64, 32  # tokens up to which reading the weight is what takes time; of torch's product of float8, fewer
_TILE = 4096  # tokens whose sums are held in int32 at a time


def linear(
    kernels: Kernels,
    weight: Quantized | Float | Packed,
    *,
    norm: Norm | None = None,
    cuts: Cuts | None = None,
    across: Communicator | None = None,
) -> Callable[[Tensor], Any]:
    """`Kernels.linear`, of `kernels` for float parts."""
    if isinstance(weight, Float):
        return kernels.linear(weight.weight, weight.bias, norm=norm, cuts=cuts)
    if across is None and cuts is None:  # else all ranks must do alike
        weight = whole(weight)
    if isinstance(weight, Packed):
        return side_by_side([linear(kernels, part, norm=norm, cuts=cuts) for part in weight.parts])
    if across is not None and not isinstance(weight, W8A8FP8 | W8A16):
        assert norm is None, "a row linear with a norm"
        return _Across(weight, across)
    if cuts is None:
        return _Linear(weight, norm, across=across)
    assert norm is None, "a row linear with a norm"
    parts = linear_leaves(kernels, weight, cuts, across)
    return lambda x: tree_sum(parts(x).unbind())


def whole(weight: Quantized | Packed) -> Quantized | Packed:
    """Not compressed, and one weight where W8A8 parts that follow each other quantize the input alike: gate and up, or query, key
    and value, whose streams come apart."""
    if not isinstance(weight, Packed):
        return expanded(weight)
    parts: list[Quantized | Float] = []
    for given in weight.parts:
        part = given if isinstance(given, Float) else expanded(given)
        last = parts[-1] if parts else None
        if isinstance(part, W8A8) and isinstance(last, W8A8):
            scale, offset = part.input_scale, part.input_offset
            if (scale, offset) == (last.input_scale, last.input_offset):
                rows, biases = torch.cat((last.weight, part.weight)), torch.cat((last.quant_bias, part.quant_bias))
                part = W8A8(rows, scale, offset, biases, torch.cat((last.deq_scale, part.deq_scale)))
                parts.pop()
        parts.append(part)
    first = parts[0]
    return first if len(parts) == 1 and not isinstance(first, Float) else Packed(tuple(parts))


def joining(weight: Quantized) -> RowOp:
    """`Kernels.joining`."""
    product = _Product(weight)

    def added(x: Tensor, residual: Tensor) -> Tensor:
        product(x, residual, ADDED)
        return residual

    return lambda x: Deferred(lambda residual: added(x, residual))


def gated(kernels: Kernels, weight: Quantized | Packed, *, norm: Norm | None = None) -> Op:
    """`Kernels.gated`."""
    weight = whole(weight)
    if isinstance(weight, Packed):
        both = linear(kernels, weight, norm=norm)
        return lambda x: silu_and_mul(both(x))
    return _Linear(weight, norm, GATED)


def linear_leaves(kernels: Kernels, weight: Quantized | Packed, cuts: Cuts, across: Communicator | None = None) -> Op:
    """`Kernels.linear_leaves`."""
    if isinstance(weight, Packed):
        ops = [kernels.linear_leaves(row_part(part), cuts, across) for part in weight.parts]
        return lambda x: torch.cat([op(x) for op in ops], dim=2)
    row_part(weight)
    products = [_Product(leaf) for leaf in leaves_of(expanded(weight), cuts)]
    outputs = weight.shape[0]

    def run(x: Tensor) -> Tensor:
        maxima = None if isinstance(weight, W8A16) or not products[0].levels else _maxima(x, across)
        out = x.new_empty(len(products), len(x), outputs, dtype=torch.float32)
        for product, leaf, (a, b) in zip(products, out, pairwise(cuts), strict=True):
            product(x[:, a:b], leaf, RUN, maxima)
        return out

    return run


class QuantizedHead:
    def __init__(self, kernels: Kernels, weight: Quantized | Packed) -> None:
        self.logits = wide(kernels, weight)

    def best(self, x: Tensor, count: int, allowed: int) -> tuple[Tensor, Tensor]:
        return top(self.logits(x)[:, :allowed], count)


def wide(kernels: Kernels, weight: "Weight | Float") -> Op:
    """As `linear`, to float32."""
    if isinstance(weight, Packed):
        return side_by_side([wide(kernels, part) for part in weight.parts])
    if isinstance(weight, Float) and weight.bias is not None:
        product, bias = VocabularyHead(weight.weight).logits, weight.bias.float()
        return lambda x: product(x).add_(bias)
    if isinstance(weight, Tensor | Float):
        return VocabularyHead(weight if isinstance(weight, Tensor) else weight.weight).logits
    return _Linear(weight, dtype=torch.float32)


def _maxima(x: Tensor, across: Communicator | None) -> Tensor:
    return joint_maxima(quantized.token_maxima(x), across)


class _Linear:
    """y, or silu(gate) * up (form GATED), in `dtype` or that of x. across: the ranks over which W8A8FP8 takes maxima."""

    __slots__ = ("_across", "_dtype", "_form", "_norm", "_outputs", "_product")

    def __init__(
        self,
        weight: Quantized,
        norm: Norm | None = None,
        form: int = RUN,
        dtype: torch.dtype | None = None,
        across: Communicator | None = None,
    ) -> None:
        self._product, self._form, self._dtype = _Product(weight), form, dtype
        self._norm = None if norm is None else norm.anti or norm
        self._across = across if isinstance(weight, W8A8FP8) and across is not None and across.size > 1 else None
        assert self._across is None or norm is None, "a row linear with a norm"
        self._outputs = weight.shape[0] // (2 if form == GATED else 1)

    def __call__(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x), self._outputs, dtype=self._dtype)
        self._product(x, out, self._form, None if self._across is None else _maxima(x, self._across), self._norm)
        return out


class _Across:
    """A row linear in integers."""

    __slots__ = ("_across", "_outputs", "_product", "_scale")

    def __init__(self, weight: Quantized, across: Communicator) -> None:
        row_part(weight)
        self._product, self._across, self._outputs = _Product(weight), across, weight.shape[0]
        self._scale = self._product.matrix.scale

    def __call__(self, x: Tensor) -> Unscaled:
        total = x.new_empty(len(x), self._outputs, dtype=torch.int32)
        maxima = _maxima(x, self._across) if self._product.levels else None
        scales = self._product(x, total, INTEGER, maxima)
        return Unscaled(total, self._scale if scales is None else scales[:, None] * self._scale, x.dtype)


class _Product:
    """levels: of inputs that are quantized by each token's maximum, else 0. static: scale and offset of those that are not."""

    __slots__ = ("_arrived", "_wide", "_words", "levels", "matrix", "static")

    def __init__(self, given: Quantized) -> None:
        weight = expanded(given)
        w, bias = weight.weight, None if isinstance(weight, W8A8) else weight.bias
        assert w.stride(1) == 1 or min(w.shape) < 2, "a weight is row-major"
        self.levels, self.static, self._wide = 0.0, None, None
        if isinstance(weight, W8A8):
            self.static = weight.input_scale, weight.input_offset
            self.matrix = Matrix(weight=w, scale=weight.deq_scale, quant_bias=weight.quant_bias, integer=True)
        elif isinstance(weight, W8A8Dynamic):
            self.levels = INT8_LEVELS
            self.matrix = Matrix(weight=w, scale=weight.weight_scale, bias=bias, integer=True)
        elif isinstance(weight, W8A8FP8):
            self.levels = FP8_LEVELS
            self.matrix = Matrix(weight=w, scale=weight.weight_scale, bias=bias)
            if not has_fp8(w.device):
                self._wide = weight
        else:
            self.matrix = _matrix(weight)
        self._words = quantized.words_of(self.matrix)
        self._arrived = torch.zeros(-(-w.shape[0] // 32), dtype=torch.int32, device=w.device)

    def __call__(
        self, x: Tensor, out: Tensor, form: int, maxima: Tensor | None = None, norm: Norm | None = None
    ) -> Tensor | None:
        """norm(x), x [T, D], whose rows may lie apart, to out [T, N], int32 if the form is INTEGER. maxima [T] float32: max |x|
        of each token over more columns than these. Returns the scales of tokens, [T] float32, if they have such."""
        assert x.shape[1] == self.matrix.weight.shape[1], (x.shape, self.matrix.weight.shape)
        assert x.stride(1) == 1 or min(x.shape) < 2, "x is row-major"
        tokens = len(x)
        if self._wide is not None:
            _by_torch(self._wide, x if norm is None else rms_norm(x, norm), out, form, maxima)
            return None
        scales = None
        if self.static is not None:
            x_q, _ = quantized.quantized(x, 0.0, torch.int8, *self.static, norm=norm)
        elif self.levels:
            many = tokens > FEW_FP8 and _fits_scaled_mm(self.matrix, out)
            kind = torch.int8 if self.matrix.integer else torch.float8_e4m3fn if many else torch.float16
            x_q, scales = quantized.quantized(x, self.levels, kind, maxima=maxima, norm=norm)
        else:
            x_q = x if norm is None else rms_norm(x, norm)
        if not tokens or not out.shape[1]:
            return scales
        if tokens == 1 and self._words is not None:
            quantized.one_token(x_q, self._words, self.matrix, out, form, scales)
        elif tokens > FEW and self.matrix.integer and _fits_int_mm(self.matrix.weight):
            self._by_int_mm(x_q, out, form, scales)
        elif x_q.dtype == torch.float8_e4m3fn:
            self._by_scaled_mm(x_q, out, form, scales)
        else:
            quantized.some_tokens(x_q, self.matrix, out, form, self._arrived, scales)
        return scales

    def _by_int_mm(self, x_q: Tensor, out: Tensor, form: int, scales: Tensor | None) -> None:
        w_DN = self.matrix.weight.t()
        for start in range(0, len(x_q), _TILE):
            some = slice(start, start + _TILE)
            rest = len(x_q) - start
            if rest <= 16:  # of which torch has no product
                quantized.some_tokens(
                    x_q[some], self.matrix, out[some], form, self._arrived, None if scales is None else scales[some]
                )
            else:
                totals = torch._int_mm(x_q[some], w_DN)
                quantized.scale_totals(totals, self.matrix, out[some], form, None if scales is None else scales[some])

    def _by_scaled_mm(self, x_q: Tensor, out: Tensor, form: int, scales: Tensor | None) -> None:
        assert scales is not None
        matrix = self.matrix
        y = torch._scaled_mm(
            *(x_q, matrix.weight.t(), scales[:, None], matrix.scale[None, :]), bias=matrix.bias, out_dtype=out.dtype
        )
        _give(y, out, form)


def _give(y: Tensor, out: Tensor, form: int) -> None:
    if form == ADDED:
        out.add_(y)
    else:
        out.copy_(silu_and_mul(y) if form == GATED else y)


def _matrix(weight: W8A16) -> Matrix:
    columns, group, phase = weight.shape[1], weight.group, weight.phase
    if not columns:  # a rank that has none of the groups: nothing is read but a scale
        return Matrix(weight=weight.weight, scale=weight.scale.new_ones(weight.shape[0]), bias=weight.bias)
    needed = -(-(phase + columns) // group) if group else 1
    assert weight.scale.shape[1] >= needed, f"{columns} columns from {phase} of a group on: {weight.scale.shape}"
    scale, offset = (t[:, :needed].contiguous() for t in (weight.scale, weight.offset))
    if needed < 2:
        scale, offset, group, phase = scale.flatten(), offset.flatten(), 0, 0
    used = offset if bool(offset.any()) else None
    return Matrix(weight=weight.weight, scale=scale, offset=used, bias=weight.bias, group=group, phase=phase)


def _by_torch(weight: W8A8FP8, x: Tensor, out: Tensor, form: int, maxima: Tensor | None) -> None:
    scale_T1 = fp8_token_scales(token_maxima(x) if maxima is None else maxima)[:, None]
    y = fp8_product(to_fp8(x, scale_T1), weight.weight) * (scale_T1 * weight.weight_scale)
    if weight.bias is not None:
        y += weight.bias.float()
    _give(y, out, form)


def _fits_scaled_mm(matrix: Matrix, out: Tensor) -> bool:
    """Whether torch's product of float8 takes it: it gives bfloat16 alone where each row has a scale."""
    w = matrix.weight
    fits = w.is_contiguous() and not any(n % 16 for n in w.shape) and w.data_ptr() % 16 == 0
    return (
        w.device.type == "cuda"
        and fits
        and out.dtype == torch.bfloat16
        and (matrix.bias is None or matrix.bias.dtype == out.dtype)
    )


def _fits_int_mm(w: Tensor) -> bool:
    if w.device.type != "cuda":
        return True
    return not any(n % 8 for n in w.shape) and w.stride(0) % 16 == 0 and w.data_ptr() % 16 == 0

"""Linear layers in floats for one token, where reading the weight is all that takes time. D inputs, N outputs.

An RMSNorm before the product costs no pass of its own: sum(w g x) / rms is what is computed, each weight being read once, with
the squares added up on the way. So it is rounded once where the norm by itself would round twice more.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qtp.kernels.interface import Norm
from qtp.kernels.triton.launch import launch_dependents, options, read_once, wait


@triton.jit
def _input(x_ptr, g_ptr, at_D, D, NORM: tl.constexpr):
    """x, with the factors of a norm, and its squares where there is one: [1, BLOCK_D], as rows of the weight lie."""
    at_1D = at_D[None, :]
    x_1D = tl.load(x_ptr + at_1D, mask=at_1D < D, other=0.0).to(tl.float32)
    squares_1D = x_1D * x_1D
    if NORM:
        x_1D *= tl.load(g_ptr + at_1D, mask=at_1D < D, other=0.0).to(tl.float32)
    return x_1D, squares_1D


@triton.jit
def _one_token(
    x_ptr,
    w_ptr,
    bias_ptr,
    g_ptr,
    add_ptr,
    out_ptr,
    N,
    D,
    w_stride,
    eps,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[n] = (add[n] +) sum_d w[n, d] norm(x)[d] (+ bias[n]); GATED: of rows n and N + n, silu(the first) * the second.
    Weights are fetched one round ahead."""
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held_N = tl.minimum(rows_N, N - 1).to(tl.int64)
    cols_D = tl.arange(0, BLOCK_D)
    w_N1 = w_ptr + held_N[:, None] * w_stride
    up_N1 = w_ptr + (held_N + N)[:, None] * w_stride
    w_ND, sums_ND = read_once(w_N1, cols_D, D), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    up_ND, up_sums_ND = w_ND, sums_ND
    if GATED:
        up_ND = read_once(up_N1, cols_D, D)
    squares_1D = tl.zeros((1, BLOCK_D), tl.float32)
    wait(PDL)
    for start in range(0, D, BLOCK_D):
        x_1D, more_1D = _input(x_ptr, g_ptr, start + cols_D, D, NORM)
        squares_1D += more_1D
        next_D = start + BLOCK_D + cols_D
        ahead_ND = read_once(w_N1, next_D, D)
        sums_ND += w_ND.to(tl.float32) * x_1D
        w_ND = ahead_ND
        if GATED:
            ahead_ND = read_once(up_N1, next_D, D)
            up_sums_ND += up_ND.to(tl.float32) * x_1D
            up_ND = ahead_ND
    launch_dependents(PDL)
    y_N = tl.sum(sums_ND, axis=1)
    if NORM:
        rms = tl.sqrt(tl.sum(squares_1D, axis=1) / D + eps)
        y_N /= rms
    inside_N = rows_N < N
    if BIAS:
        y_N += tl.load(bias_ptr + rows_N, mask=inside_N, other=0.0).to(tl.float32)
    if GATED:
        up_N = tl.sum(up_sums_ND, axis=1)
        if NORM:
            up_N /= rms
        y_N = y_N / (1.0 + tl.exp(-y_N)) * up_N
    if ADD:
        y_N += tl.load(add_ptr + rows_N, mask=inside_N, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows_N, y_N.to(out_ptr.dtype.element_ty), mask=inside_N)


def _blocks(rows: int, columns: int, gated: bool) -> tuple[int, int, int]:
    """Rows of the weight, columns at a time and warps: what was fastest on an H200 among some 40 for the shapes of 0.5B and 7B
    by themselves, for the smaller one in the graph of a step. Few rows leave multiprocessors idle if many go together. More
    blocks of a row on their way, all of them even, or a row a warp gained nothing there: who waits is the input."""
    if gated:
        return 8, 256, 2 if rows > 8192 else 4
    if rows < 2048:
        return (2, 1024, 8) if columns > 2048 else (4, 1024, 8)
    return (8, 512, 4) if rows > 4096 else (4, 1024, 4)


class OneToken:
    """y = norm(x) W^T + bias, or silu(gate) * up. weight [N, D] or, gated, [2 N, D]. For more tokens torch's product is as fast:
    4608 x 3584 by 8 tokens in 10.5 microseconds on an H200, this for one in 9.7."""

    __slots__ = ("_bias", "_eps", "_flags", "_g", "_grid", "_outputs", "_shape", "_warps", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, norm: Norm | None, gated: bool) -> None:
        assert weight.stride(1) == 1 or min(weight.shape) < 2, "a weight is row-major"
        assert norm is None or norm.bias is None, "a norm with a bias goes by itself"
        self._weight, self._bias, self._outputs = weight, bias, weight.shape[0] // (2 if gated else 1)
        self._g = None if norm is None else norm.weight
        self._eps = 0.0 if norm is None else norm.eps
        self._shape = (self._outputs, weight.shape[1], weight.stride(0))
        block_n, block_d, self._warps = _blocks(self._outputs, weight.shape[1], gated)
        self._grid = (triton.cdiv(self._outputs, block_n),)
        self._flags: dict[str, Any] = {
            "NORM": norm is not None,
            "BIAS": bias is not None,
            "GATED": gated,
            "BLOCK_N": block_n,
            "BLOCK_D": block_d,
        }

    def __call__(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """y [1, N]; with `into` [1, N], contiguous: adds y to it and returns it."""
        out = x.new_empty(1, self._outputs) if into is None else into
        assert len(x) == len(out) == 1, (x.shape, out.shape)
        if self._outputs:
            _one_token[self._grid](
                *(x, self._weight, self._bias, self._g, into, out, *self._shape, self._eps),
                **self._flags,
                ADD=into is not None,
                **options(x, self._warps, 1),
            )
        return out

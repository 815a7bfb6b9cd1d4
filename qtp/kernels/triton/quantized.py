"""Products with weights of 8 bits, and what quantizes their inputs. T tokens, D input columns, N outputs, G groups of columns.

Integer sums are exact; floats are added in float32 and rounded once. A weight is read once for as many tokens as `_BLOCK_T`
says.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from qtp.kernels.interface import Norm
from qtp.kernels.triton import quantized_kernels as kernels
from qtp.kernels.triton.launch import options
from qtp.kernels.triton.norm import row_warps

# What comes out: y in the dtype of `out`; the sums in int32; silu(gate) * up; y added to what `out` holds.
RUN, INTEGER, GATED, ADDED = range(4)
INT8_LEVELS, FP8_LEVELS = 127.0, 448.0

_AT_ONCE = 396  # programs of `some_tokens` that run at a time
_BLOCK_T = (16, 32, 64, 128)
# By _BLOCK_T, rows of the weight, columns at a time, warps, stages: of what was tried on an H200 with the shapes of 72B
# (integers) and 7B (floats). Weights that must become floats are many instructions, those with groups the most.
_INTEGERS = {16: (32, 256, 2, 4), 32: (32, 256, 2, 4), 64: (64, 128, 4, 4), 128: (128, 64, 8, 3)}
_FLOATS = {16: (64, 128, 2, 4), 32: (64, 128, 4, 4), 64: (64, 128, 4, 4), 128: (128, 64, 8, 3)}
_GROUPED = {**_FLOATS, 16: (64, 128, 4, 4)}
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A weight in the words of the kernels: y = (x_q W^T + quant_bias) * scale (* the token's scale) + bias, or, in floats,
    y = x ((W - offset) * scale)^T + bias.

    weight int8 or float8 [N, D], row-major; scale float32 [N], or [N, G] if `group`; offset alike, or None; quant_bias int32 [N];
    bias [N]. Column d is of group (phase + d) // group. integer: x has integers, and the sums are exact."""

    weight: Tensor
    scale: Tensor
    offset: Tensor | None = None
    quant_bias: Tensor | None = None
    bias: Tensor | None = None
    group: int = 0
    phase: int = 0
    integer: bool = False


def quantized(
    x: Tensor,
    levels: float,
    out_dtype: torch.dtype,
    scale: float = 1.0,
    offset: float = 0.0,
    *,
    maxima: Tensor | None = None,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x [T, D], or norm(x), as int8 or, with FP8_LEVELS, rounded to float8 e4m3 and held in out_dtype; contiguous. levels 0: by
    `scale` and `offset`. Else each token by max |x| / levels, or 1 where that is 0, which come back as [T] float32; maxima [T]
    float32: what is taken for max |x|."""
    tokens, columns = x.shape
    out = x.new_empty(tokens, columns, dtype=out_dtype)
    scales = x.new_empty(tokens, dtype=torch.float32) if levels else None
    if tokens:
        _launch_quantize(x, norm, maxima, out, scales, scale, offset, levels)
    return out, scales


def token_maxima(x: Tensor) -> Tensor:
    """max |x| of each token: [T] float32."""
    maxima = x.new_empty(len(x), dtype=torch.float32)
    if len(x):
        _launch_quantize(x, None, None, None, maxima, 1.0, 0.0, INT8_LEVELS)
    return maxima


def _launch_quantize(
    x: Tensor,
    norm: Norm | None,
    maxima: Tensor | None,
    out: Tensor | None,
    scales: Tensor | None,
    scale: float,
    offset: float,
    levels: float,
) -> None:
    tokens, columns = x.shape
    block = triton.next_power_of_2(max(columns, 16))
    g, bias, eps = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    kernels.quantize[(tokens,)](
        *(x, g, bias, maxima, out, scales, columns, x.stride(0), eps, scale, offset),
        LEVELS=levels,
        BLOCK_D=block,
        **options(x, row_warps(block), 1),
    )


def _one(outputs: int, gated: bool) -> tuple[int, int]:
    """Rows of the weight and words of each at a time, for one token: what was fast on an H200 for the shapes of 7B and 72B."""
    if gated:
        return 2, 512
    return (4, 512) if outputs < 8192 else (16, 256)


def words_of(matrix: Matrix) -> Tensor | None:
    """The weight, [N, D / 4] int32, for `one_token`; None unless it is int8 by int8 and its rows are whole words."""
    w = matrix.weight
    if not matrix.integer or w.shape[1] % 4 or w.stride(0) % 4 or w.storage_offset() % 4:
        return None
    return w.view(torch.int32)


def one_token(x: Tensor, words: Tensor, matrix: Matrix, out: Tensor, form: int, token_scale: Tensor | None = None) -> None:
    """y of x [1, D] int8, contiguous, to out [1, N]. words: `words_of` the matrix."""
    outputs, count = out.shape[1], words.shape[1]
    rows, block = _one(outputs, form == GATED)
    kernels.one_token[(triton.cdiv(outputs, rows),)](
        *(x.view(torch.int32), words, matrix.scale, token_scale, matrix.quant_bias, matrix.bias, out),
        *(outputs, count, words.stride(0)),
        FORM=form,
        BLOCK_N=rows,
        BLOCK_W=min(block, triton.next_power_of_2(count)),
        **options(x, 4, 1),
    )


def _splits(blocks: int, rounds: int) -> int:
    """Programs for the rounds of an output, of which each costs as much as two more rounds."""
    times = {s: triton.cdiv(blocks * s, _AT_ONCE) * (triton.cdiv(rounds, s) + 2) for s in _SPLITS if s <= max(1, rounds)}
    return min(times, key=times.__getitem__)


def some_tokens(x: Tensor, matrix: Matrix, out: Tensor, form: int, arrived: Tensor, token_scale: Tensor | None = None) -> None:
    """y of x [T, D] to out [T, N], whose rows may lie apart. arrived: zeros, int32, N / 32 of them; no two calls may have the
    same ones at a time."""
    (tokens, columns), outputs = x.shape, out.shape[1]
    block_t = min(_BLOCK_T[-1], max(_BLOCK_T[0], triton.next_power_of_2(tokens)))
    sizes = _INTEGERS if matrix.integer else _GROUPED if matrix.group else _FLOATS
    block_n, block_d, warps, stages = sizes[block_t]
    if form == GATED or x.dtype == torch.float32:
        block_d //= 2
    if form == GATED and matrix.group:
        block_n = min(block_n, 64)  # there are three sums: with more rows, registers do not suffice
    group = matrix.group or max(columns, 1)
    block_d = min(block_d, max(32, triton.next_power_of_2(group)))
    steps = triton.cdiv(group, block_d)
    rounds = triton.cdiv(matrix.phase + columns, group) * steps
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(outputs, block_n))
    split = _splits(grid[1], rounds) if grid[0] == 1 else 1
    assert grid[1] <= arrived.numel() or split == 1, (grid, arrived.shape)
    shape = (split, 2 if form == GATED else 1, tokens, outputs)
    parts = x.new_empty(shape, dtype=torch.int32 if matrix.integer else torch.float32) if split > 1 else None
    kernels.some_tokens[(*grid, split)](
        *(x, matrix.weight, matrix.scale, matrix.offset, token_scale, matrix.quant_bias, matrix.bias, out, parts, arrived),
        *(tokens, outputs, columns, x.stride(0), matrix.weight.stride(0), out.stride(0), matrix.scale.stride(0), rounds),
        WHOLE=matrix.integer,
        GROUPED=matrix.group > 0,
        FORM=form,
        GROUP=group,
        PHASE=matrix.phase,
        STEPS=steps,
        EVEN=matrix.phase == 0 and group % block_d == 0 and columns % group == 0,
        SPLIT=split,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        **options(x, warps, stages),
    )


def scale_totals(totals: Tensor, matrix: Matrix, out: Tensor, form: int, token_scale: Tensor | None = None) -> None:
    """What comes of sums x_q W^T, [T, N] or, GATED, [T, 2 N] int32, to out [T, N]."""
    tokens, outputs = out.shape
    block = min(2048, triton.next_power_of_2(max(outputs, 16)))
    kernels.scale_totals[(triton.cdiv(outputs, block), tokens)](
        *(totals, matrix.scale, token_scale, matrix.quant_bias, matrix.bias, out),
        *(tokens, outputs, totals.stride(0), out.stride(0)),
        FORM=form,
        BLOCK_N=block,
        **options(totals, 8, 1),
    )

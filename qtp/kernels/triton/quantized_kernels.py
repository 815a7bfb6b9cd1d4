"""Kernels of products with weights of 8 bits, and of what quantizes their inputs; `quantized` launches them.

T tokens, D input columns, N outputs, W words of four int8.
"""

import triton
import triton.language as tl

from qtp.kernels.triton.launch import dot, dot4, fp8_levels, int8_levels, launch_dependents, read_once, wait
from qtp.kernels.triton.norm import normed

INTEGER_FORM, GATED_FORM, ADDED_FORM = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # as `quantized` says; 0: y

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_INT8 = tl.constexpr(127.0)


@triton.jit
def quantize(
    x_ptr, g_ptr, norm_bias_ptr, maxima_ptr, out_ptr, scales_ptr, D, x_stride, eps, scale, offset,
    LEVELS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a program, after a norm if there is `g`. LEVELS 0: with `scale` and `offset`. Else the scale is max |x| / LEVELS,
    which goes to `scales`, with the maximum from `maxima` or from x. Without `out`, only the maximum goes to `scales`."""
    token, at_D = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    inside_D = at_D < D
    if g_ptr is not None:
        g_D = tl.load(g_ptr + at_D, mask=inside_D, other=0.0)
    launch_dependents(PDL)
    wait(PDL)
    x_D = tl.load(x_ptr + token * x_stride + at_D, mask=inside_D, other=0.0)
    if g_ptr is not None:
        x_D = normed(x_D, g_D, norm_bias_ptr, at_D, D, eps)
    x_D = x_D.to(tl.float32)
    if LEVELS > 0:
        most = tl.max(tl.abs(x_D), axis=0) if maxima_ptr is None else tl.load(maxima_ptr + token)
        if out_ptr is None:
            tl.store(scales_ptr + token, most)
        else:
            scale = tl.math.div_rn(most, LEVELS)
            scale = tl.where(scale > 0.0, scale, 1.0)
            tl.store(scales_ptr + token, scale)
    if out_ptr is not None:
        if LEVELS > _INT8:
            value_D = fp8_levels(x_D, scale).to(out_ptr.dtype.element_ty)
        else:
            value_D = int8_levels(x_D, scale, offset).to(tl.int8)
        tl.store(out_ptr + token * D + at_D, value_D, mask=inside_D)


@triton.jit
def _scaled(total_NT, rows_N, tokens_T, scale_ptr, token_scale_ptr, bias_ptr):
    """y of sums to which quant_bias is added: [N, T] float32. scale_ptr is None where the sums are scaled already."""
    y_NT = total_NT.to(tl.float32)
    if scale_ptr is not None:
        scale_NT = tl.load(scale_ptr + rows_N)[:, None]
        if token_scale_ptr is not None:
            scale_NT = tl.load(token_scale_ptr + tokens_T)[None, :] * scale_NT
        y_NT *= scale_NT
    if bias_ptr is not None:
        y_NT += tl.load(bias_ptr + rows_N).to(tl.float32)[:, None]
    return y_NT


@triton.jit
def _finish(
    total_NT, up_NT, rows_N, tokens_T, T, N, scale_ptr, token_scale_ptr, quant_bias_ptr, bias_ptr, out_ptr, out_stride,
    FORM: tl.constexpr,
):  # fmt: skip
    """Stores what the sums of rows n (and N + n, GATED) of the weight give. rows_N and tokens_T may lead beyond the end."""
    held_N, tokens = tl.minimum(rows_N, N - 1), tl.minimum(tokens_T, T - 1)
    if quant_bias_ptr is not None:
        total_NT += tl.load(quant_bias_ptr + held_N)[:, None]
    out_NT = out_ptr + tokens_T[None, :].to(tl.int64) * out_stride + rows_N[:, None]
    inside_NT = (rows_N[:, None] < N) & (tokens_T[None, :] < T)
    if FORM == INTEGER_FORM:
        tl.store(out_NT, total_NT, mask=inside_NT)
    else:
        y_NT = _scaled(total_NT, held_N, tokens, scale_ptr, token_scale_ptr, bias_ptr)
        if FORM == GATED_FORM:
            if quant_bias_ptr is not None:
                up_NT += tl.load(quant_bias_ptr + N + held_N)[:, None]
            y_NT = y_NT / (1.0 + tl.exp(-y_NT)) * _scaled(up_NT, N + held_N, tokens, scale_ptr, token_scale_ptr, bias_ptr)
        if FORM == ADDED_FORM:  # y is rounded first, as where it is summed over ranks before: the bits of any world size
            y_NT = y_NT.to(out_ptr.dtype.element_ty).to(tl.float32)
            y_NT += tl.load(out_NT, mask=inside_NT, other=0.0).to(tl.float32)
        tl.store(out_NT, y_NT.to(out_ptr.dtype.element_ty), mask=inside_NT)


@triton.jit
def one_token(
    x_ptr, w_ptr, scale_ptr, token_scale_ptr, quant_bias_ptr, bias_ptr, out_ptr, N, words, w_stride,
    FORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y of one token, of int8 by int8, from rows n (and N + n, GATED) of the weight; both come as int32 of four columns each,
    so many `words` and `w_stride` from row to row. Weights are fetched one round ahead."""
    rows_N, at_W = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)
    held_N = tl.minimum(rows_N, N - 1)
    w_N1 = w_ptr + (held_N.to(tl.int64) * w_stride)[:, None]
    up_N1 = w_ptr + ((held_N + N).to(tl.int64) * w_stride)[:, None]
    sums_NW, up_sums_NW = tl.zeros((BLOCK_N, BLOCK_W), tl.int32), tl.zeros((BLOCK_N, BLOCK_W), tl.int32)
    w_NW = read_once(w_N1, at_W, words)
    up_w_NW = w_NW
    if FORM == GATED_FORM:
        up_w_NW = read_once(up_N1, at_W, words)
    wait(PDL)
    for start in range(0, words, BLOCK_W):
        x_1W = tl.load(x_ptr + (start + at_W)[None, :], mask=(start + at_W)[None, :] < words, other=0)
        x_NW = tl.broadcast_to(x_1W, (BLOCK_N, BLOCK_W))
        next_W = start + BLOCK_W + at_W
        ahead_NW = read_once(w_N1, next_W, words)
        sums_NW = dot4(w_NW, x_NW, sums_NW)
        w_NW = ahead_NW
        if FORM == GATED_FORM:
            ahead_NW = read_once(up_N1, next_W, words)
            up_sums_NW = dot4(up_w_NW, x_NW, up_sums_NW)
            up_w_NW = ahead_NW
    launch_dependents(PDL)
    total_N1 = tl.sum(sums_NW, axis=1)[:, None]
    up_N1 = tl.sum(up_sums_NW, axis=1)[:, None]
    _finish(
        total_N1, up_N1, rows_N, tl.arange(0, 1), 1, N, scale_ptr, token_scale_ptr, quant_bias_ptr, bias_ptr, out_ptr, 0, FORM,
    )  # fmt: skip


@triton.jit
def _read(place, inside, EVEN: tl.constexpr):
    """EVEN: all of it is inside."""
    return tl.load(place) if EVEN else tl.load(place, mask=inside, other=0.0)


@triton.jit
def _operand(w, dtype: tl.constexpr):
    """Values of 8 bits as an operand of `dot`. (Triton's interpreter takes bits for numbers where it goes to bfloat16.)"""
    return w.to(tl.float32) if _INTERPRETED else w.to(dtype)


@triton.jit
def _times_some(
    total_NT, w_ND, x_DT, x_sums_T, group, rows_N, scale_ptr, offset_ptr, groups, WHOLE: tl.constexpr, GROUPED: tl.constexpr
):
    """total + w x for columns of one group. x_sums_T: the sums of x, if there are offsets."""
    if WHOLE:
        total_NT = tl.dot(w_ND, x_DT, total_NT, out_dtype=tl.int32)
    elif GROUPED:
        part_NT = dot(_operand(w_ND, x_DT.dtype), x_DT, tl.zeros(total_NT.shape, tl.float32))
        place_N = rows_N.to(tl.int64) * groups + group
        if offset_ptr is not None:
            part_NT -= tl.load(offset_ptr + place_N)[:, None] * x_sums_T[None, :]
        total_NT += part_NT * tl.load(scale_ptr + place_N)[:, None]
    else:
        total_NT = dot(_operand(w_ND, x_DT.dtype), x_DT, total_NT)
    return total_NT


@triton.jit(do_not_specialize=["T"])
def some_tokens(
    x_ptr, w_ptr, scale_ptr, offset_ptr, token_scale_ptr, quant_bias_ptr, bias_ptr, out_ptr, parts_ptr, arrived_ptr, T, N, D,
    x_stride, w_stride, out_stride, groups, rounds, WHOLE: tl.constexpr, GROUPED: tl.constexpr, FORM: tl.constexpr,
    GROUP: tl.constexpr, PHASE: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y of BLOCK_T tokens from rows n (and N + n, GATED) of the weight.

    A group of GROUP columns takes STEPS rounds of BLOCK_D; EVEN: no round has less. With SPLIT programs for the rounds of an
    output, the last to arrive adds up the `parts` [SPLIT, 2 if GATED, T, N] of all in order. `arrived` is 0 before and after."""
    tokens_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    held_N, cols_D = tl.minimum(rows_N, N - 1), tl.arange(0, BLOCK_D)
    w_N1 = w_ptr + (held_N.to(tl.int64) * w_stride)[:, None]
    up_N1 = w_ptr + ((held_N + N).to(tl.int64) * w_stride)[:, None]
    x_1T, there_1T = x_ptr + (tokens_T.to(tl.int64) * x_stride)[None, :], tokens_T[None, :] < T
    total_NT = tl.zeros((BLOCK_N, BLOCK_T), tl.int32 if WHOLE else tl.float32)
    up_NT = tl.zeros((BLOCK_N, BLOCK_T), tl.int32 if WHOLE else tl.float32)
    x_sums_T = tl.zeros((BLOCK_T,), tl.float32)
    share = (rounds + SPLIT - 1) // SPLIT
    wait(PDL)
    for i in range(split * share, tl.minimum(rounds, split * share + share)):
        group = i // STEPS
        within_D = i % STEPS * BLOCK_D + cols_D
        at_D = group * GROUP - PHASE + within_D
        inside_D = (at_D < D) & (at_D >= 0) & (within_D < GROUP)
        x_inside_DT = there_1T if EVEN else there_1T & inside_D[:, None]
        x_DT = tl.load(x_1T + at_D[:, None], mask=x_inside_DT, other=0.0)
        w_ND = _read(w_N1 + at_D[None, :], inside_D[None, :], EVEN)
        if offset_ptr is not None:
            sums_T = tl.sum(x_DT.to(tl.float32), axis=0)
            x_sums_T = sums_T if GROUPED else x_sums_T + sums_T
        total_NT = _times_some(total_NT, w_ND, x_DT, x_sums_T, group, held_N, scale_ptr, offset_ptr, groups, WHOLE, GROUPED)
        if FORM == GATED_FORM:
            up_ND = _read(up_N1 + at_D[None, :], inside_D[None, :], EVEN)
            up_NT = _times_some(up_NT, up_ND, x_DT, x_sums_T, group, held_N + N, scale_ptr, offset_ptr, groups, WHOLE, GROUPED)
    launch_dependents(PDL)
    if offset_ptr is not None and not GROUPED:
        total_NT -= tl.load(offset_ptr + held_N)[:, None] * x_sums_T[None, :]
        if FORM == GATED_FORM:
            up_NT -= tl.load(offset_ptr + N + held_N)[:, None] * x_sums_T[None, :]
    last = True
    if SPLIT > 1:
        inside_NT = (rows_N[:, None] < N) & (tokens_T[None, :] < T)
        part_NT = parts_ptr + tokens_T[None, :].to(tl.int64) * N + rows_N[:, None]
        size = (2 if FORM == GATED_FORM else 1) * T.to(tl.int64) * N
        tl.store(part_NT + split * size, total_NT, mask=inside_NT)
        if FORM == GATED_FORM:
            tl.store(part_NT + split * size + size // 2, up_NT, mask=inside_NT)
        tl.debug_barrier()
        place = arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        last = tl.atomic_add(place, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if last:
            total_NT = tl.zeros((BLOCK_N, BLOCK_T), total_NT.dtype)
            up_NT = tl.zeros((BLOCK_N, BLOCK_T), up_NT.dtype)
            for s in range(SPLIT):
                total_NT += tl.load(part_NT + s * size, mask=inside_NT, other=0, cache_modifier=".cg")
                if FORM == GATED_FORM:
                    up_NT += tl.load(part_NT + s * size + size // 2, mask=inside_NT, other=0, cache_modifier=".cg")
            tl.store(place, 0)
    of_rows_ptr = None if GROUPED else scale_ptr
    if last:
        _finish(
            total_NT, up_NT, rows_N, tokens_T, T, N, of_rows_ptr, token_scale_ptr, quant_bias_ptr, bias_ptr, out_ptr,
            out_stride, FORM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def scale_totals(
    total_ptr, scale_ptr, token_scale_ptr, quant_bias_ptr, bias_ptr, out_ptr, T, N, total_stride, out_stride,
    FORM: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What `some_tokens` makes of its sums, of those of another product: [T, N] int32, GATED [T, 2 N]."""
    tokens_1 = tl.program_id(1) + tl.arange(0, 1)
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N1 = rows_N[:, None] < N
    total_N1 = total_ptr + tokens_1[None, :].to(tl.int64) * total_stride + rows_N[:, None]
    wait(PDL)
    sums_N1 = tl.load(total_N1, mask=inside_N1, other=0.0)
    up_N1 = tl.load(total_N1 + N, mask=inside_N1, other=0.0) if FORM == GATED_FORM else sums_N1
    _finish(
        sums_N1, up_N1, rows_N, tokens_1, T, N, scale_ptr, token_scale_ptr, quant_bias_ptr, bias_ptr, out_ptr, out_stride, FORM,
    )  # fmt: skip

"""The grouped expert product on the device: what `experts` launches.

T tokens, K experts chosen for each, P = T K pairs, of which pair p is of token p // K; D hidden, F columns of an expert. A
product has C columns to sum over and gives N outputs. slots int32 [limit] says where among the held experts each expert is, -1
for those that other ranks hold; their pairs cost a program that leaves at once, and what they would have written is not read.

A table, int64 [experts held, 4], has of each weight: its address, elements from row to row, the address of the scales (float32)
and that of quant_bias (int32) or of the offsets (float32). KIND is that of the weight: float, w8a16, w8a8, w8a8_dynamic or
w8a8_fp8; the input of the last three is of the weight's type. Sums are float32, of int8 by int8 int32.

Gate and up come from one product: its weight rows take turns, row 2 f is gate's f and row 2 f + 1 is up's, so that one program,
and in it one thread, has both.
"""

import triton
import triton.language as tl

from qtp.kernels.triton.launch import dot, dot_fp8, fp8_levels, int8_levels, launch_dependents, wait


@triton.jit
def _slot(chosen_ptr, pair, slots_ptr, limit):
    expert = tl.load(chosen_ptr + pair)
    return tl.load(slots_ptr + expert, mask=(expert >= 0) & (expert < limit), other=-1)


@triton.jit
def _weight_rows(table_ptr, slot, rows_N, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the first column of the rows. ALIGNED: each row begins at a multiple of 16 bytes."""
    address, stride = tl.load(table_ptr + slot * 4), tl.load(table_ptr + slot * 4 + 1)
    w_N = address.to(tl.pointer_type(DTYPE)) + rows_N.to(tl.int64) * stride
    return tl.multiple_of(w_N, 16) if ALIGNED else w_N


@triton.jit
def _rows_of(first, F, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_N rows of a weight, those from its row `first` on or, GATED, those of as many halves; ends at its last row."""
    at_N = tl.arange(0, BLOCK_N)
    return tl.minimum(first // 2 + at_N // 2, F - 1) + at_N % 2 * F if GATED else tl.minimum(first + at_N, F - 1)


@triton.jit
def _scaled(sums, all_x, x_scale, table_ptr, slot, rows, KIND: tl.constexpr, OFFSET: tl.constexpr):
    """y float32 of the sums. rows: those of the weight, in a shape that goes with that of the sums, as all_x (the sum of the
    input over its columns) and x_scale do."""
    y = sums
    if KIND != "float":
        scale = tl.load(tl.load(table_ptr + slot * 4 + 2).to(tl.pointer_type(tl.float32)) + rows)
        if KIND == "w8a16":
            if OFFSET:
                y -= all_x * tl.load(tl.load(table_ptr + slot * 4 + 3).to(tl.pointer_type(tl.float32)) + rows)
            y *= scale
        elif KIND == "w8a8":
            bias = tl.load(tl.load(table_ptr + slot * 4 + 3).to(tl.pointer_type(tl.int32)) + rows)
            y = (sums + bias).to(tl.float32) * scale
        else:
            y = sums.to(tl.float32) * (x_scale * scale)
    return y


@triton.jit
def _row_sums(x_ptr, w_N, C, INT8: tl.constexpr, OFFSET: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """sum over c of x[c] w[n, c], and sum over c of x[c]. The weights of the next columns are on their way meanwhile."""
    WIDE: tl.constexpr = tl.int32 if INT8 else tl.float32
    at_C = tl.arange(0, BLOCK_C)
    w_NC = w_N[:, None] + at_C[None, :]
    next_NC = tl.load(w_NC, mask=at_C[None, :] < C, other=0.0)
    sums_NC = tl.zeros((BLOCK_N, BLOCK_C), WIDE)
    x_sums_C = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        weight_NC = next_NC
        next_NC = tl.load(w_NC + (start + BLOCK_C), mask=at_C[None, :] < C - start - BLOCK_C, other=0.0)
        x_C = tl.load(x_ptr + start + at_C, mask=at_C < C - start, other=0.0).to(WIDE)
        sums_NC += weight_NC.to(WIDE) * x_C[None, :]
        if OFFSET:
            x_sums_C += x_C
    return tl.sum(sums_NC, axis=1), tl.sum(x_sums_C, axis=0)


@triton.jit
def gate_up_rows(
    x_ptr, x_scales_ptr, out_ptr, chosen_ptr, slots_ptr, table_ptr, limit, x_stride, F, D,
    SHARE: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr, ALIGNED: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[p] = silu(gate(x)) * up(x) for the expert of pair `program 0`, BLOCK_N / 2 columns of F. x [P / SHARE, D]; x_scales
    [P / SHARE]; out [P, F]. Pairs of one expert that run side by side find its weights in the cache."""
    pair = tl.program_id(0)
    rows_N = _rows_of(tl.program_id(1) * BLOCK_N, F, True, BLOCK_N)
    wait(PDL)
    slot = _slot(chosen_ptr, pair, slots_ptr, limit)
    if slot < 0:
        return
    row = (pair // SHARE).to(tl.int64)
    w_N = _weight_rows(table_ptr, slot, rows_N, WEIGHT, ALIGNED)
    INT8: tl.constexpr = KIND == "w8a8" or KIND == "w8a8_dynamic"
    sums_N, all_x = _row_sums(x_ptr + row * x_stride, w_N, D, INT8, OFFSET, BLOCK_N, BLOCK_C)
    launch_dependents(PDL)
    x_scale = 1.0
    if x_scales_ptr is not None:
        x_scale = tl.load(x_scales_ptr + row)
    y_N = _scaled(sums_N, all_x, x_scale, table_ptr, slot, rows_N, KIND, OFFSET)
    gate_F, up_F = tl.split(tl.reshape(y_N, (BLOCK_N // 2, 2)))
    at_F = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    h_F = gate_F / (1.0 + tl.exp(-gate_F)) * up_F
    tl.store(out_ptr + pair.to(tl.int64) * F + at_F, h_F.to(out_ptr.dtype.element_ty), mask=at_F < F)


@triton.jit
def down_rows(
    h_ptr, h_scales_ptr, weights_ptr, chosen_ptr, slots_ptr, table_ptr, partial_ptr, limit, partial_stride, D, F,
    K: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr, ALIGNED: tl.constexpr, WEIGHT: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial[t] += sum over k of weights[t, k] * down(h[t, k]) for token `program 0`, BLOCK_N columns of D, in the order of k.
    h [P, F]; h_scales [P]; DTYPE: the run's, to which each expert's output is rounded."""
    token = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_N
    rows_N = _rows_of(first, D, False, BLOCK_N)
    INT8: tl.constexpr = KIND == "w8a8" or KIND == "w8a8_dynamic"
    y_N = tl.zeros((BLOCK_N,), tl.float32)
    wait(PDL)
    for k in range(K):
        pair = token * K + k
        slot = _slot(chosen_ptr, pair, slots_ptr, limit)
        if slot >= 0:
            w_N = _weight_rows(table_ptr, slot, rows_N, WEIGHT, ALIGNED)
            sums_N, all_h = _row_sums(h_ptr + pair.to(tl.int64) * F, w_N, F, INT8, OFFSET, BLOCK_N, BLOCK_C)
            h_scale = 1.0
            if h_scales_ptr is not None:
                h_scale = tl.load(h_scales_ptr + pair)
            out_N = _scaled(sums_N, all_h, h_scale, table_ptr, slot, rows_N, KIND, OFFSET)
            y_N += out_N.to(DTYPE).to(tl.float32) * tl.load(weights_ptr + pair).to(tl.float32)
    launch_dependents(PDL)
    at_N = first + tl.arange(0, BLOCK_N)
    place_N = partial_ptr + token.to(tl.int64) * partial_stride + at_N
    y_N += tl.load(place_N, mask=at_N < D, other=0.0).to(tl.float32)
    tl.store(place_N, y_N.to(partial_ptr.dtype.element_ty), mask=at_N < D)


@triton.jit(do_not_specialize=["pairs", "blocks"])
def sort_pairs(
    chosen_ptr, ids_ptr, pairs_ptr, blocks_ptr, pairs, blocks, experts,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Lists the pairs by expert, and cuts the list of each held one into blocks of BLOCK_M pairs. Program e has held expert e.

    ids int64 [experts]: the held ones, ascending. out: pairs int32 [P], where pairs of experts not held leave holes; blocks int32
    [blocks, 3]: held expert or -1, first and last + 1 in the list. Block s // BLOCK_M + e is the first of the expert whose list
    starts at s: so no expert need know how many blocks the others fill, and blocks = P // BLOCK_M + experts are enough."""
    e = tl.program_id(0)
    own = tl.load(ids_ptr + e)
    after = tl.load(ids_ptr + e + 1, mask=e + 1 < experts, other=own + 1)
    at_P, at_B = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_B)
    before_P, own_P, until_P = tl.zeros((BLOCK_P,), tl.int32), tl.zeros((BLOCK_P,), tl.int32), tl.zeros((BLOCK_P,), tl.int32)
    wait(PDL)
    for start in range(0, pairs, BLOCK_P):
        inside_P = at_P < pairs - start
        expert_P = tl.load(chosen_ptr + start + at_P, mask=inside_P, other=0)
        before_P += (inside_P & (expert_P < own)).to(tl.int32)
        own_P += (inside_P & (expert_P == own)).to(tl.int32)
        until_P += (inside_P & (expert_P < after)).to(tl.int32)
    first, count, until = tl.sum(before_P, axis=0), tl.sum(own_P, axis=0), tl.sum(until_P, axis=0)
    end = first
    for start in range(0, pairs, BLOCK_P):
        inside_P = at_P < pairs - start
        expert_P = tl.load(chosen_ptr + start + at_P, mask=inside_P, other=0)
        mine_P = (inside_P & (expert_P == own)).to(tl.int32)
        tl.store(pairs_ptr + end + tl.cumsum(mine_P, axis=0) - 1, start + at_P, mask=mine_P > 0)
        end += tl.sum(mine_P, axis=0)
    begin = first // BLOCK_M + e
    block_B = tl.where(e > 0, begin, 0) + at_B
    inside_B = block_B < tl.where(e + 1 < experts, until // BLOCK_M + e + 1, blocks)
    start_B = first + (block_B - begin) * BLOCK_M
    some_B = (block_B >= begin) & (start_B < first + count)
    tl.store(blocks_ptr + block_B * 3, tl.where(some_B, e, -1), mask=inside_B)
    tl.store(blocks_ptr + block_B * 3 + 1, start_B, mask=inside_B)
    tl.store(blocks_ptr + block_B * 3 + 2, tl.minimum(start_B + BLOCK_M, first + count), mask=inside_B)


@triton.jit(do_not_specialize=["blocks"])
def tiles(
    x_ptr, x_scales_ptr, out_ptr, pairs_ptr, blocks_ptr, table_ptr, blocks, x_stride, N, C,
    SHARE: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr, ALIGNED: tl.constexpr, WEIGHT: tl.constexpr,
    GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[p] = y(x) of the expert of pair p, or silu(gate(x)) * up(x), for a block of pairs and BLOCK_N rows of the weight.
    x [P / SHARE, C]; x_scales [P / SHARE]; out [P, N]. Programs side by side have GROUP blocks of pairs and the same rows."""
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    INT8: tl.constexpr = KIND == "w8a8" or KIND == "w8a8_dynamic"
    width = GROUP * tl.cdiv(N, OUTPUTS)
    group, within = tl.program_id(0) // width, tl.program_id(0) % width
    height = tl.minimum(blocks - group * GROUP, GROUP)
    block, piece = group * GROUP + within % height, within // height
    rows_N = _rows_of(piece * BLOCK_N, N, GATED, BLOCK_N)
    wait(PDL)
    slot = tl.load(blocks_ptr + block * 3)
    if slot < 0:
        return
    first, stop = tl.load(blocks_ptr + block * 3 + 1), tl.load(blocks_ptr + block * 3 + 2)
    at_M, at_C = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    pair_M = tl.load(pairs_ptr + tl.minimum(at_M, stop - 1))
    row_M = (pair_M // SHARE).to(tl.int64)
    x_MC = x_ptr + row_M[:, None] * x_stride + at_C[None, :]
    w_CN = _weight_rows(table_ptr, slot, rows_N, WEIGHT, ALIGNED)[None, :] + at_C[:, None]
    sums_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INT8 else tl.float32)
    all_x_M = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, C, BLOCK_C):
        x = tl.load(x_MC + start, mask=at_C[None, :] < C - start, other=0.0)
        w = tl.load(w_CN + start, mask=at_C[:, None] < C - start, other=0.0)
        if INT8:
            sums_MN = tl.dot(x, w, sums_MN, out_dtype=tl.int32)
        elif KIND == "w8a8_fp8":
            sums_MN = dot_fp8(x, w, sums_MN)
        elif KIND == "w8a16":
            sums_MN = dot(x, w.to(tl.float32).to(x.dtype), sums_MN)
        else:
            sums_MN = dot(x, w, sums_MN)
        if OFFSET:
            all_x_M += tl.sum(x.to(tl.float32), axis=1)
    launch_dependents(PDL)
    x_scale = 1.0
    if x_scales_ptr is not None:
        x_scale = tl.load(x_scales_ptr + row_M)[:, None]
    y_MN = _scaled(sums_MN, all_x_M[:, None], x_scale, table_ptr, slot, rows_N[None, :], KIND, OFFSET)
    if GATED:
        gate_MN, up_MN = tl.split(tl.reshape(y_MN, (BLOCK_M, OUTPUTS, 2)))
        y_MN = gate_MN / (1.0 + tl.exp(-gate_MN)) * up_MN
    at_N = piece * OUTPUTS + tl.arange(0, OUTPUTS)
    place_MN = out_ptr + pair_M.to(tl.int64)[:, None] * N + at_N[None, :]
    tl.store(place_MN, y_MN.to(out_ptr.dtype.element_ty), mask=(at_M < stop)[:, None] & (at_N < N)[None, :])


@triton.jit
def combine(
    y_ptr, weights_ptr, chosen_ptr, slots_ptr, partial_ptr, limit, partial_stride, D,
    K: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial[t] += sum over k of weights[t, k] * y[t, k] for token `program 0`, in the order of k. y [P, D]."""
    token, at_D = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_D = at_D < D
    sums_D = tl.zeros((BLOCK_D,), tl.float32)
    wait(PDL)
    for k in range(K):
        pair = token * K + k
        held = _slot(chosen_ptr, pair, slots_ptr, limit) >= 0
        y_D = tl.load(y_ptr + pair.to(tl.int64) * D + at_D, mask=inside_D & held, other=0.0)
        sums_D += y_D.to(tl.float32) * tl.load(weights_ptr + pair, mask=held, other=0.0).to(tl.float32)
    place_D = partial_ptr + token.to(tl.int64) * partial_stride + at_D
    sums_D += tl.load(place_D, mask=inside_D, other=0.0).to(tl.float32)
    tl.store(place_D, sums_D.to(partial_ptr.dtype.element_ty), mask=inside_D)


@triton.jit
def quantize(
    x_ptr, out_ptr, scales_ptr, inputs_ptr, chosen_ptr, slots_ptr, limit, x_stride, C,
    PAIRS: tl.constexpr, SHARE: tl.constexpr, LEVELS: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x as int8 or float8, one row a program: out [rows, C], from row `program 0 // SHARE` of x. PAIRS: a row is of that pair,
    and left out where its expert is not held. LEVELS 0: with the scale and the offset of the pair's expert, inputs float32
    [experts held, 2]; otherwise with the row's own scale, max |x| / LEVELS, which goes to scales [rows] (`weights.quantized`)."""
    row, at_C = tl.program_id(0), tl.arange(0, BLOCK_C)
    wait(PDL)
    slot = 0
    if PAIRS:
        slot = _slot(chosen_ptr, row, slots_ptr, limit)
        if slot < 0:
            return
    x_C = x_ptr + (row // SHARE).to(tl.int64) * x_stride + at_C
    if LEVELS == 0:
        scale, offset = tl.load(inputs_ptr + slot * 2), tl.load(inputs_ptr + slot * 2 + 1)
    else:
        most_C = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, C, BLOCK_C):
            value_C = tl.load(x_C + start, mask=at_C < C - start, other=0.0).to(tl.float32)
            most_C = tl.maximum(most_C, tl.abs(value_C))
        most = tl.max(most_C, axis=0)
        scale, offset = tl.math.div_rn(most, LEVELS), 0.0
        scale = tl.where(scale > 0.0, scale, 1.0)
        tl.store(scales_ptr + row, scale)
    out_C = out_ptr + row.to(tl.int64) * C + at_C
    for start in range(0, C, BLOCK_C):
        value_C = tl.load(x_C + start, mask=at_C < C - start, other=0.0).to(tl.float32)
        if out_ptr.dtype.element_ty == tl.int8:
            q_C = int8_levels(value_C, scale, offset).to(tl.int8)
        else:
            q_C = fp8_levels(value_C, scale)
        tl.store(out_C + start, q_C, mask=at_C < C - start)

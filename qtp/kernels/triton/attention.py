"""Paged attention in Triton, kernels alone; `qtp.attention.triton_backend` plans and launches them.

S decoding sequences, L cached tokens of a tile, H query heads, K KV heads, d head_dim, E = d / 2 rounded up to a power of two.
A query or key is two halves [., E], which rope (arXiv 2104.09864) turns into each other. Softmax goes tile by tile with a running
maximum and sum (arXiv 2205.14135); a decoding sequence is cut over its context into splits, which
`merge` adds up (flash decoding). Softmax is in base 2: `scale` is log2(e) / sqrt(d).

Of an int8 cache the codes, exact in any dtype, are what is multiplied: the scales of keys go to the query, those of values to
the sum, and of both sums what the offsets make is taken away at the end, with the same rounded factors. The cache is [blocks,
block_size, K, d] of one layer; slot s is row s of [blocks * block_size]. The blocks of sequence s are tables[starts[s]] ...
"""

import triton
import triton.language as tl

from qtp.kernels.triton.launch import dot, int8_levels, launch_dependents, wait


@triton.jit
def _turned(first, second, cos, sin, DTYPE: tl.constexpr):
    """Both halves after rope, rounded to the run's dtype."""
    return (first * cos - second * sin).to(DTYPE).to(tl.float32), (second * cos + first * sin).to(DTYPE).to(tl.float32)


@triton.jit
def _coded(x, scale_ptr, offset_ptr, at, inside):
    return int8_levels(x, tl.load(scale_ptr + at, mask=inside, other=1.0), tl.load(offset_ptr + at, mask=inside, other=0.0))


@triton.jit
def _query(query, scale, offset):
    """What a query reads as after its own rounding to int8 (FAQuant)."""
    return (int8_levels(query, scale, offset) - offset) * scale


@triton.jit
def _new_kv(
    qkv_row, keys_ptr, values_ptr, cache_row, key_head, value_head, scale_row, ks_ptr, ko_ptr, vs_ptr, vo_ptr, cos_E, sin_E,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INT8: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rope and the writing of one token's key and value of one head. Returns their halves as they are read later, codes of an
    int8 cache."""
    at_E = tl.arange(0, HALF)
    inside_E = at_E < HEAD_DIM // 2
    low_E, high_E = at_E, HEAD_DIM // 2 + at_E
    k1_E, k2_E = _turned(
        tl.load(qkv_row + key_head * HEAD_DIM + low_E, mask=inside_E, other=0.0).to(tl.float32),
        tl.load(qkv_row + key_head * HEAD_DIM + high_E, mask=inside_E, other=0.0).to(tl.float32),
        cos_E,
        sin_E,
        DTYPE,
    )
    v1_E = tl.load(qkv_row + value_head * HEAD_DIM + low_E, mask=inside_E, other=0.0).to(tl.float32)
    v2_E = tl.load(qkv_row + value_head * HEAD_DIM + high_E, mask=inside_E, other=0.0).to(tl.float32)
    if INT8:
        k1_E = _coded(k1_E, ks_ptr, ko_ptr, scale_row + low_E, inside_E)
        k2_E = _coded(k2_E, ks_ptr, ko_ptr, scale_row + high_E, inside_E)
        v1_E = _coded(v1_E, vs_ptr, vo_ptr, scale_row + low_E, inside_E)
        v2_E = _coded(v2_E, vs_ptr, vo_ptr, scale_row + high_E, inside_E)
    kind = keys_ptr.dtype.element_ty
    tl.store(keys_ptr + cache_row + low_E, k1_E.to(kind), mask=inside_E)
    tl.store(keys_ptr + cache_row + high_E, k2_E.to(kind), mask=inside_E)
    tl.store(values_ptr + cache_row + low_E, v1_E.to(kind), mask=inside_E)
    tl.store(values_ptr + cache_row + high_E, v2_E.to(kind), mask=inside_E)
    return k1_E, k2_E, v1_E, v2_E


@triton.jit
def _clear(out_ptr, group, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    at_G, at_d = tl.arange(0, GROUP)[:, None], tl.arange(0, WIDTH)[None, :]
    zeros_Gd = tl.zeros((GROUP, WIDTH), out_ptr.dtype.element_ty)
    tl.store(out_ptr + at_G * HEAD_DIM + at_d, zeros_Gd, mask=(at_G < group) & (at_d < HEAD_DIM))


@triton.jit
def _tile(
    keys_ptr, values_ptr, table_ptr, start, end, k, kv_heads, block_size,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Both halves of the keys and of the values of cached tokens start ... start + TILE - 1 that come before `end`."""
    at_E, at_L = tl.arange(0, HALF), start + tl.arange(0, TILE)
    seen_L = at_L < end
    blocks_L = tl.load(table_ptr + at_L // block_size, mask=seen_L, other=0).to(tl.int64)
    rows_L = ((blocks_L * block_size + at_L % block_size) * kv_heads + k) * HEAD_DIM
    place_LE = rows_L[:, None] + at_E[None, :]
    seen_LE = seen_L[:, None] & (at_E < HEAD_DIM // 2)[None, :]
    k1_LE = tl.load(keys_ptr + place_LE, mask=seen_LE, other=0)
    k2_LE = tl.load(keys_ptr + place_LE + HEAD_DIM // 2, mask=seen_LE, other=0)
    v1_LE = tl.load(values_ptr + place_LE, mask=seen_LE, other=0)
    v2_LE = tl.load(values_ptr + place_LE + HEAD_DIM // 2, mask=seen_LE, other=0)
    return k1_LE, k2_LE, v1_LE, v2_LE


@triton.jit
def _attend(
    tile, low1_GE, low2_GE, zero_G, seen_L, scale, most_G, sum_G, o1_GE, o2_GE,
    GROUP: tl.constexpr, TILE: tl.constexpr, INT8: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and output with the tokens of a `_tile`."""
    k1_LE, k2_LE, v1_LE, v2_LE = tile
    if INT8:
        k1_LE, k2_LE = k1_LE.to(tl.float32).to(DTYPE), k2_LE.to(tl.float32).to(DTYPE)
        v1_LE, v2_LE = v1_LE.to(tl.float32).to(DTYPE), v2_LE.to(tl.float32).to(DTYPE)
    score_GL = dot(low2_GE, tl.trans(k2_LE), dot(low1_GE, tl.trans(k1_LE), tl.zeros((GROUP, TILE), tl.float32)))
    score_GL = tl.where(seen_L[None, :], score_GL * scale + zero_G[:, None], float("-inf"))
    more_G = tl.maximum(most_G, tl.max(score_GL, axis=1))
    p_GL = tl.exp2(score_GL - more_G[:, None]).to(DTYPE)
    fade_G = tl.exp2(most_G - more_G)
    sum_G = sum_G * fade_G + tl.sum(p_GL.to(tl.float32), axis=1)
    o1_GE = dot(p_GL, v1_LE, o1_GE * fade_G[:, None])
    o2_GE = dot(p_GL, v2_LE, o2_GE * fade_G[:, None])
    return more_G, sum_G, o1_GE, o2_GE


# What is given of numbers of sequences, slices of one tensor, begins at any 8 bytes: no kernel of its own for those at 16.
@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["lens_ptr", "starts_ptr", "tables_ptr"])
def decode(
    qkv_ptr, keys_ptr, values_ptr, out_ptr, sums_ptr, stats_ptr, lens_ptr, starts_ptr, tables_ptr, cos_ptr, sin_ptr,
    heads_ptr,
    ks_ptr, ko_ptr, vs_ptr, vo_ptr, qs_ptr, qo_ptr, scale, qkv_stride, query_heads, kv_heads, block_size, splits, window,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    AHEAD: tl.constexpr, WINDOW: tl.constexpr, INT8: tl.constexpr, QUERY_INT8: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token of sequence `program 0` (none, and zeros in out, where its length is 0) for the query heads of KV head
    `program 1`, over part `program 2` of its context. The first part writes the token's key and value, and has them from
    registers; the others are read from the cache.

    heads [K + 1]: the first query head of each KV head. SPLIT: sums [S, H, splits, 2 E] and stats [S, H, splits, 2] (maximum,
    sum), float32, take what `merge` needs; otherwise out [S, H, d] the result. AHEAD: the first tokens of a part are read before
    the query is there. GROUP: no less than the query heads of any KV head."""
    s, k, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    before = tl.load(lens_ptr + s).to(tl.int32) - 1  # tokens in the cache already
    table_ptr = tables_ptr + tl.load(starts_ptr + s)
    first = tl.load(heads_ptr + k)
    group = tl.load(heads_ptr + k + 1) - first
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(before + 1 - window, 0)
    share = tl.cdiv(tl.cdiv(before - oldest, splits), TILE) * TILE
    begin = oldest + split * share
    end = tl.minimum(begin + share, before)
    new_block = tl.load(table_ptr + tl.maximum(before, 0) // block_size).to(tl.int64)
    launch_dependents(PDL)
    if AHEAD:
        first_tile = _tile(keys_ptr, values_ptr, table_ptr, begin, end, k, kv_heads, block_size, HEAD_DIM, HALF, TILE)
    wait(PDL)
    if not SPLIT and before < 0:
        _clear(out_ptr + (s.to(tl.int64) * query_heads + first) * HEAD_DIM, group, HEAD_DIM, 2 * HALF, GROUP)
    if (before >= 0) & ((split == 0) | (begin < before)):
        at_E, at_G, at_L = tl.arange(0, HALF), tl.arange(0, GROUP), tl.arange(0, TILE)
        inside_E, inside_G = at_E < HEAD_DIM // 2, at_G < group
        cos_E = tl.load(cos_ptr + s * (HEAD_DIM // 2) + at_E, mask=inside_E, other=0.0).to(DTYPE).to(tl.float32)
        sin_E = tl.load(sin_ptr + s * (HEAD_DIM // 2) + at_E, mask=inside_E, other=0.0).to(DTYPE).to(tl.float32)
        qkv_row = qkv_ptr + s.to(tl.int64) * qkv_stride
        query_GE = qkv_row + (first + at_G)[:, None] * HEAD_DIM + at_E[None, :]
        inside_GE = inside_G[:, None] & inside_E[None, :]
        q1_GE, q2_GE = _turned(
            tl.load(query_GE, mask=inside_GE, other=0.0).to(tl.float32),
            tl.load(query_GE + HEAD_DIM // 2, mask=inside_GE, other=0.0).to(tl.float32),
            cos_E[None, :],
            sin_E[None, :],
            DTYPE,
        )
        scale_row = k * HEAD_DIM
        if QUERY_INT8:
            own_G = tl.load(qs_ptr + first + at_G, mask=inside_G, other=1.0)[:, None]
            offset_G = tl.load(qo_ptr + first + at_G, mask=inside_G, other=0.0)[:, None]
            q1_GE, q2_GE = _query(q1_GE, own_G, offset_G), _query(q2_GE, own_G, offset_G)
        if INT8:
            q1_GE *= tl.load(ks_ptr + scale_row + at_E, mask=inside_E, other=0.0)[None, :]
            q2_GE *= tl.load(ks_ptr + scale_row + HEAD_DIM // 2 + at_E, mask=inside_E, other=0.0)[None, :]
        low1_GE, low2_GE = q1_GE.to(DTYPE), q2_GE.to(DTYPE)
        zero_G = tl.zeros((GROUP,), tl.float32)  # the score of a key whose codes are all 0
        if INT8:
            q1_GE, q2_GE = low1_GE.to(tl.float32), low2_GE.to(tl.float32)
            ko1_E = tl.load(ko_ptr + scale_row + at_E, mask=inside_E, other=0.0)
            ko2_E = tl.load(ko_ptr + scale_row + HEAD_DIM // 2 + at_E, mask=inside_E, other=0.0)
            zero_G = -(tl.sum(q1_GE * ko1_E[None, :], axis=1) + tl.sum(q2_GE * ko2_E[None, :], axis=1)) * scale
        most_G = tl.full((GROUP,), float("-inf"), tl.float32)
        sum_G = tl.zeros((GROUP,), tl.float32)
        o1_GE, o2_GE = tl.zeros((GROUP, HALF), tl.float32), tl.zeros((GROUP, HALF), tl.float32)
        if split == 0:
            slot = new_block * block_size + before % block_size
            k1_E, k2_E, v1_E, v2_E = _new_kv(
                qkv_row, keys_ptr, values_ptr, (slot * kv_heads + k) * HEAD_DIM, query_heads + k, query_heads + kv_heads + k,
                scale_row, ks_ptr, ko_ptr, vs_ptr, vo_ptr, cos_E, sin_E, HEAD_DIM, HALF, INT8, DTYPE,
            )  # fmt: skip
            most_G = (tl.sum(q1_GE * k1_E[None, :], axis=1) + tl.sum(q2_GE * k2_E[None, :], axis=1)) * scale
            most_G += zero_G
            sum_G += 1.0
            o1_GE += v1_E[None, :]
            o2_GE += v2_E[None, :]
        if AHEAD and begin < end:
            most_G, sum_G, o1_GE, o2_GE = _attend(
                first_tile,
                low1_GE,
                low2_GE,
                zero_G,
                begin + at_L < end,
                scale,
                most_G,
                sum_G,
                o1_GE,
                o2_GE,
                GROUP,
                TILE,
                INT8,
                DTYPE,
            )
        for start in range(begin + TILE if AHEAD else begin, end, TILE):
            tile = _tile(keys_ptr, values_ptr, table_ptr, start, end, k, kv_heads, block_size, HEAD_DIM, HALF, TILE)
            most_G, sum_G, o1_GE, o2_GE = _attend(
                tile, low1_GE, low2_GE, zero_G, start + at_L < end, scale, most_G, sum_G, o1_GE, o2_GE, GROUP, TILE, INT8, DTYPE
            )
        if INT8:
            o1_GE -= sum_G[:, None] * tl.load(vo_ptr + scale_row + at_E, mask=inside_E, other=0.0)[None, :]
            o2_GE -= sum_G[:, None] * tl.load(vo_ptr + scale_row + HEAD_DIM // 2 + at_E, mask=inside_E, other=0.0)[None, :]
            o1_GE *= tl.load(vs_ptr + scale_row + at_E, mask=inside_E, other=0.0)[None, :]
            o2_GE *= tl.load(vs_ptr + scale_row + HEAD_DIM // 2 + at_E, mask=inside_E, other=0.0)[None, :]
        row_G = s.to(tl.int64) * query_heads + first + at_G
        if SPLIT:
            part_G = row_G * splits + split
            place_GE = sums_ptr + part_G[:, None] * (2 * HALF) + at_E[None, :]
            tl.store(place_GE, o1_GE, mask=inside_GE)
            tl.store(place_GE + HALF, o2_GE, mask=inside_GE)
            tl.store(stats_ptr + 2 * part_G, most_G, mask=inside_G)
            tl.store(stats_ptr + 2 * part_G + 1, sum_G, mask=inside_G)
        else:
            place_GE = out_ptr + row_G[:, None] * HEAD_DIM + at_E[None, :]
            kind = out_ptr.dtype.element_ty
            tl.store(place_GE, (o1_GE / sum_G[:, None]).to(kind), mask=inside_GE)
            tl.store(place_GE + HEAD_DIM // 2, (o2_GE / sum_G[:, None]).to(kind), mask=inside_GE)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["lens_ptr"])
def merge(
    sums_ptr, stats_ptr, out_ptr, lens_ptr, query_heads, splits, window,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The parts that `decode` left of sequence `program 0`, head `program 1` and half `program 2` of its columns, to out
    [S, H, d]. SPLITS >= splits."""
    s, h, half = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at_P, at_E = tl.arange(0, SPLITS), tl.arange(0, HALF)
    inside_E = at_E < HEAD_DIM // 2
    before = tl.load(lens_ptr + s).to(tl.int32) - 1
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(before + 1 - window, 0)
    share = tl.cdiv(tl.cdiv(before - oldest, splits), TILE) * TILE
    there_P = (before >= 0) & ((at_P == 0) | ((at_P < splits) & (oldest + at_P * share < before)))
    row = s.to(tl.int64) * query_heads + h
    part_P = row * splits + at_P
    launch_dependents(PDL)
    wait(PDL)
    most_P = tl.load(stats_ptr + 2 * part_P, mask=there_P, other=float("-inf"))
    sum_P = tl.load(stats_ptr + 2 * part_P + 1, mask=there_P, other=0.0)
    weight_P = tl.where(there_P, tl.exp2(most_P - tl.max(most_P, axis=0)), 0.0)
    place_PE = sums_ptr + (2 * part_P + half)[:, None] * HALF + at_E[None, :]
    parts_PE = tl.load(place_PE, mask=there_P[:, None] & inside_E[None, :], other=0.0)
    out_E = tl.sum(parts_PE * weight_P[:, None], axis=0)
    total = tl.where(before >= 0, tl.sum(sum_P * weight_P, axis=0), 1.0)
    place_E = out_ptr + row * HEAD_DIM + half * (HEAD_DIM // 2) + at_E
    tl.store(place_E, (out_E / total).to(out_ptr.dtype.element_ty), mask=inside_E)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def turn_and_write(
    qkv_ptr, keys_ptr, values_ptr, slots_ptr, cos_ptr, sin_ptr, ks_ptr, ko_ptr, vs_ptr, vo_ptr, qs_ptr, qo_ptr,
    qkv_stride, query_heads, kv_heads,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INT8: tl.constexpr, QUERY_INT8: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Rope of token `program 0`: of query head `program 1` in its place, or of the key of KV head `program 1` - H, which goes to
    the cache with its value. Over an int8 cache FAQuant's queries are rounded as they will be read."""
    t, h = tl.program_id(0), tl.program_id(1)
    at_E = tl.arange(0, HALF)
    inside_E = at_E < HEAD_DIM // 2
    launch_dependents(PDL)
    wait(PDL)
    cos_E = tl.load(cos_ptr + t * (HEAD_DIM // 2) + at_E, mask=inside_E, other=0.0).to(DTYPE).to(tl.float32)
    sin_E = tl.load(sin_ptr + t * (HEAD_DIM // 2) + at_E, mask=inside_E, other=0.0).to(DTYPE).to(tl.float32)
    qkv_row = qkv_ptr + t.to(tl.int64) * qkv_stride
    if h < query_heads:
        place_E = qkv_row + h * HEAD_DIM + at_E
        q1_E, q2_E = _turned(
            tl.load(place_E, mask=inside_E, other=0.0).to(tl.float32),
            tl.load(place_E + HEAD_DIM // 2, mask=inside_E, other=0.0).to(tl.float32),
            cos_E,
            sin_E,
            DTYPE,
        )
        if QUERY_INT8:
            own, offset = tl.load(qs_ptr + h), tl.load(qo_ptr + h)
            q1_E, q2_E = _query(q1_E, own, offset), _query(q2_E, own, offset)
        tl.store(place_E, q1_E.to(DTYPE), mask=inside_E)
        tl.store(place_E + HEAD_DIM // 2, q2_E.to(DTYPE), mask=inside_E)
    else:
        k = h - query_heads
        row = (tl.load(slots_ptr + t).to(tl.int64) * kv_heads + k) * HEAD_DIM
        _new_kv(
            qkv_row, keys_ptr, values_ptr, row, h, h + kv_heads, k * HEAD_DIM, ks_ptr, ko_ptr, vs_ptr, vo_ptr, cos_E, sin_E,
            HEAD_DIM, HALF, INT8, DTYPE,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["starts_ptr", "tables_ptr"])
def prefill(
    qkv_ptr, keys_ptr, values_ptr, out_ptr, tiles_ptr, starts_ptr, tables_ptr, kv_of_ptr,
    ks_ptr, ko_ptr, vs_ptr, vo_ptr, scale, qkv_stride, query_heads, kv_heads, block_size, window,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    INT8: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS queries, turned already, of head `program 1` over their sequence, whose keys and values are all in the cache.

    tiles [tiles, 4]: sequence, first row of the step, position of that row, rows. WIDTH: d rounded up to a power of two."""
    tile_ptr, h = tiles_ptr + 4 * tl.program_id(0), tl.program_id(1)
    launch_dependents(PDL)
    wait(PDL)
    s, row, position = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2).to(tl.int32)
    count = tl.load(tile_ptr + 3).to(tl.int32)
    k = tl.load(kv_of_ptr + h)
    table_ptr = tables_ptr + tl.load(starts_ptr + s)
    at_M, at_L, at_d = tl.arange(0, ROWS), tl.arange(0, TILE), tl.arange(0, WIDTH)
    inside_M, inside_d = at_M < count, at_d < HEAD_DIM
    inside_Md = inside_M[:, None] & inside_d[None, :]
    rows_M = row + at_M
    query_Md = tl.load(
        qkv_ptr + rows_M[:, None].to(tl.int64) * qkv_stride + h * HEAD_DIM + at_d[None, :], mask=inside_Md, other=0.0
    )
    zero_M = tl.zeros((ROWS,), tl.float32)  # the score of a key whose codes are all 0
    if INT8:
        ks_d = tl.load(ks_ptr + k * HEAD_DIM + at_d, mask=inside_d, other=0.0)
        ko_d = tl.load(ko_ptr + k * HEAD_DIM + at_d, mask=inside_d, other=0.0)
        query_Md = (query_Md.to(tl.float32) * ks_d[None, :]).to(DTYPE)
        zero_M = -tl.sum(query_Md.to(tl.float32) * ko_d[None, :], axis=1) * scale
    position_M = position + at_M
    end = position + count
    begin = 0
    if WINDOW:
        begin = tl.maximum(position + 1 - window, 0) // TILE * TILE
    whole = begin + (position + 1 - begin) // TILE * TILE  # tiles up to here are seen by every query, but for a window
    if WINDOW:
        whole = begin
    most_M = tl.full((ROWS,), float("-inf"), tl.float32)
    sum_M = tl.zeros((ROWS,), tl.float32)
    out_Md = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(begin, whole, TILE):
        at = start + at_L
        blocks_L = tl.load(table_ptr + at // block_size).to(tl.int64)
        rows_L = ((blocks_L * block_size + at % block_size) * kv_heads + k) * HEAD_DIM
        place_Ld = rows_L[:, None] + at_d[None, :]
        key_Ld = tl.load(keys_ptr + place_Ld, mask=inside_d[None, :], other=0)
        value_Ld = tl.load(values_ptr + place_Ld, mask=inside_d[None, :], other=0)
        if INT8:
            key_Ld, value_Ld = key_Ld.to(tl.float32).to(DTYPE), value_Ld.to(tl.float32).to(DTYPE)
        score_ML = dot(query_Md, tl.trans(key_Ld), tl.zeros((ROWS, TILE), tl.float32)) * scale + zero_M[:, None]
        more_M = tl.maximum(most_M, tl.max(score_ML, axis=1))
        p_ML = tl.exp2(score_ML - more_M[:, None]).to(DTYPE)
        fade_M = tl.exp2(most_M - more_M)
        sum_M = sum_M * fade_M + tl.sum(p_ML.to(tl.float32), axis=1)
        out_Md = dot(p_ML, value_Ld, out_Md * fade_M[:, None])
        most_M = more_M
    for start in range(whole, end, TILE):
        at = start + at_L
        there_L = at < end
        blocks_L = tl.load(table_ptr + at // block_size, mask=there_L, other=0).to(tl.int64)
        rows_L = ((blocks_L * block_size + at % block_size) * kv_heads + k) * HEAD_DIM
        place_Ld = rows_L[:, None] + at_d[None, :]
        there_Ld = there_L[:, None] & inside_d[None, :]
        key_Ld = tl.load(keys_ptr + place_Ld, mask=there_Ld, other=0)
        value_Ld = tl.load(values_ptr + place_Ld, mask=there_Ld, other=0)
        if INT8:
            key_Ld, value_Ld = key_Ld.to(tl.float32).to(DTYPE), value_Ld.to(tl.float32).to(DTYPE)
        seen_ML = there_L[None, :] & (at[None, :] <= position_M[:, None])
        if WINDOW:
            seen_ML = seen_ML & (at[None, :] > position_M[:, None] - window)
        score_ML = dot(query_Md, tl.trans(key_Ld), tl.zeros((ROWS, TILE), tl.float32)) * scale + zero_M[:, None]
        score_ML = tl.where(seen_ML, score_ML, float("-inf"))
        more_M = tl.maximum(most_M, tl.max(score_ML, axis=1))
        safe_M = tl.where(more_M == float("-inf"), 0.0, more_M)  # a window: nothing seen so far
        p_ML = tl.exp2(score_ML - safe_M[:, None]).to(DTYPE)
        fade_M = tl.exp2(most_M - safe_M)
        sum_M = sum_M * fade_M + tl.sum(p_ML.to(tl.float32), axis=1)
        out_Md = dot(p_ML, value_Ld, out_Md * fade_M[:, None])
        most_M = more_M
    out_Md /= tl.where(inside_M, sum_M, 1.0)[:, None]
    if INT8:
        out_Md -= tl.load(vo_ptr + k * HEAD_DIM + at_d, mask=inside_d, other=0.0)[None, :]
        out_Md *= tl.load(vs_ptr + k * HEAD_DIM + at_d, mask=inside_d, other=0.0)[None, :]
    place_Md = (rows_M[:, None].to(tl.int64) * query_heads + h) * HEAD_DIM + at_d[None, :]
    tl.store(out_ptr + place_Md, out_Md.to(out_ptr.dtype.element_ty), mask=inside_Md)

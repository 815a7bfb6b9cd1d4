"""The last linear layer in floats, and the best of its outputs. T tokens, D hidden, V rows of the vocabulary.

Logits are sums in float32, never rounded to the run's dtype. One that is not a number comes before all others, as in torch's max
and topk, so that who looks for the best sees NaN for its value. Nothing here waits for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtp.kernels.triton.launch import dot, launch_dependents, options, read_once, wait

_LOGITS, _KEYS, _BEST = range(3)
_LOGITS_FORM, _KEYS_FORM, _BEST_FORM = tl.constexpr(_LOGITS), tl.constexpr(_KEYS), tl.constexpr(_BEST)
_NOWHERE = tl.constexpr(2**31 - 1)

_ONE = (16, 128, 2)  # rows and columns at a time, warps; for one token
_SOME = {16: (64, 128, 4, 4), 32: (64, 128, 4, 4), 64: (64, 128, 4, 4), 128: (128, 64, 8, 3)}  # by tokens; and stages
_MERGED = 16384  # candidates of a token that are looked at at a time


@triton.jit
def _key(values):
    """int32 that are ordered as the values are: -0 as 0, and NaN above all."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(values != values, _NOWHERE, ordered)


@triton.jit
def _value(keys):
    """The float32 of a `_key`."""
    bits = keys ^ ((keys >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _give(logits_VT, rows_V, tokens_T, T, V, out_ptr, columns_ptr, out_stride, FORM: tl.constexpr):
    """LOGITS: stores them; KEYS: int64 ordered as they are, the lower column first among equals; BEST: the key and the column of
    the best of these rows. Rows from V on do not exist."""
    there_V, there_T = rows_V < V, tokens_T < T
    if FORM == _BEST_FORM:
        keys_VT = tl.where(there_V[:, None], _key(logits_VT), -_NOWHERE - 1)
        most_T = tl.max(keys_VT, axis=0)
        column_T = tl.min(tl.where(keys_VT == most_T[None, :], rows_V[:, None], _NOWHERE), axis=0)
        place_T = tokens_T.to(tl.int64) * out_stride + tl.program_id(0)
        tl.store(out_ptr + place_T, most_T, mask=there_T)
        tl.store(columns_ptr + place_T, column_T, mask=there_T)
    else:
        out_VT = out_ptr + tokens_T[None, :].to(tl.int64) * out_stride + rows_V[:, None]
        if FORM == _KEYS_FORM:
            lower_first_V1 = (rows_V ^ _NOWHERE)[:, None].to(tl.int64)
            keys_VT = (_key(logits_VT).to(tl.int64) << 32) | lower_first_V1
            tl.store(out_VT, keys_VT, mask=there_V[:, None] & there_T[None, :])
        else:
            tl.store(out_VT, logits_VT, mask=there_V[:, None] & there_T[None, :])


@triton.jit
def _one_token(
    x_ptr,
    w_ptr,
    out_ptr,
    columns_ptr,
    V,
    D,
    w_stride,
    out_stride,
    FORM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of the weight are fetched one round ahead."""
    rows_V, cols_D = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    w_V1 = w_ptr + (tl.minimum(rows_V, V - 1).to(tl.int64) * w_stride)[:, None]
    w_VD = read_once(w_V1, cols_D, D)
    sums_VD = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    wait(PDL)
    for start in range(0, D, BLOCK_D):
        at_D = start + cols_D
        x_D = tl.load(x_ptr + at_D, mask=at_D < D, other=0.0).to(tl.float32)
        next_VD = read_once(w_V1, at_D + BLOCK_D, D)
        sums_VD += w_VD.to(tl.float32) * x_D[None, :]
        w_VD = next_VD
    launch_dependents(PDL)
    logits_V1 = tl.sum(sums_VD, axis=1)[:, None]
    _give(logits_V1, rows_V, tl.arange(0, 1), 1, V, out_ptr, columns_ptr, out_stride, FORM)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["columns_ptr"])
def _some_tokens(
    x_ptr,
    w_ptr,
    out_ptr,
    columns_ptr,
    T,
    V,
    D,
    x_stride,
    w_stride,
    out_stride,
    FORM: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """EVEN: BLOCK_D divides D. Programs that follow each other have the same rows."""
    rows_V, cols_D = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    tokens_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    w_V1 = w_ptr + (tl.minimum(rows_V, V - 1).to(tl.int64) * w_stride)[:, None]
    x_1T = x_ptr + (tl.minimum(tokens_T, T - 1).to(tl.int64) * x_stride)[None, :]
    sums_VT = tl.zeros((BLOCK_V, BLOCK_T), tl.float32)
    wait(PDL)
    for start in range(0, D, BLOCK_D):
        at_D = start + cols_D
        if EVEN:
            x_DT, w_VD = tl.load(x_1T + at_D[:, None]), tl.load(w_V1 + at_D[None, :])
        else:
            x_DT = tl.load(x_1T + at_D[:, None], mask=at_D[:, None] < D, other=0.0)
            w_VD = tl.load(w_V1 + at_D[None, :], mask=at_D[None, :] < D, other=0.0)
        sums_VT = dot(w_VD, x_DT, sums_VT)
    launch_dependents(PDL)
    _give(sums_VT, rows_V, tokens_T, T, V, out_ptr, columns_ptr, out_stride, FORM)


@triton.jit(do_not_specialize_on_alignment=["columns_ptr"])
def _merge(keys_ptr, columns_ptr, value_ptr, column_ptr, B, BLOCK_B: tl.constexpr, PDL: tl.constexpr):
    """The best of a token's B blocks, whose rows ascend."""
    token, at_B = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_B)
    most_B = tl.full((BLOCK_B,), -_NOWHERE - 1, tl.int32)
    lowest_B = tl.full((BLOCK_B,), _NOWHERE, tl.int32)
    wait(PDL)
    for start in range(0, B, BLOCK_B):
        inside_B = start + at_B < B
        keys_B = tl.load(keys_ptr + token * B + start + at_B, mask=inside_B, other=-_NOWHERE - 1)
        columns_B = tl.load(columns_ptr + token * B + start + at_B, mask=inside_B, other=_NOWHERE)
        lowest_B = tl.where(keys_B > most_B, columns_B, lowest_B)
        most_B = tl.maximum(keys_B, most_B)
    most = tl.max(most_B, axis=0)
    tl.store(value_ptr + token, _value(most))
    tl.store(column_ptr + token, tl.min(tl.where(most_B == most, lowest_B, _NOWHERE), axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["S"])
def _follow(tokens_ptr, rows_ptr, last_ptr, out_ptr, S, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at_S = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_S = at_S < S
    launch_dependents(PDL)
    wait(PDL)
    row_S = tl.load(rows_ptr + at_S, mask=inside_S, other=-1)
    last_S = tl.load(last_ptr + row_S, mask=row_S >= 0, other=0)
    given_S = tl.load(tokens_ptr + at_S, mask=inside_S, other=0)
    tl.store(out_ptr + at_S, tl.where(row_S >= 0, last_S, given_S), mask=inside_S)


def follow(tokens: Tensor, rows: Tensor, last: Tensor, out: Tensor) -> None:
    """out[s] = last[rows[s]], or tokens[s] where rows[s] is below 0. All int64; tokens, rows, out [S]."""
    block = min(1024, triton.next_power_of_2(len(out)))
    _follow[(triton.cdiv(len(out), block),)](tokens, rows, last, out, len(out), BLOCK=block, **options(out, 1, 1))


class VocabularyHead:
    """`interface.Head` of a float weight [V, D], whose rows may lie apart."""

    __slots__ = ("weight",)

    def __init__(self, weight: Tensor) -> None:
        assert weight.stride(1) == 1 or min(weight.shape) < 2, "a weight is row-major"
        self.weight = weight

    def logits(self, x: Tensor) -> Tensor:
        """x W^T, [T, V] float32. x [T, D], whose rows may lie apart, in the dtype of the weight."""
        out = x.new_empty(len(x), len(self.weight), dtype=torch.float32)
        if out.numel():
            self._run(x, out, None, len(self.weight), _LOGITS)
        return out

    def best(self, x: Tensor, count: int, allowed: int) -> tuple[Tensor, Tensor]:
        """See `interface.Head`; NaN comes first. For a count of 1 the logits are never written."""
        tokens = len(x)
        if not tokens:
            return x.new_empty(0, count, dtype=torch.float32), x.new_empty(0, count, dtype=torch.int64)
        if count > 1:
            keys = x.new_empty(tokens, allowed, dtype=torch.int64)
            self._run(x, keys, None, allowed, _KEYS)
            return _decoded(keys, count)
        blocks = triton.cdiv(allowed, _sizes(tokens, x.dtype)[1])
        keys, columns = x.new_empty(2, tokens, blocks, dtype=torch.int32)
        self._run(x, keys, columns, allowed, _BEST)
        value, column = x.new_empty(tokens, 1, dtype=torch.float32), x.new_empty(tokens, 1, dtype=torch.int64)
        block = min(_MERGED, triton.next_power_of_2(max(blocks, 16)))
        warps = min(32, max(1, block // 512))
        _merge[(tokens,)](keys, columns, value, column, blocks, BLOCK_B=block, **options(x, warps, 1))
        return value, column

    def _run(self, x: Tensor, out: Tensor, columns: Tensor | None, rows: int, form: int) -> None:
        weight, (tokens, width) = self.weight, x.shape
        assert width == weight.shape[1], (x.shape, weight.shape)
        assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
        assert x.stride(1) == 1 or min(x.shape) < 2, "x is row-major"
        block_t, block_v, block_d, warps, stages = _sizes(tokens, x.dtype)
        blocks, place = triton.cdiv(rows, block_v), (x, weight, out, columns)
        if tokens == 1:
            sizes: dict[str, int] = {"BLOCK_V": block_v, "BLOCK_D": min(block_d, triton.next_power_of_2(max(width, 16)))}
            shape = (rows, width, weight.stride(0), out.stride(0))
            _one_token[(blocks,)](*place, *shape, FORM=form, **sizes, **options(x, warps, 1))
            return
        block_d = min(block_d, triton.next_power_of_2(max(width, 16)))
        _some_tokens[(blocks, triton.cdiv(tokens, block_t))](
            *place,
            *(tokens, rows, width, x.stride(0), weight.stride(0), out.stride(0)),
            FORM=form,
            EVEN=width % block_d == 0,
            BLOCK_T=block_t,
            BLOCK_V=block_v,
            BLOCK_D=block_d,
            **options(x, warps, stages),
        )


def _sizes(tokens: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Tokens, rows and columns at a time, warps and stages."""
    if tokens == 1:
        return 1, *_ONE, 1
    block_t = min(128, max(16, triton.next_power_of_2(tokens)))
    rows, columns, warps, stages = _SOME[block_t]
    return block_t, rows, columns // 2 if dtype == torch.float32 else columns, warps, stages


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `torch_kernels.top`, of scores [T, V] float32, without waiting for the device."""
    if count == 1:
        return scores.max(dim=1, keepdim=True)
    bits = (scores + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(scores.isnan(), 0x7FFFFFFF)
    lower_first = 0x7FFFFFFF - torch.arange(scores.shape[1], dtype=torch.int64, device=scores.device)
    return _decoded((ordered.to(torch.int64) << 32) | lower_first, count)


def _decoded(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best values and columns by their int64 keys, which all differ."""
    best = keys.topk(count, dim=1).values
    ordered = (best >> 32).to(torch.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values, 0x7FFFFFFF - (best & 0x7FFFFFFF)

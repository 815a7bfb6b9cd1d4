"""The arithmetic of quantized weights from torch's own operations, on any device. T tokens, D columns, N outputs, G groups.

Integer sums are exact, floats are added in float32, and each result is rounded once.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from collectives.communicator import Communicator
from qtp.kernels.interface import Cuts
from qtp.weights.codec import decompress
from qtp.weights.quantized import W8A8, W8A8FP8, W8A8SC, W8A16, Float, Packed, Quantized, Unscaled, W8A8Dynamic

_EXACT = 1024  # columns of which every sum of products of int8 is below 2^24, and so exact in float32
_ROWS = 8192  # that are brought to float32 at a time
FP8_MAX = 448.0  # the largest of float8 e4m3

Product = Callable[[Tensor, Tensor], Tensor]  # x W^T of float8 [T, D] and [N, D], [T, N] float32


def fp8_product(x_TD: Tensor, w_ND: Tensor) -> Tensor:
    """A `Product`; products of two float8 are exact in float32."""
    x = x_TD.float()
    return torch.cat([F.linear(x, w.float()) for w in w_ND.split(_ROWS)], dim=1)


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, divided in float32, as float8 e4m3, half to even. It has no infinity: what is beyond its range would be NaN, and
    is held within. scale: see `quantize`."""
    return (x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def int_product(x_TD: Tensor, w_ND: Tensor) -> Tensor:
    """x W^T of int8, exact: [T, N] int32."""
    total_TN = torch.zeros(x_TD.shape[0], w_ND.shape[0], dtype=torch.int32, device=x_TD.device)
    for x, w in zip(x_TD.split(_EXACT, dim=1), w_ND.split(_EXACT, dim=1), strict=True):
        total_TN += F.linear(x.float(), w.float()).to(torch.int32)
    return total_TN


def quantize(x: Tensor, scale: Tensor, offset: float = 0.0) -> Tensor:
    """clamp(round(x / scale + offset)) to int8, half to even, in float32. scale is a tensor: instead of dividing by a number CUDA
    multiplies with its inverse."""
    return (x.float() / scale + offset).round_().clamp_(-128, 127).to(torch.int8)


def token_maxima(x_TD: Tensor, across: Communicator | None = None) -> Tensor:
    """max |x| of each token over the columns of all ranks: [T] float32. Every rank of `across` must call it."""
    return joint_maxima(x_TD.abs().amax(dim=1).float() if x_TD.shape[1] else x_TD.new_zeros(len(x_TD)).float(), across)


def joint_maxima(maxima_T: Tensor, across: Communicator | None) -> Tensor:
    if across is None or across.size == 1:
        return maxima_T
    return across.all_gather(maxima_T[None]).amax(dim=0)


def token_scales(maxima_T: Tensor) -> Tensor:
    """s_x of W8A8Dynamic."""
    return torch.where(maxima_T > 0, maxima_T / torch.full_like(maxima_T, 127), 1.0)


def fp8_token_scales(maxima_T: Tensor) -> Tensor:
    """s_x of W8A8FP8; 1 too where max |x| / 448 is 0 in float32, since 0 / 0 is not a number."""
    scales = maxima_T / torch.full_like(maxima_T, FP8_MAX)
    return torch.where(scales > 0, scales, 1.0)


def quantized_input(
    weight: W8A8 | W8A8SC | W8A8Dynamic | W8A8FP8, x_TD: Tensor, across: Communicator | None = None
) -> tuple[Tensor, Tensor]:
    """x as int8, or float8, and the scale of the sums: float32, [N] or [T, N]."""
    if isinstance(weight, W8A8 | W8A8SC):
        scale = torch.full((), weight.input_scale, dtype=torch.float32, device=x_TD.device)
        return quantize(x_TD, scale, weight.input_offset), weight.deq_scale
    if isinstance(weight, W8A8FP8):
        scale_T1 = fp8_token_scales(token_maxima(x_TD, across))[:, None]
        return to_fp8(x_TD, scale_T1), scale_T1 * weight.weight_scale
    scale_T1 = token_scales(token_maxima(x_TD, across))[:, None]
    return quantize(x_TD, scale_T1), scale_T1 * weight.weight_scale


def unscaled(weight: Quantized, x_TD: Tensor, across: Communicator | None = None) -> Unscaled:
    """The sum over this rank's columns with its quant_bias; a float bias is left out. Not for W8A8FP8 and W8A16, whose
    sums are in floats."""
    weight = expanded(weight)
    assert not isinstance(weight, W8A8FP8 | W8A16), weight
    x_q, scale = quantized_input(weight, x_TD, across)
    total_TN = int_product(x_q, weight.weight)
    if isinstance(weight, W8A8):
        total_TN += weight.quant_bias
    return Unscaled(total_TN, scale, x_TD.dtype)


def expanded(weight: Quantized) -> W8A8 | W8A8Dynamic | W8A8FP8 | W8A16:
    """The weight, not compressed."""
    if not isinstance(weight, W8A8SC):
        return weight
    whole = decompress(weight.data.cpu(), weight.index.cpu(), weight.info.cpu()).to(weight.data.device)
    return W8A8(whole, weight.input_scale, weight.input_offset, weight.quant_bias, weight.deq_scale)


def dequantized(weight: W8A16) -> Tensor:
    """[N, D] float32."""
    columns = weight.shape[1]
    group = (weight.phase + torch.arange(columns, device=weight.weight.device)) // (weight.group or weight.phase + columns + 1)
    return (weight.weight.float() - weight.offset[:, group]) * weight.scale[:, group]


def columns_of(weight: W8A16, start: int, stop: int) -> W8A16:
    """Columns start ... stop - 1, with no bias."""
    first, last = 0, 1
    if weight.group:
        first, last = (weight.phase + start) // weight.group, -(-(weight.phase + stop) // weight.group)
    scale, offset = weight.scale[:, first:last], weight.offset[:, first:last]
    phase = weight.phase + start - first * weight.group
    return W8A16(weight.weight[:, start:stop], scale, offset, None, weight.group, phase)


def wide(
    weight: Quantized | Float | Packed, x_TD: Tensor, across: Communicator | None = None, product: Product = fp8_product
) -> Tensor:
    """y before it is rounded to the dtype of x: [T, N] float32. across: the ranks that hold the other columns of a W8A8FP8; y is
    then a partial sum."""
    match weight:
        case Packed():
            return torch.cat([wide(part, x_TD) for part in weight.parts], dim=1)
        case W8A8SC():
            return wide(expanded(weight), x_TD)
        case Float():
            return F.linear(x_TD, weight.weight, weight.bias).float()
        case W8A8FP8():
            x_q, scale = quantized_input(weight, x_TD, across)
            y_TN = product(x_q, weight.weight).mul_(scale)
        case W8A16():
            pieces = [slice(row, row + _ROWS) for row in range(0, max(1, weight.shape[0]), _ROWS)]
            y_TN = torch.cat([F.linear(x_TD.float(), dequantized(_rows_of(weight, rows))) for rows in pieces], dim=1)
        case _:
            exact = unscaled(weight, x_TD)
            y_TN = exact.total.float() * exact.scale
    return y_TN if isinstance(weight, W8A8) or weight.bias is None else y_TN + weight.bias.float()


def _rows_of(weight: W8A16, rows: slice) -> W8A16:
    return W8A16(weight.weight[rows], weight.scale[rows], weight.offset[rows], None, weight.group, weight.phase)


def leaves(
    weight: Quantized, x_TD: Tensor, cuts: Cuts, across: Communicator | None = None, product: Product = fp8_product
) -> Tensor:
    """The sum of each leaf: [leaves, T, N] float32."""
    weight = expanded(weight)
    if isinstance(weight, W8A16):
        return torch.stack([wide(columns_of(weight, a, b), x_TD[:, a:b]) for a, b in pairwise(cuts)])
    x_q, scale = quantized_input(weight, x_TD, across)
    sums = product if isinstance(weight, W8A8FP8) else int_product
    totals = torch.stack([sums(x_q[:, a:b], weight.weight[:, a:b]) for a, b in pairwise(cuts)])
    if isinstance(weight, W8A8):
        totals[first_leaf(cuts)] += weight.quant_bias
    return totals.float() * scale


def leaves_of(weight: W8A8 | W8A8Dynamic | W8A8FP8 | W8A16, cuts: Cuts) -> list[W8A8 | W8A8Dynamic | W8A8FP8 | W8A16]:
    """The columns of each leaf; of W8A8 only the first one has quant_bias."""
    if isinstance(weight, W8A16):
        return [columns_of(weight, a, b) for a, b in pairwise(cuts)]
    pieces = [weight.weight[:, a:b] for a, b in pairwise(cuts)]
    if not isinstance(weight, W8A8):
        return [type(weight)(w, weight.weight_scale, None) for w in pieces]
    biases = [torch.zeros_like(weight.quant_bias)] * len(pieces)
    biases[first_leaf(cuts)] = weight.quant_bias
    each = zip(pieces, biases, strict=True)
    return [W8A8(w, weight.input_scale, weight.input_offset, bias, weight.deq_scale) for w, bias in each]


def side_by_side(ops: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """The outputs of the parts of a packed weight, one behind the other."""
    return lambda x: torch.cat([op(x) for op in ops], dim=1)


def first_leaf(cuts: Cuts) -> int:
    """The leaf that has the first column."""
    return next((leaf for leaf, stop in enumerate(cuts[1:]) if stop > 0), 0)

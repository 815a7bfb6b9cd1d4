"""Scales, offsets and rounding, by msModelSlim's formulas, and in float8 likewise. N outputs, K input columns, G groups of
columns. int8 is -128 ... 127, float8 e4m3 -448 ... 448.

What is stored in float32 is computed in float32, so that what is rounded by a scale is what is read with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtp.kernels.torch_quantized import FP8_MAX, to_fp8

BINS = 2048
_SHRINK = 64  # ranges tried on the way to half of each end
_BETTER = 0.9  # of the error, below which act_method 3 leaves the whole range
_INT32 = 2.0**30


@dataclass(frozen=True, slots=True)
class Activation:
    """x_q = clamp(round(x / scale + offset), -128, 127); x = (x_q - offset) * scale."""

    scale: float
    offset: float

    def through(self, x: Tensor) -> Tensor:
        """x after the round through int8."""
        return ((x / self.scale + self.offset).round().clamp(-128, 127) - self.offset) * self.scale


def activation(low: float, high: float) -> Activation:
    """Of a tensor with values from low to high, and 0: asymmetric."""
    scale, offset = channels(torch.tensor([low]), torch.tensor([high]))
    return Activation(scale.item(), offset.item())


def channels(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, offset) of each channel, float32: of values from low to high, 0 among them, which is represented exactly."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = _positive((high - low) / 255)
    return scale, ((-low / scale).round() - 128).clamp(-128, 127)


def heads(low: Tensor, high: Tensor, count: int) -> Tensor:
    """The symmetric scale of each of `count` heads, [count, 1] float32, from the ranges of channels."""
    return _positive(torch.maximum(low.abs(), high.abs()).float().view(count, -1).amax(1, keepdim=True) / 127)


def rows_symmetric(w_NK: Tensor) -> Tensor:
    """Scales [N, 1]: max |w| / 127."""
    return _positive(w_NK.abs().amax(1, keepdim=True) / 127)


def rows_fp8(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """W8A8_FP8: (float8 e4m3 [N, K], scales [N, 1]), where a scale is max |w| / 448."""
    scales = _positive(w_NK.abs().amax(1, keepdim=True) / FP8_MAX)
    return to_fp8(w_NK, scales), scales


def groups(w_NK: Tensor, size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """W8A16: int8 [N, K], scale and offset [N, G] float32, of `size` columns each (0: all): w = (q - offset) * scale."""
    parts = torch.split(w_NK, size or w_NK.shape[1], dim=1)
    if symmetric:
        scales = torch.cat([rows_symmetric(part) for part in parts], 1)
        rounded = [(part / scales[:, g, None]).round_().to(torch.int8) for g, part in enumerate(parts)]
        return torch.cat(rounded, 1), scales, torch.zeros_like(scales)
    scales, offsets = channels(torch.stack([p.amin(1) for p in parts], 1), torch.stack([p.amax(1) for p in parts], 1))
    rounded = [
        (part / scales[:, g, None]).add_(offsets[:, g, None]).round_().clamp_(-128, 127).to(torch.int8)
        for g, part in enumerate(parts)
    ]
    return torch.cat(rounded, 1), scales, offsets


def ungrouped(q_NK: Tensor, scales: Tensor, offsets: Tensor, size: int) -> Tensor:
    """What `groups` made, in float32."""
    parts = torch.split(q_NK, size or q_NK.shape[1], dim=1)
    return torch.cat([(p.float() - offsets[:, g, None]) * scales[:, g, None] for g, p in enumerate(parts)], 1)


def static_scales(scales: Tensor, bias: Tensor | None, x: Activation) -> Tensor:
    """Weight scales [N, 1], larger where a bias would not fit into 31 bits otherwise."""
    if bias is None:
        return scales
    return torch.maximum(scales, bias.float().abs()[:, None] / (x.scale * _INT32))


def static(q_NK: Tensor, scales: Tensor, bias: Tensor | None, x: Activation) -> tuple[Tensor, Tensor]:
    """(deq_scale float32 [N], quant_bias int32 [N]) of int8 weights with scales [N, 1]:
    y = (x_q q^T + quant_bias) * deq_scale."""
    deq = (scales[:, 0] * x.scale).float()
    quant_bias = -x.offset * q_NK.sum(1, dtype=torch.int64).double()
    if bias is not None:
        quant_bias = quant_bias + bias.double() / deq.double()
    return deq, quant_bias.round().to(torch.int32)


def scale_bits(deq: Tensor, dtype: str) -> Tensor:
    """deq_scale as it is stored: float32, or for float16 models its bits as an int32, widened to int64."""
    return deq.view(torch.int32).to(torch.int64) if dtype == "float16" else deq


def best_range(counts: Tensor, low: float, high: float, method: int) -> tuple[float, float]:
    """The range, at most low to high, of least square error for values whose histogram over [low, high] has these counts [BINS];
    each end is drawn in by itself, the upper first. method: as `Settings.act_method`."""
    if method == 1 or low == high:
        return low, high
    edges = torch.linspace(low, high, len(counts) + 1, dtype=torch.float64)
    centres, weight = (edges[1:] + edges[:-1]) / 2, counts.double()

    def error(a: float, b: float) -> float:
        return float((weight * (centres - activation(a, b).through(centres)).square()).sum())

    shares = [1 - i / (2 * _SHRINK) for i in range(_SHRINK + 1)]
    whole = error(low, high)
    best_high = min((high * share for share in shares), key=lambda b: error(low, b)) if high > 0 else high
    best_low = min((low * share for share in shares), key=lambda a: error(a, best_high)) if low < 0 else low
    if method == 3 and error(best_low, best_high) > _BETTER * whole:
        return low, high
    return best_low, best_high


def histogram(x: Tensor, low: float, high: float) -> Tensor:
    """Counts int64 [BINS] of values over [low, high], which hold them all."""
    if high <= low:
        return torch.zeros(BINS, dtype=torch.int64)
    place = ((x.flatten().double() - low) * (BINS / (high - low))).long().clamp(0, BINS - 1)
    return torch.bincount(place, minlength=BINS)


def _positive(scale: Tensor) -> Tensor:
    """1 in place of 0, where all values are 0 and any scale will do."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))

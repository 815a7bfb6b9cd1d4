"""W8A8S: int8 weights that are of 4 bits but for a protected share. N outputs, K input columns.

All values of a row have one scale, which suits the many: a few large ones lie outside -8 ... 7 and keep the 8 bits of their type.
So the step is that of 4 bits over the bulk of a row, and not over its largest value.
"""

import torch
from torch import Tensor

LOW, HIGH = -8, 7
_REACH = 7.5  # steps from 0 to where 4 bits end, on the average of both sides
_CANDIDATES = 24
_LEAST = 0.4  # of the scale that holds all but the outliers; the smallest that is tried


def low_bit(
    w_NK: Tensor, importance_K: Tensor | None, fraction: float, sigma_factor: float | None, *, search: bool, protect: bool
) -> tuple[Tensor, Tensor]:
    """(q int8 [N, K], scale float32 [N, 1]): w is about q * scale; at most `fraction` of all values of q are outside -8 ... 7.

    Outliers are claimed in units of their row's root mean square: the `fraction` largest, or with sigma_factor those of them that
    are beyond so many; the rest of the share goes to what loses most without. search: the scale of each row is the one of least
    error, each column weighed by `importance_K`, the mean square of its input; otherwise it just holds what is no outlier.
    protect False: there are none."""
    weigh = (
        torch.ones(w_NK.shape[1]) if importance_K is None else importance_K.float() / importance_K.float().mean().clamp(min=1e-30)
    )
    budget = int(fraction * w_NK.numel()) if protect else 0
    spread = w_NK.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
    beyond = _threshold(w_NK, spread, budget, sigma_factor)
    outlier = w_NK.abs() > beyond * spread
    inner = torch.where(outlier, 0, w_NK.abs()).amax(1, keepdim=True)
    whole = torch.where(inner > 0, inner, spread) / _REACH
    whole = torch.maximum(whole, w_NK.abs().amax(1, keepdim=True) / 127 if protect else whole)
    scale = _searched(w_NK, weigh, outlier, whole) if search else whole
    return _rounded(w_NK, weigh, scale, budget), scale


def _threshold(w_NK: Tensor, spread: Tensor, budget: int, sigma_factor: float | None) -> float:
    """Beyond how many spreads of its row a value is an outlier."""
    if budget < 1:
        return float("inf")
    bins, top = 4096, 32.0
    counts = torch.zeros(bins, dtype=torch.int64)
    for w, own in zip(torch.split(w_NK, 256), torch.split(spread, 256), strict=True):
        counts += torch.bincount((w.abs() / own * (bins / top)).long().clamp(max=bins - 1).flatten(), minlength=bins)
    above = counts.flip(0).cumsum(0).flip(0)  # values in this bin or higher
    fits = (above <= budget).nonzero()
    reached = (int(fits[0]) if len(fits) else bins) * top / bins
    return max(reached, sigma_factor or 0.0)


def _searched(w_NK: Tensor, weigh: Tensor, outlier: Tensor, whole: Tensor) -> Tensor:
    best, least = whole.clone(), torch.full_like(whole, float("inf"))
    for i in range(_CANDIDATES + 1):
        scale = whole * (1 - (1 - _LEAST) * i / _CANDIDATES)
        q = (w_NK / scale).round()
        q = torch.where(outlier, q.clamp(-128, 127), q.clamp(LOW, HIGH))
        error = ((w_NK - q * scale).square() * weigh).sum(1, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _rounded(w_NK: Tensor, weigh: Tensor, scale: Tensor, budget: int) -> Tensor:
    full = (w_NK / scale).round().clamp(-128, 127)
    clipped = full.clamp(LOW, HIGH)
    at = (full != clipped).flatten().nonzero()[:, 0]
    if len(at) > budget:
        own = at // w_NK.shape[1]
        w, s = w_NK.flatten()[at], scale[:, 0][own]
        f, c = full.flatten()[at], clipped.flatten()[at]
        gain = ((w - c * s).square() - (w - f * s).square()) * weigh[at % w_NK.shape[1]]
        at = at[gain.sort(descending=True, stable=True).indices[:budget]]
    clipped.view(-1)[at] = full.flatten()[at]
    return clipped.to(torch.int8)

"""W8A8S: int8 weights that are of 4 bits but for a protected share. N outputs, K input columns.

All values of a row have one scale, which suits the many: a few large ones lie outside -8 ... 7 and keep the 8 bits of their type.
So the step is that of 4 bits over the bulk of a row, and not over its largest value.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOW, HIGH = -8, 7
_REACH = 7.5  # steps from 0 to where 4 bits end, on the average of both sides
_CANDIDATES = 24
_LEAST = 0.4  # of the scale that holds all but the outliers; the smallest that is tried
_BINS, _TOP = 4096, 32.0  # of |w| / its row's spread

Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def low_bit(
    pieces: Sequence[Callable[[], Tensor]],
    importance_K: Tensor | None,
    fraction: float,
    sigma_factor: float | None,
    *,
    search: bool,
    protect: bool,
    run: Run = map,
) -> tuple[Tensor, Tensor]:
    """(q int8 [N, K], scale float32 [N, 1]): w is about q * scale; at most `fraction` of all values of q are outside -8 ... 7.

    pieces: give w float32 by blocks of rows, each asked for twice at most, through `run`, a `map` that may have threads. Outliers
    are claimed in units of their row's root mean square: the `fraction` largest of all rows, or with sigma_factor those of them
    that are beyond so many; the rest of the share goes to what loses most without. search: the scale of each row is the one of
    least error, each column weighed by `importance_K`, the mean square of its input; otherwise it just holds what is no outlier.
    protect False: there are none."""
    beyond = _threshold(list(run(lambda piece: _counts(piece()), pieces)), fraction, sigma_factor) if protect else float("inf")
    weigh = None if importance_K is None else importance_K.float() / importance_K.float().mean().clamp(min=1e-30)
    coded = list(run(lambda piece: _coded(piece(), weigh, beyond, search, protect), pieces))
    q = torch.cat([piece.q for piece in coded])
    budget = int(fraction * q.numel()) if protect else 0
    gains = torch.cat([piece.gains for piece in coded])
    kept = torch.ones(len(gains), dtype=torch.bool)
    if len(gains) > budget:
        kept[gains.sort(descending=True, stable=True).indices[budget:]] = False
    sizes = [len(piece.q) for piece in coded], [len(piece.gains) for piece in coded]
    for piece, part, own in zip(coded, torch.split(q, sizes[0]), torch.split(kept, sizes[1]), strict=True):
        part.view(-1)[piece.at[own]] = piece.full[own]
    return q, torch.cat([piece.scale for piece in coded])


@dataclass(frozen=True, slots=True)
class _Coded:
    """A block of rows within -8 ... 7. Of the values that were clipped for it, by their place in the block: what they would be
    with 8 bits, int8, and how much square error that would save."""

    q: Tensor
    scale: Tensor
    at: Tensor
    full: Tensor
    gains: Tensor


def _spread(w: Tensor) -> Tensor:
    return w.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)


def _counts(w: Tensor) -> Tensor:
    """A histogram of |w| in spreads."""
    return torch.bincount((w.abs() / _spread(w) * (_BINS / _TOP)).long().clamp(max=_BINS - 1).flatten(), minlength=_BINS)


def _threshold(counts: Sequence[Tensor], fraction: float, sigma_factor: float | None) -> float:
    """Beyond how many spreads of its row a value is an outlier."""
    total = torch.stack(tuple(counts)).sum(0)
    budget = int(fraction * int(total.sum()))
    if budget < 1:
        return float("inf")
    above = total.flip(0).cumsum(0).flip(0)  # values in this bin or higher
    fits = (above <= budget).nonzero()
    reached = (int(fits[0]) if len(fits) else _BINS) * _TOP / _BINS
    return max(reached, sigma_factor or 0.0)


def _coded(w: Tensor, weigh: Tensor | None, beyond: float, search: bool, protect: bool) -> _Coded:
    weigh = torch.ones(w.shape[1]) if weigh is None else weigh
    spread, large = _spread(w), w.abs().amax(1, keepdim=True)
    outlier = w.abs() > beyond * spread
    inner = torch.where(outlier, 0, w.abs()).amax(1, keepdim=True)
    scale = torch.where(inner > 0, inner, spread) / _REACH
    scale = torch.maximum(scale, large / 127) if protect else scale
    if search:
        scale = scale * _searched(w / scale, weigh, outlier)
    full = (w / scale).round_().clamp_(-128, 127)
    clipped = full.clamp(LOW, HIGH)
    at = (full != clipped).flatten().nonzero()[:, 0]
    values, own = w.flatten()[at], scale[:, 0][at // w.shape[1]]
    eight, four = full.flatten()[at], clipped.flatten()[at]
    gains = ((values - four * own).square() - (values - eight * own).square()) * weigh[at % w.shape[1]]
    return _Coded(clipped.to(torch.int8), scale, at, eight.to(torch.int8), gains)


def _searched(w: Tensor, weigh: Tensor, outlier: Tensor) -> Tensor:
    """By what to multiply the step of each row, [N, 1], where w is in steps."""
    low, high = (torch.where(outlier, wide, float(narrow)) for wide, narrow in ((-128.0, LOW), (127.0, HIGH)))
    best = torch.ones(len(w))
    least = torch.full_like(best, float("inf"))
    error = torch.empty_like(w)
    for i in range(_CANDIDATES + 1):
        step = 1 - (1 - _LEAST) * i / _CANDIDATES
        torch.div(w, step, out=error)
        torch.clamp(error.round_(), low, high, out=error)
        torch.sub(w, error, alpha=step, out=error)
        total = error.square_() @ weigh
        best = torch.where(total < least, step, best)
        least = torch.minimum(total, least)
    return best[:, None]

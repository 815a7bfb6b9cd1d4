"""Anti-outlier methods: scales that move the large channels of an activation into the weights behind it, before both are rounded.

The columns of a linear layer are multiplied by s, one value a channel, and what gives its input is divided by s: a norm, v_proj
before o_proj, up_proj before down_proj. m1 is SmoothQuant (arXiv 2211.10438) with alpha 0.5; m4 the same with 0.9, over those two
pairs too; m3 is AWQ (arXiv 2306.00978), s = mean|a|^r / sqrt(max * min), r searched; m6 s = A^alpha / W^beta, both searched.
A [K]: max |a| of each input channel; W [K]: the largest |w| of each column.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtp.config import ModelConfig
from qtp.quantization import FLOAT
from qtp.quantize.arithmetic import activation, groups, rows_fp8, rows_symmetric, ungrouped
from qtp.quantize.layers import Linear, in_one_form
from qtp.quantize.observe import Seen
from qtp.quantize.settings import STATIC, Settings

_FLOOR = 1e-5
_GRID = 20
_SEARCH_ROWS = 512  # of each weight, on which a search measures errors

Weights = Callable[[Linear], Tensor]


@dataclass(frozen=True, slots=True)
class Change:
    """What smoothing does to one linear layer [n, k], all float32: its columns times `columns` [k], its input divided by them;
    its outputs divided by `rows` [n]."""

    columns: Tensor | None = None
    rows: Tensor | None = None

    def weight(self, w: Tensor, first: int = 0) -> Tensor:
        """`w`, which are rows of the weight from `first` on, changed."""
        w = w if self.columns is None else w * self.columns
        return w if self.rows is None else w / self.rows[first : first + len(w), None]

    def bias(self, bias: Tensor) -> Tensor:
        return bias if self.rows is None else bias / self.rows

    def input(self, seen: Seen) -> Seen:
        return seen if self.columns is None else seen.divided(self.columns)


@dataclass(frozen=True, slots=True)
class Smoothing:
    """Of one block: a Change by the layer's name, and the norms' new weights by the norm's name."""

    changes: dict[str, Change]
    norms: dict[str, Tensor]


def smooth(
    config: ModelConfig,
    asked: Settings,
    linears: Sequence[Linear],
    forms: Mapping[str, str],
    seen: Mapping[str, Seen],
    weights: Weights,
    norm: Callable[[str], Tensor],
) -> Smoothing:
    """Of the layers of one block. Layers in float are not touched, and what feeds one is not divided: pairs of which one is in
    float are left out, and a norm that some layers in float follow gets a twin for the others. norm: its weight, in the dtype
    in which the twin will be stored."""
    changes: dict[str, Change] = {}
    norms: dict[str, Tensor] = {}
    if not asked.anti_method:
        return Smoothing(changes, norms)
    if asked.anti_method == "m4":
        for source, target in _pairs(linears, forms):
            s, rows = _pair_scale(config, target, seen[target.own].peak, weights(target))
            changes[target.name] = replace(changes.get(target.name, Change()), columns=s)
            changes[source.name] = replace(changes.get(source.name, Change()), rows=rows)
    for name in dict.fromkeys(linear.norm for linear in linears if linear.norm):
        behind = [linear for linear in linears if linear.norm == name]
        if not in_one_form(behind, forms):
            continue
        behind = [linear for linear in behind if forms[linear.name] != FLOAT]
        whole = seen.get(next((x.own for x in behind if x.expert is None), behind[0].own))
        if whole is None:
            continue
        changed = {x.name: changes.get(x.name, Change()).weight(weights(x)) for x in behind}
        s = _norm_scale(asked, whole, list(changed.values()))
        before = norm(name)
        norms[name] = (before.float() / s).to(before.dtype)
        rounded = norms[name].float()
        s = torch.where(rounded != 0, before.float() / torch.where(rounded != 0, rounded, 1), torch.ones_like(s))
        for linear in behind:
            changes[linear.name] = replace(changes.get(linear.name, Change()), columns=s)
    return Smoothing(changes, norms)


def base_scale(peak: Tensor, columns: Tensor, alpha: float, beta: float | None = None) -> Tensor:
    """(A^alpha / W^beta).clamp(1e-5), with beta 1 - alpha."""
    beta = 1 - alpha if beta is None else beta
    return (peak.float().clamp(min=_FLOOR) ** alpha / columns.float().clamp(min=_FLOOR) ** beta).clamp(min=_FLOOR)


def _pairs(linears: Sequence[Linear], forms: Mapping[str, str]) -> Iterable[tuple[Linear, Linear]]:
    """(v_proj, o_proj) and each (up_proj, down_proj), where both are quantized."""
    by_name = {linear.name: linear for linear in linears}
    for target in linears:
        other = {"o_proj": "v_proj", "down_proj": "up_proj"}.get(target.name.rsplit(".", 1)[-1])
        source = by_name.get(f"{target.name.rsplit('.', 1)[0]}.{other}")
        if source is not None and FLOAT not in (forms[source.name], forms[target.name]):
            yield source, target


def _pair_scale(config: ModelConfig, target: Linear, peak: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(s for the columns of the second, and for the rows of the first): of o_proj all query heads of a KV head share one."""
    columns = w.abs().amax(0)
    if not target.ends("o_proj"):
        s = base_scale(peak, columns, 0.9)
        return s, s
    kv_heads, d = config.num_kv_heads, config.head_dim
    peak, columns = (x.view(kv_heads, -1, d).amax(1) for x in (peak, columns))
    s = base_scale(peak, columns, 0.9)
    group = config.num_heads // kv_heads
    return s[:, None].expand(kv_heads, group, d).flatten(), s.flatten()


def _norm_scale(asked: Settings, seen: Seen, weights: Sequence[Tensor]) -> Tensor:
    columns = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    if asked.anti_method == "m1":
        return base_scale(seen.peak, columns, 0.5)
    if asked.anti_method == "m4":
        return base_scale(seen.peak, columns, 0.9)
    some = [w[:: -(-len(w) // _SEARCH_ROWS)] for w in weights]
    error = _Error(asked, seen, some)
    steps = [i / _GRID for i in range(_GRID)]
    if asked.anti_method == "m3":
        mean = seen.magnitude.float().clamp(min=_FLOOR)
        return min((_centred(mean**r) for r in steps), key=error)
    alpha = min(steps, key=lambda a: error(base_scale(seen.peak, columns, a)))
    beta = min((1 - alpha, *steps), key=lambda b: error(base_scale(seen.peak, columns, alpha, b)))
    return base_scale(seen.peak, columns, alpha, beta)


def _centred(s: Tensor) -> Tensor:
    return s / (s.amax() * s.amin()).sqrt()


class _Error:
    """What a scale s costs: the square error of the outputs over the captured rows, weights and inputs rounded."""

    def __init__(self, asked: Settings, seen: Seen, weights: Sequence[Tensor]) -> None:
        self._asked, self._seen, self._w = asked, seen, torch.cat(list(weights))
        self._exact = seen.rows @ self._w.T

    def __call__(self, s: Tensor) -> float:
        seen = self._seen.divided(s)
        y = rounded_input(self._asked.kind, seen) @ self._rounded(self._w * s).T
        return float((y - self._exact).square().sum(dtype=torch.float64))

    def _rounded(self, w: Tensor) -> Tensor:
        if self._asked.kind == "W8A16":
            return ungrouped(*groups(w, self._asked.group_size, self._asked.symmetric), self._asked.group_size)
        if self._asked.kind == "W8A8_FP8":
            return _through_fp8(w)
        if self._asked.kind == "W8A8S":  # without the search, which would take too long here
            scale = w.square().mean(1, keepdim=True).sqrt() * (3 / 7.5)
            q = (w / scale).round()
            return torch.where(w.abs() > 7.5 * scale, q, q.clamp(-8, 7)) * scale
        scale = rows_symmetric(w)
        return (w / scale).round() * scale


def rounded_input(kind: str, seen: Seen) -> Tensor:
    """The captured rows as the kernels of this type round them, by the whole range of what was seen."""
    if kind in STATIC:
        return activation(float(seen.low.min()), float(seen.high.max())).through(seen.rows)
    if kind == "W8A8_DYNAMIC":
        scale = rows_symmetric(seen.rows)
        return (seen.rows / scale).round() * scale
    if kind == "W8A8_FP8":
        return _through_fp8(seen.rows)
    return seen.rows


def _through_fp8(rows: Tensor) -> Tensor:
    """After the round through float8, each row with its own scale."""
    q, scales = rows_fp8(rows)
    return q.float().mul_(scales)

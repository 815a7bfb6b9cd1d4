"""What calibration sees: the inputs of linear layers, and what goes into the KV cache, while the project's own model runs.

T tokens, D columns of an input, R captured rows, Q, K query and KV heads, d head_dim.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from math import pi, sqrt
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from collectives.communicator import Communicator
from qtp.attention.backend import AttentionBackend
from qtp.attention.torch_backend import rotate
from qtp.batch import Batch
from qtp.kernels.interface import Choose, Cuts, Expert, Experts, Head, Kernels, Norm, Op
from qtp.kernels.torch_kernels import grouped
from qtp.quantize.arithmetic import BINS, histogram
from qtp.weights.quantized import Weight

LANES = 8  # sums are made by lanes of samples, which ranks share out, and added lane by lane: the same bits at any world size
ROWS = 128  # captured of each input, from all samples

See = Callable[[str, Tensor], None]


@dataclass(frozen=True, slots=True)
class Seen:
    """An input [*, D] over all samples. low, high float32 [D]; magnitude, square float64 [D]: means of |x| and x^2; mean: of all
    values; rows float32 [R, D]: some of it."""

    tokens: int
    low: Tensor
    high: Tensor
    magnitude: Tensor
    square: Tensor
    mean: float
    rows: Tensor

    @property
    def peak(self) -> Tensor:
        """max |x|, [D]."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def strain(self) -> float:
        """max |x| / std(x) over all columns: how ill one scale suits it."""
        variance = float(self.square.mean()) - self.mean**2
        return float(self.peak.max()) / sqrt(max(variance, 1e-30))

    def divided(self, by_D: Tensor) -> "Seen":
        """What would have been seen of x / by_D, where by_D is above 0."""
        by = by_D.float()
        magnitude, square = self.magnitude / by.double(), self.square / by.double().square()
        return replace(self, low=self.low / by, high=self.high / by, magnitude=magnitude, square=square, rows=self.rows / by)


@dataclass(slots=True)
class _Lane:
    width: int
    tokens: int = 0
    total: float = 0.0
    low: Tensor = field(init=False)
    high: Tensor = field(init=False)
    magnitude: Tensor = field(init=False)
    square: Tensor = field(init=False)
    rows: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.low = torch.full((self.width,), float("inf"))
        self.high = torch.full((self.width,), float("-inf"))
        self.magnitude, self.square = (torch.zeros(self.width, dtype=torch.float64) for _ in range(2))

    def see(self, x_TD: Tensor, captured: int) -> None:
        x = x_TD.float().cpu()
        self.tokens += len(x)
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.magnitude += x.abs().sum(0)
        self.square += x.square().sum(0)
        self.total += float(x.sum(0).sum(dtype=torch.float64))
        at = torch.linspace(0, len(x) - 1, min(captured, len(x))).round().long()
        self.rows.append(x[at])


class Recorder:
    """Statistics of the inputs in `widths`, by name; others are passed over."""

    def __init__(self, widths: Mapping[str, int], samples: int) -> None:
        self.widths = widths
        self._captured = -(-ROWS // samples)
        self._most = self._captured * -(-samples // LANES)
        self._lanes: dict[tuple[str, int], _Lane] = {}

    def see(self, lane: int, name: str, x: Tensor) -> None:
        """x [..., D]. Lanes may have threads of their own."""
        width = self.widths.get(name)
        if width is None or not x.numel():
            return
        if (name, lane) not in self._lanes:
            self._lanes[name, lane] = _Lane(width)
        self._lanes[name, lane].see(x.reshape(-1, width), self._captured)

    def seen(self, comm: Communicator) -> dict[str, Seen]:
        """What all ranks saw, for what any of them saw; all must call it. Rank r has the lanes r, r + size, ..."""
        found = {name: self._gathered(name, width, comm) for name, width in self.widths.items()}
        return {name: seen for name, seen in found.items() if seen is not None}

    def _gathered(self, name: str, width: int, comm: Communicator) -> Seen | None:
        each = -(-LANES // comm.size)
        mine = [self._lanes.get((name, comm.rank + i * comm.size)) or _Lane(width) for i in range(each)]
        sums = torch.stack([torch.cat((torch.tensor([x.tokens, x.total]).double(), x.magnitude, x.square)) for x in mine])
        ranges = torch.stack([torch.stack((x.low, x.high)) for x in mine])
        rows = torch.zeros(each, self._most + 1, width)
        for i, lane in enumerate(mine):
            some = torch.cat(lane.rows)[: self._most] if lane.rows else rows[i, :0]
            rows[i, : len(some)] = some
            rows[i, -1, 0] = len(some)

        def gather(x: Tensor) -> Tensor:
            """By lane."""
            return comm.all_gather(x.to(comm.device)[None]).cpu().transpose(0, 1).flatten(0, 1)[:LANES]

        sums, ranges, rows = gather(sums), gather(ranges), gather(rows)
        total = torch.zeros(sums.shape[1], dtype=torch.float64)
        for lane_sums in sums:
            total += lane_sums
        tokens = int(total[0])
        if not tokens:
            return None
        magnitude, square = (total[2:] / tokens).chunk(2)
        return Seen(
            tokens=tokens,
            low=ranges[:, 0].amin(0),
            high=ranges[:, 1].amax(0),
            magnitude=magnitude,
            square=square,
            mean=float(total[1]) / (tokens * width),
            rows=torch.cat([lane[: int(lane[-1, 0])] for lane in rows]),
        )


class Histograms:
    """Of inputs by name: of x / by over [low, high], given as (by [D] or None, low, high)."""

    def __init__(self, wanted: Mapping[str, tuple[Tensor | None, float, float]]) -> None:
        self._wanted = wanted
        self._counts = {name: torch.zeros(BINS, dtype=torch.int64) for name in wanted}
        self._lock = Lock()

    def see(self, lane: int, name: str, x: Tensor) -> None:
        """From any thread; counts have no order, and so no lanes."""
        if name in self._wanted:
            by, low, high = self._wanted[name]
            x = x.float().cpu()
            counts = histogram(x if by is None else x / by, low, high)
            with self._lock:
                self._counts[name] += counts

    def counts(self, comm: Communicator) -> dict[str, Tensor]:
        """Over all ranks; all must call it."""
        return {name: comm.all_reduce(counts.to(comm.device)).cpu() for name, counts in self._counts.items()}


class WatchedKernels:
    """Kernels over float weights that show each input of a linear layer before it is used. names: of weights, by `id`. probe:
    names of the experts' layers, as they begin, that get all tokens too, for the sake of `see` alone."""

    def __init__(self, inner: Kernels, names: Mapping[int, str], see: See, probe: Collection[str] = ()) -> None:
        self._inner, self._names, self._see, self._probe = inner, names, see, probe
        self.name, self.waits = inner.name, inner.waits

    def linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        cuts: Cuts | None = None,
        across: Communicator | None = None,
    ) -> Callable[[Tensor], Any]:
        return self._watched(weight, norm, self._inner.linear(weight, bias))

    def joining(self, weight: Weight) -> Op:
        return self.linear(weight)

    def linear_leaves(self, weight: Weight, cuts: Cuts, across: Communicator | None = None) -> Op:
        raise AssertionError("calibration runs on whole weights")

    def gated(self, weight: Weight, *, norm: Norm | None = None) -> Op:
        return self._watched(weight, norm, self._inner.gated(weight))

    def rms_norm(self, norm: Norm) -> Op:
        return self._inner.rms_norm(norm)

    def choose(self, top_k: int, norm_topk_prob: bool) -> Choose:
        return self._inner.choose(top_k, norm_topk_prob)

    def scale(self, gate: Tensor, x: Tensor) -> Tensor:
        return self._inner.scale(gate, x)

    def head(self, weight: Weight) -> Head:
        return self._inner.head(weight)

    def experts(self, experts: Mapping[int, Expert], leaves: Any = None) -> Experts:
        ops = {e: (self.gated(expert.gate_up), self.linear(expert.down)) for e, expert in experts.items()}
        probed = [ops[e] for e, expert in experts.items() if self._names[id(expert.gate_up)] in self._probe]
        routed = grouped(ops)

        def run(x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor, partial_TD: Tensor) -> Tensor:
            for gated, down in probed:
                down(gated(x_TD))
            return routed(x_TD, weights_TK, chosen_TK, partial_TD)

        return run

    def _watched(self, weight: Weight, norm: Norm | None, op: Op) -> Op:
        before = None if norm is None else self._inner.rms_norm(norm)
        name = self._names.get(id(weight), "")

        def run(x: Tensor) -> Tensor:
            x = x if before is None else before(x)
            self._see(name, x)
            return op(x)

        return run


class WatchedAttention:
    """A backend that shows the queries and keys of a layer, turned by their positions, and its values, [T, heads * d] each, as
    'layers.N.attention.query', '.key' and '.value'; as '.query.reach' and '.key.reach' [2, heads * d] the bounds between which
    they would lie over the model's whole context, at whose end each pair of channels is turned by `turns` [d / 2].
    `inner` has the KV cache of one layer."""

    def __init__(self, inner: AttentionBackend, kv_heads: int, turns: Tensor, see: See) -> None:
        self._inner, self._kv_heads, self._turns, self._see = inner, kv_heads, turns, see

    def plan(self, batch: Batch, cos: Tensor, sin: Tensor) -> object:
        return self._inner.plan(batch, cos, sin), cos[:, None], sin[:, None]

    def run(self, plan: object, layer: int, qkv_THd: Tensor, window: int | None) -> Tensor:
        assert isinstance(plan, tuple)
        inner, cos, sin = plan
        heads = qkv_THd.shape[1] - 2 * self._kv_heads
        query, key, value = torch.split(qkv_THd.float(), [heads, self._kv_heads, self._kv_heads], dim=1)
        own = f"layers.{layer}.attention"
        for name, x in (("query", query), ("key", key)):
            turned = rotate(x, cos, sin)
            self._see(f"{own}.{name}", turned.flatten(1))
            self._see(f"{own}.{name}.reach", reach(x, self._turns, float((cos.square() + sin.square()).amax().sqrt())))
        self._see(f"{own}.value", value.flatten(1))
        return self._inner.run(inner, 0, qkv_THd, window)


def reach(x_THd: Tensor, turns: Tensor, factor: float = 1.0) -> Tensor:
    """The least and the largest value of each channel, [2, H * d], over tokens and angles from 0 to `turns` [d / 2], by which a
    pair (first half, second half) is turned; times `factor`."""
    first, second = x_THd.float().chunk(2, dim=-1)
    radius, start = torch.hypot(first, second) * factor, torch.atan2(second, first)
    halves = []
    for shift in (0.0, -pi / 2):  # radius * cos, and radius * sin, of the angle from `start` on
        begin = start + shift
        end = begin + turns
        high = torch.where(_passes(begin, end, 0.0), 1.0, torch.maximum(begin.cos(), end.cos()))
        low = torch.where(_passes(begin, end, pi), -1.0, torch.minimum(begin.cos(), end.cos()))
        halves.append(torch.stack(((radius * low).amin(0), (radius * high).amax(0))))
    return torch.cat(halves, dim=-1).flatten(1)


def _passes(begin: Tensor, end: Tensor, angle: float) -> Tensor:
    """Whether angle + 2 pi n, for any n, lies between."""
    return ((end - angle) / (2 * pi)).floor() >= ((begin - angle) / (2 * pi)).ceil()

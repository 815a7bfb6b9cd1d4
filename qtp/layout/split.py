"""The split algebra: which box of a logical tensor a rank holds.

A box is one `range` a dimension. Every split answers one question, `box(shape, rank, grid)`, and the answer may be empty.
Cut points are as even as integers allow, so any world size fits: nothing needs to be divisible by it. They nest: twice as many
ranks cut each rank's range in two.
"""

from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise, zip_longest
from math import prod
from typing import Protocol

Box = tuple[range, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """How `size` ranks are arranged. Experts are cut over `moe_ep` groups and, inside each expert, columns over `moe_tp`
    ranks: rank = ep_rank * moe_tp + tp_rank. Everything else is cut over all ranks.

    Raises ValueError if moe_ep * moe_tp is not the number of ranks.
    """

    size: int
    moe_ep: int
    moe_tp: int

    def __post_init__(self) -> None:
        if min(self.size, self.moe_ep, self.moe_tp) < 1 or self.moe_ep * self.moe_tp != self.size:
            raise ValueError(
                f"moe_ep {self.moe_ep} x moe_tp {self.moe_tp} is not the world size {self.size}; give two factors of {self.size}"
            )

    @classmethod
    def of(cls, size: int, *, moe_ep: int = -1, moe_tp: int = -1) -> "Grid":
        """The grid for `size` ranks; -1 means: whatever is left. Both -1: by experts alone."""
        if moe_ep == -1 and moe_tp == -1:
            return cls(size=size, moe_ep=size, moe_tp=1)
        if moe_ep == -1:
            moe_ep = size // max(moe_tp, 1)
        if moe_tp == -1:
            moe_tp = size // max(moe_ep, 1)
        return cls(size=size, moe_ep=moe_ep, moe_tp=moe_tp)


class Split(Protocol):
    def __hash__(self) -> int: ...

    def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> Box:
        """The box of a tensor of `shape` that `rank` holds; a range of it may be empty."""
        ...


def even(total: int, parts: int, part: int, unit: int = 1) -> range:
    """Part number `part` of `total` elements cut into `parts` ranges of whole units, whose numbers differ by one at most.
    The last unit may be shorter than `unit`. The cut points are among those of every multiple of `parts`."""
    units = -(-total // unit)
    start, stop = part * units // parts, (part + 1) * units // parts
    return range(min(start * unit, total), min(stop * unit, total))


@cache
def query_head_cuts(heads: int, kv_heads: int, parts: int) -> tuple[int, ...]:
    """Cut points 0 = c0 <= c1 <= ... <= c_parts = heads of the query heads.

    Sizes are as even as integers allow. Which ranks get the larger size is chosen so that the KV heads that a rank must
    hold are few: first the most that any rank holds, then their sum (28 query and 4 KV heads over 8 ranks: 4 3 4 3 4 3 4 3,
    one KV head each). An even number of parts halves each part of parts / 2, an odd one is cut freely. Over 2, 4 and 8 ranks
    that costs nothing: up to 64 heads the most that a rank holds is what the best free cut needs. Over twice an odd number it
    may cost a rank a second KV head (18 query and 2 KV heads over 10 ranks).
    """
    group = heads // kv_heads
    if parts % 2:
        return _cut_freely(heads, group, parts)
    coarse = query_head_cuts(heads, kv_heads, parts // 2)
    return (0, *(cut for start, stop in pairwise(coarse) for cut in (_halved(start, stop, group)[0], stop)))


def _cut_freely(heads: int, group: int, parts: int) -> tuple[int, ...]:
    """Dynamic programming over (rank, how many large sizes were used): the most KV heads that a rank holds is the least
    possible, the sum breaks ties along the way."""
    small, large = divmod(heads, parts)
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for part in range(parts):
        grown: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for used, (most, total, sizes) in best.items():
            for size in (small + 1, small):
                now = used + (size > small)
                if now > large or large - now > parts - part - 1:
                    continue
                start = part * small + used
                kv = _kv_held(start, start + size, group)
                candidate = (max(most, kv), total + kv, (*sizes, size))
                if now not in grown or candidate[:2] < grown[now][:2]:
                    grown[now] = candidate
        best = grown
    return (0, *accumulate(best[large][2]))


@cache
def _halved(start: int, stop: int, group: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """(where to halve a range of query heads; (most, sum) of the KV heads held by its halves, by its quarters, and so on).
    Of an odd size the first half is the larger one, unless the other way needs less, in halves or else further down."""
    if stop - start < 2:
        return stop, ()
    tried = []
    for middle in (-(-(start + stop) // 2), (start + stop) // 2):
        left, right = _kv_held(start, middle, group), _kv_held(middle, stop, group)
        further = zip_longest(_halved(start, middle, group)[1], _halved(middle, stop, group)[1], fillvalue=(0, 0))
        needs = ((max(left, right), left + right), *((max(a, c), b + d) for (a, b), (c, d) in further))
        tried.append((middle, needs))
    return min(tried, key=lambda way: way[1])


def _kv_held(start: int, stop: int, group: int) -> int:
    """How many KV heads a range of query heads reads."""
    return (stop - 1) // group - start // group + 1 if stop > start else 0


@dataclass(frozen=True, slots=True)
class Heads:
    """Which query heads each rank computes, and the KV heads they read. heads must be a multiple of kv_heads."""

    heads: int
    kv_heads: int

    def query(self, rank: int, grid: Grid) -> range:
        cuts = query_head_cuts(self.heads, self.kv_heads, grid.size)
        return range(cuts[rank], cuts[rank + 1])

    def kv(self, rank: int, grid: Grid) -> range:
        query, group = self.query(rank, grid), self.heads // self.kv_heads
        return range(query.start // group, -(-query.stop // group)) if query else range(0)


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the whole tensor."""

    def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> Box:
        return tuple(range(n) for n in shape)


@dataclass(frozen=True, slots=True)
class Even:
    """Dimension `dim` cut evenly over all ranks, in whole units (MLP columns; the vocabulary)."""

    dim: int
    unit: int = 1

    def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> Box:
        return _along(self.dim, shape, even(shape[self.dim], grid.size, rank, self.unit))


@dataclass(frozen=True, slots=True)
class QueryHeads:
    """Dimension `dim` holds heads * head_dim elements; a rank gets those of its query heads."""

    dim: int
    heads: Heads

    def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> Box:
        return _along(self.dim, shape, _scaled(self.heads.query(rank, grid), shape[self.dim] // self.heads.heads))


@dataclass(frozen=True, slots=True)
class KVHeads:
    """Dimension `dim` holds kv_heads * head_dim elements; a rank gets the KV heads its query heads read. Ranks may overlap."""

    dim: int
    heads: Heads

    def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> Box:
        return _along(self.dim, shape, _scaled(self.heads.kv(rank, grid), shape[self.dim] // self.heads.kv_heads))


@dataclass(frozen=True, slots=True)
class Expert:
    """A tensor of one expert: held by the expert's group, there cut along `dim` in whole units over the moe_tp ranks of it."""

    expert: int
    experts: int
    dim: int
    unit: int = 1

    def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> Box:
        group, part = divmod(rank, grid.moe_tp)
        if self.expert not in even(self.experts, grid.moe_ep, group):
            return tuple(range(0) for _ in shape)
        return _along(self.dim, shape, even(shape[self.dim], grid.moe_tp, part, self.unit))


@dataclass(frozen=True, slots=True)
class OfRows:
    """What goes with the rows of a matrix of shape `matrix` that is cut by `split`: dimension 0 is its rows. once: held by the
    rank of the matrix's first column alone, since what is added to a partial sum must be added once."""

    split: Split
    matrix: tuple[int, int]
    once: bool = False

    def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> Box:
        rows, columns = self.split.box(self.matrix, rank, grid)
        if self.once and (columns.start or not columns):
            rows = range(0)
        return (rows, *(range(n) for n in shape[1:]))


@dataclass(frozen=True, slots=True)
class OfGroups:
    """One value for each row and each `size` columns of a matrix of shape `matrix` that is cut by `split`; a group that is cut is
    held by all ranks that hold a part of it."""

    split: Split
    matrix: tuple[int, int]
    size: int

    def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> Box:
        rows, columns = self.split.box(self.matrix, rank, grid)
        return rows, range(columns.start // self.size, -(-columns.stop // self.size)) if columns else range(0)


@dataclass(frozen=True, slots=True)
class With:
    """The whole tensor, wherever a part of a matrix of shape `matrix` is held, or could be, that is cut by `split`: everywhere
    but on ranks that lack the expert."""

    split: Split
    matrix: tuple[int, int]

    def box(self, shape: tuple[int, ...], rank: int, grid: Grid) -> Box:
        held = any(self.split.box(self.matrix, rank, grid))
        return tuple(range(n if held else 0) for n in shape)


def elements(box: Box) -> int:
    """How many elements a box holds."""
    return prod(len(r) for r in box)


def _along(dim: int, shape: tuple[int, ...], taken: range) -> Box:
    return tuple(taken if i == dim else range(n) for i, n in enumerate(shape))


def _scaled(heads: range, width: int) -> range:
    return range(heads.start * width, heads.stop * width)

"""The eight leaves of a sum over ranks, so that its result need not depend on how many ranks there are.

A row-split product is accumulated over eight ranges of its inner dimension, each by itself: those that the ranks of a world of
eight hold. The cut points of 1, 2 and 4 ranks are among theirs, so a rank holds whole leaves and adds them along a binary tree,
whose upper levels add the ranks (collectives/tree.py). A leaf may be empty and then counts as zeros.
"""

from collections.abc import Sequence

from qtp.layout.spec import Spec
from qtp.layout.split import Even, Grid, QueryHeads, even

LEAVES = 8


def leaves_of(rank: int, grid: Grid) -> range:
    """The numbers of the leaves that `rank` adds. ValueError if the ranks cannot share eight leaves equally."""
    if LEAVES % grid.size:
        raise ValueError(
            f"sums that do not depend on the world size need 1, 2, 4 or 8 ranks, not {grid.size}; leave --deterministic away"
        )
    return even(LEAVES, grid.size, rank)


def leaf_cuts(shape: tuple[int, ...], split: Even | QueryHeads, rank: int, grid: Grid) -> tuple[int, ...]:
    """The 8 / size + 1 cut points of this rank's leaves along `split.dim` of a tensor whose whole shape is `shape`, counted from
    where the rank's box starts: its i-th leaf is cuts[i] to cuts[i + 1] of what it holds. ValueError as in `leaves_of`."""
    eight = Grid.of(LEAVES)
    leaves = [split.box(shape, leaf, eight)[split.dim] for leaf in leaves_of(rank, grid)]
    held = split.box(shape, rank, grid)[split.dim]
    assert (leaves[0].start, leaves[-1].stop) == (held.start, held.stop), f"the cuts of {split} do not nest"
    return (0, *(leaf.stop - held.start for leaf in leaves))


def row_cuts(specs: Sequence[Spec], rank: int, grid: Grid) -> dict[str, tuple[int, ...]]:
    """`leaf_cuts` of every row-split weight, by `Spec.name`: those cut along their second dimension."""
    rows = [(spec.name, part) for spec in specs for part in spec.parts if getattr(part.split, "dim", 0) == 1]
    return {name: leaf_cuts(p.shape, p.split, rank, grid) for name, p in rows if isinstance(p.split, Even | QueryHeads)}


def check_leaves(grid: Grid) -> None:
    """Raises ValueError if the sums of these ranks cannot be those of eight leaves."""
    leaves_of(0, grid)
    leaf_experts(LEAVES, 0, grid)


def leaf_experts(experts: int, rank: int, grid: Grid) -> tuple[range, ...]:
    """The experts of each of this rank's leaves, by their numbers among all `experts`. ValueError as in `leaves_of`, and if the
    experts' columns are cut too: their partial sums would be others at every moe_tp."""
    if grid.moe_tp > 1:
        raise ValueError(
            f"sums that do not depend on the world size need whole experts on a rank, not moe_tp {grid.moe_tp}; "
            "leave moe_tp and moe_ep away, or --deterministic"
        )
    return tuple(even(experts, LEAVES, leaf) for leaf in leaves_of(rank, grid))

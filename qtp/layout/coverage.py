"""The proof that a cut loses nothing: every element of a tensor lies in the box of at least one rank."""

from functools import cache
from itertools import pairwise, product

from qtp.layout.split import Box, Grid, Split, elements


def boxes(shape: tuple[int, ...], split: Split, grid: Grid) -> list[Box]:
    """The box of each rank, by rank."""
    return [split.box(shape, rank, grid) for rank in range(grid.size)]


def multiplicity(shape: tuple[int, ...], held: list[Box]) -> tuple[int, int]:
    """(least, most) number of boxes that hold an element of a tensor of `shape`. Exact: the boundaries of all boxes cut
    the tensor into cells inside which the number is constant."""
    held = [box for box in held if elements(box)]
    cuts = [sorted({0, n, *(edge for box in held for edge in (box[d].start, box[d].stop))}) for d, n in enumerate(shape)]
    counts = [
        sum(all(a in box[d] for d, (a, _) in enumerate(cell)) for box in held)
        for cell in product(*(list(pairwise(c)) for c in cuts))
    ]
    return (min(counts), max(counts)) if counts else (1, 1)


@cache
def check_covered(shape: tuple[int, ...], split: Split, grid: Grid) -> None:
    """Raises ValueError if a box leaves the tensor or an element lies in no box."""
    held = boxes(shape, split, grid)
    for rank, box in enumerate(held):
        if len(box) != len(shape) or any(r.start < 0 or r.stop > n for r, n in zip(box, shape, strict=True)):
            raise ValueError(f"the box {box} of rank {rank} leaves the tensor's shape {shape} ({split})")
    if multiplicity(shape, held)[0] == 0:
        raise ValueError(f"some elements of shape {shape} are held by no rank ({split})")

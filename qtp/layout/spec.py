"""A tensor of the running model, in terms of the checkpoint's tensors."""

from dataclasses import dataclass

from qtp.layout.split import Grid, Split, elements


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the checkpoint: its name, whole shape and split."""

    name: str
    shape: tuple[int, ...]
    split: Split


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of the running model: the boxes of its parts, one after the other along dimension 0."""

    name: str
    parts: tuple[Part, ...]

    def shape(self, rank: int, grid: Grid) -> tuple[int, ...]:
        """The shape that `rank` holds; it has a zero where the rank holds nothing."""
        boxes = [part.split.box(part.shape, rank, grid) for part in self.parts]
        return (sum(len(box[0]) for box in boxes), *(len(r) for r in boxes[0][1:]))

    def elements(self, rank: int, grid: Grid) -> int:
        return sum(elements(part.split.box(part.shape, rank, grid)) for part in self.parts)

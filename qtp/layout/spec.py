"""A tensor of the running model, in terms of the checkpoint's tensors."""

from dataclasses import dataclass

from qtp.layout.split import Grid, Split, elements

RUN, FLOAT32, INT8, FLOAT8, INT32, SCALE_BITS, COMPRESSED = (
    "run",
    "float32",
    "int8",
    "float8",
    "int32",
    "scale bits",
    "compressed",
)
_ITEM_SIZE = {FLOAT32: 4, INT8: 1, FLOAT8: 1, INT32: 4, SCALE_BITS: 4, COMPRESSED: 0.54}


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the checkpoint: its name, whole shape and split."""

    name: str
    shape: tuple[int, ...]
    split: Split


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of the running model: the boxes of its parts, one after the other along dimension 0. dtype: what it is held in:
    RUN, the dtype of the run, or a fixed one; FLOAT8 is e4m3; SCALE_BITS is float32 that the checkpoint may hold as int64 (its
    bits as an int32, widened); COMPRESSED is int8 that every rank holds compressed (docs/w8a8sc.md), which usually takes 0.54 of
    its bytes; kernels that cannot compute from that hold it expanded."""

    name: str
    parts: tuple[Part, ...]
    dtype: str = RUN

    def shape(self, rank: int, grid: Grid) -> tuple[int, ...]:
        """The shape that `rank` holds; it has a zero where the rank holds nothing."""
        boxes = [part.split.box(part.shape, rank, grid) for part in self.parts]
        return (sum(len(box[0]) for box in boxes), *(len(r) for r in boxes[0][1:]))

    def elements(self, rank: int, grid: Grid) -> int:
        return sum(elements(part.split.box(part.shape, rank, grid)) for part in self.parts)

    def bytes(self, rank: int, grid: Grid, run: int, *, expanded: bool = False) -> int:
        """What `rank` holds; run: bytes of a value in the run's dtype. expanded: of a compressed one, what it is uncompressed."""
        dtype = INT8 if expanded and self.dtype == COMPRESSED else self.dtype
        return int(self.elements(rank, grid) * _ITEM_SIZE.get(dtype, run))

"""The proof, from headers alone, that a checkpoint holds a model and that a cut of it loses nothing. Imports no torch."""

from collections.abc import Sequence

from qtp.layout.coverage import check_covered
from qtp.layout.spec import Spec
from qtp.layout.split import Grid
from qtp.weights.checkpoint import Checkpoint

FLOATS = ("F64", "F32", "F16", "BF16")


def verify(store: Checkpoint, specs: Sequence[Spec], grid: Grid) -> None:
    """Checks that every tensor is there in its shape, in a floating-point dtype, and that the boxes of all ranks cover it.
    Raises ValueError naming the first tensor of which this is not so. Reads no data."""
    for spec in specs:
        for part in spec.parts:
            entry = store.check(part.name, part.shape)
            if entry.dtype not in FLOATS:
                raise ValueError(
                    f"{entry.file}: tensor {part.name} has dtype {entry.dtype}; quantized checkpoints are not supported yet, "
                    "use a float one"
                )
            check_covered(part.shape, part.split, grid)

"""The proof, from headers alone, that a checkpoint holds a model and that a cut of it loses nothing. Imports no torch."""

from collections.abc import Sequence

from qtp.layout.coverage import check_covered
from qtp.layout.spec import COMPRESSED, FLOAT8, FLOAT32, INT8, INT32, RUN, SCALE_BITS, Spec
from qtp.layout.split import Grid
from qtp.weights.checkpoint import Checkpoint
from qtp.weights.store import FLOATS

_STORED = {
    RUN: FLOATS,
    FLOAT32: FLOATS,
    INT8: ("I8",),
    FLOAT8: ("F8_E4M3",),
    INT32: ("I32",),
    COMPRESSED: ("I8",),
    SCALE_BITS: ("I64", "F32"),
}


def verify(store: Checkpoint, specs: Sequence[Spec], grid: Grid) -> None:
    """Checks that every tensor is there in its shape, in a dtype that it may have, and that the boxes of all ranks cover it.
    Raises ValueError naming the first tensor of which this is not so. Reads no data."""
    for spec in specs:
        for part in spec.parts:
            _check_keys(store, part.name)
            entry = store.check(part.name, part.shape)
            if entry.dtype not in _STORED[spec.dtype]:
                raise ValueError(
                    f"{entry.file}: tensor {part.name} has dtype {entry.dtype}, and should have "
                    f"{' or '.join(_STORED[spec.dtype])}; config.json, the description of a quantized checkpoint and the weight "
                    "files do not belong together"
                )
            check_covered(part.shape, part.split, grid)


def _check_keys(store: Checkpoint, name: str) -> None:
    if name.endswith("k_proj.kv_cache_scale") and name in store.entries and store.entries[name].shape in ((), (1,)):
        raise ValueError(
            f"{store.entries[name].file}: tensor {name} is one scale for all channels; keys of this family have channels a "
            "hundred times as large as others, quantize the checkpoint again with a scale for each channel"
        )

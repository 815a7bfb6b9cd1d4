"""The proof that a folder is what its manifest says, and what its source holds: from what lies there, not from how it came."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import xxhash

from qtp.layout.split import Box, elements
from qtp.reshard.transfer import Convert, pieces
from qtp.weights.checkpoint import Checkpoint
from qtp.weights.compressed import store_of
from qtp.weights.manifest import MANIFEST, HeldFile, Manifest
from qtp.weights.parts import Parts
from qtp.weights.store import ITEM_SIZE, Store, read_header

T = TypeVar("T")


def opened(folder: Path) -> Parts:
    """A folder that the resharder wrote, of either layout; each file is there in its size and with its header, or ValueError."""
    manifest = Manifest.load(folder)
    if manifest is None:
        raise ValueError(f"{folder}: has no {MANIFEST}; only what qtp.reshard has written to its end can be verified")
    return Parts(folder, manifest)


def check_sums(parts: Parts, chunk: int, workers: int, progress: Callable[[int], None]) -> None:
    """Raises ValueError unless the boxes in the files cover every tensor, and each has the checksum that the manifest tells."""
    for name in parts.entries:
        parts.cells(name)

    def look(task: tuple[HeldFile, Store, str]) -> None:
        file, store, name = task
        x = xxhash.xxh3_128()
        for box in pieces(tuple(range(n) for n in store.entries[name].shape), chunk // ITEM_SIZE[store.entries[name].dtype]):
            raw = _read(store, name, box)
            x.update(raw)
            progress(raw.nbytes)
        if x.hexdigest() != file.tensors[name].xxh3:
            raise ValueError(
                f"{parts.folder / file.path}: tensor {name} is not as it was written: its checksum differs; copy the file again, "
                "or cut the checkpoint again"
            )

    with ExitStack() as closing:
        stored = [(file, closing.enter_context(store)) for file, store in _stored(parts)]
        _all(look, ((file, store, name) for file, store in stored for name in file.tensors), workers)


def check_equal(
    parts: Parts, source: Checkpoint, chunk: int, workers: int, convert: Convert, progress: Callable[[int], None]
) -> None:
    """Raises ValueError unless all boxes of all parts hold what the source has there, and nothing is missing or added."""
    if odd := sorted(parts.entries.keys() ^ source.entries.keys()):
        raise ValueError(f"{parts.folder}: tensor {odd[0]} is in one of it and {source.folder}, not in both")
    for name, entry in parts.entries.items():
        if entry.shape != source.entries[name].shape:
            raise ValueError(
                f"{parts.folder}: tensor {name} has shape {list(entry.shape)}, in {source.folder} "
                f"{list(source.entries[name].shape)}"
            )

    def look(name: str) -> None:
        stored, wanted = source.entries[name].dtype, parts.entries[name].dtype
        for piece in parts.pieces[name]:
            for box in pieces(piece.box, chunk // ITEM_SIZE[stored]):
                theirs = _read(source, name, box)
                if stored != wanted:
                    theirs = convert(theirs, stored, wanted)
                local = tuple(range(r.start - o.start, r.stop - o.start) for r, o in zip(box, piece.box, strict=True))
                ours = _read(piece.store, name, local)
                if xxhash.xxh3_128_digest(ours) != xxhash.xxh3_128_digest(theirs):
                    raise ValueError(f"{piece.store.entries[name].file}: tensor {name} differs from that of {source.folder}")
                progress(ours.nbytes)

    _all(look, parts.entries, workers)


def _stored(parts: Parts) -> list[tuple[HeldFile, Store]]:
    """The files of a folder, under the names that the files themselves have."""
    return [(file, store_of(parts.folder, read_header(parts.folder / file.path)[0])) for file in parts.manifest.files]


def _read(source: Checkpoint, name: str, box: Box) -> memoryview:
    raw = memoryview(bytearray(elements(box) * ITEM_SIZE[source.entries[name].dtype]))
    source.read_into(name, box, raw)
    return raw


def _all(look: Callable[[T], None], tasks: Iterable[T], workers: int) -> None:
    pool = ThreadPoolExecutor(workers, "verify")
    try:
        for _ in pool.map(look, tasks):
            pass
    finally:
        pool.shutdown(cancel_futures=True)

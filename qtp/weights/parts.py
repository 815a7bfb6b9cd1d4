"""A folder of parts that the resharder cut, read by boxes of the whole tensors, as a Store is. Imports no torch."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Self

from qtp.layout.split import Box, elements
from qtp.weights.compressed import CompressedStore, Stream, store_of
from qtp.weights.manifest import MANIFEST, HeldFile, Manifest
from qtp.weights.mindformers import from_mindformers, is_stack, unstacked
from qtp.weights.store import ITEM_SIZE, Entry, Store, checked, read_header, runs


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, and the store that has it as a tensor of that box's shape."""

    box: Box
    store: Store


class Parts:
    """The tensors of all parts, under the names of Hugging Face, in the interface of a Store. What several parts hold is read
    from part `rank` where it has it. Opening reads the headers of all parts and no data.

    Raises ValueError naming the file if one is missing, truncated, or not the one that the manifest names.
    """

    def __init__(self, folder: Path, manifest: Manifest, rank: int = 0) -> None:
        self.folder, self.manifest = folder, manifest
        self.entries: dict[str, Entry] = {}
        self.pieces: dict[str, list[Piece]] = {}
        self._cells: dict[str, list[tuple[Box, Piece]]] = {}
        opened = [(file, _open(folder, file, manifest.names)) for file in manifest.files]
        self._stores = [store for _, store in opened]
        for file, store in [*opened[rank : rank + 1], *opened[:rank], *opened[rank + 1 :]]:
            for name, (shape, box) in _boxes(file, manifest.names).items():
                self.pieces.setdefault(name, []).append(Piece(box, store))
                entry = store.entries[name]
                self.entries.setdefault(name, Entry(entry.file, entry.dtype, shape, entry.offset))

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def bytes_read(self) -> int:
        return sum(store.bytes_read for store in self._stores)

    @property
    def files(self) -> list[Path]:
        return [self.folder / file.path for file in self.manifest.files]

    def check(self, name: str, shape: tuple[int, ...]) -> Entry:
        """As `Store.check`."""
        return checked(self.folder, self.entries, name, shape)

    def read_into(self, name: str, box: Box, buffer: memoryview) -> None:
        """As `Store.read_into`; what no part holds alone is put together, which needs as much memory again."""
        if not elements(box):
            return
        item = ITEM_SIZE[self.entries[name].dtype]
        for piece in self.pieces[name]:
            if _meet(piece.box, box) == box:
                piece.store.read_into(name, _within(piece.box, box), buffer)
                return
        for cell, piece in self.cells(name):
            common = _meet(cell, box)
            if not elements(common):
                continue
            places = list(runs(tuple(len(r) for r in box), _within(box, common)))
            size = elements(common) * item
            if len(places) == 1:
                start = places[0][0] * item
                piece.store.read_into(name, _within(piece.box, common), buffer[start : start + size])
                continue
            raw = memoryview(bytearray(size))
            piece.store.read_into(name, _within(piece.box, common), raw)
            for start, count, at in places:
                buffer[start * item : (start + count) * item] = raw[at * item : (at + count) * item]

    def stream(self, name: str, box: Box) -> Stream:
        """The compressed weight of a rank that holds just this box."""
        for piece in self.pieces[name]:
            if piece.box == box and isinstance(piece.store, CompressedStore):
                return piece.store.stream(name, tuple(range(len(r)) for r in box))
        raise ValueError(f"{self.folder}: tensor {name} is not compressed for these ranks; run qtp.sparse_compressor for them")

    def cells(self, name: str) -> list[tuple[Box, Piece]]:
        """Boxes that cover the whole tensor and do not overlap, each with a piece that holds it. ValueError if there are none."""
        if name not in self._cells:
            self._cells[name] = list(_cover(self.entries[name].shape, self.pieces[name], f"{self.folder}: tensor {name}"))
        return self._cells[name]

    def check_unchanged(self) -> None:
        """As `Store.check_unchanged`."""
        for store in self._stores:
            store.check_unchanged()

    def fingerprint(self) -> str:
        """As `Store.fingerprint`, of all parts."""
        content = [self.manifest.digest, *(store.fingerprint() for store in self._stores)]
        return hashlib.sha256("".join(content).encode()).hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for store in self._stores:
            store.close()


def _open(folder: Path, file: HeldFile, names: str) -> Store:
    """The tensors of one part under the names of Hugging Face."""
    path = folder / file.path
    told = f"that {folder / MANIFEST} names"
    if not path.is_file():
        raise ValueError(f"{path}: the part {told} is missing; copy it again, or cut the checkpoint again with qtp.reshard")
    if (size := path.stat().st_size) != file.size:
        raise ValueError(f"{path}: truncated or replaced: it has {size} bytes, the part {told} has {file.size}; copy it again")
    if header_digest(path) != file.header:
        raise ValueError(f"{path}: is not the part {told} but one of another cut or another source; copy the right one")
    store = store_of(folder, read_header(path)[0])
    entries = store.entries
    for name, held in file.tensors.items():
        entry = entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != (held.dtype, tuple(len(r) for r in held.box)):
            raise ValueError(f"{path}: tensor {name} is not as {folder / MANIFEST} says; cut the checkpoint again")
    if names == "mindformers":
        store.entries = unstacked(entries, {name: held.box[0].start for name, held in file.tensors.items() if is_stack(name)})
    return store


def header_digest(file: Path) -> str:
    """SHA-256 of a safetensors file's header, its length included. ValueError if it cannot be read."""
    try:
        with file.open("rb") as stream:
            head = stream.read(8)
            return hashlib.sha256(head + stream.read(min(int.from_bytes(head, "little"), file.stat().st_size))).hexdigest()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None


def _boxes(file: HeldFile, names: str) -> dict[str, tuple[tuple[int, ...], Box]]:
    """(whole shape, box) of each tensor, under the names of Hugging Face."""
    if names != "mindformers":
        return {name: (held.shape, held.box) for name, held in file.tensors.items()}
    found = {}
    for name, held in file.tensors.items():
        if is_stack(name):
            found.update({from_mindformers(name, e): (held.shape[1:], held.box[1:]) for e in held.box[0]})
        else:
            found[from_mindformers(name)] = (held.shape, held.box)
    return found


def _cover(shape: tuple[int, ...], pieces: Sequence[Piece], what: str) -> Iterator[tuple[Box, Piece]]:
    cuts = [sorted({0, n, *(edge for p in pieces for edge in (p.box[d].start, p.box[d].stop))}) for d, n in enumerate(shape)]
    for cell in product(*([range(a, b) for a, b in pairwise(c)] for c in cuts)):
        holder = next((piece for piece in pieces if _meet(piece.box, cell) == cell), None)
        if holder is None:
            raise ValueError(f"{what}: no part holds {[[r.start, r.stop] for r in cell]} of it; cut the checkpoint again")
        yield cell, holder


def _meet(a: Box, b: Box) -> Box:
    return tuple(range(max(r.start, s.start), max(r.start, s.start, min(r.stop, s.stop))) for r, s in zip(a, b, strict=True))


def _within(outer: Box, inner: Box) -> Box:
    """`inner` counted from where `outer` starts."""
    return tuple(range(s.start - r.start, s.stop - r.start) for r, s in zip(outer, inner, strict=True))

"""A file of W8A8SC, read as if its weights were not compressed.

Compressed are the weights `x.weight`, int8 and of one dimension, beside which there are `x.index` and `x.info` (docs/w8a8sc.md).
"""

import importlib
import threading
from pathlib import Path
from typing import Any

from qtp.layout.split import Box
from qtp.weights.store import ITEM_SIZE, Entry, Store

Stream = tuple[bytearray, bytearray, bytearray]  # data, index, info


class CompressedStore(Store):
    """A Store in which each compressed weight has the shape [n, k] that it comes from, and is expanded when it is read: each
    thread keeps the last one. `stream` gives it as it lies. ValueError if one is not whole."""

    def __init__(self, folder: Path, entries: dict[str, Entry]) -> None:
        names = compressed_names(entries)
        beside = {f"{name.removesuffix('.weight')}.{word}" for name in names for word in ("index", "info")}
        self._names = frozenset(names)
        self._raw = Store(folder, entries=entries)
        self._own = threading.local()
        super().__init__(folder, entries={name: entry for name, entry in entries.items() if name not in beside})
        for name in names:
            entry = entries[name]
            words = memoryview(self._bytes(f"{name.removesuffix('.weight')}.info")).cast("q")
            if len(words) != 5 or min(words[1:3]) < 0:
                raise ValueError(f"{entry.file}: {name} is no stream of W8A8SC; compress the checkpoint again")
            self.entries[name] = Entry(entry.file, entry.dtype, (words[1], words[2]), entry.offset)

    def stream(self, name: str, box: Box) -> Stream:
        assert box == tuple(range(n) for n in self.entries[name].shape), (name, box)
        own = name.removesuffix(".weight")
        return self._bytes(name), self._bytes(f"{own}.index"), self._bytes(f"{own}.info")

    def read_into(self, name: str, box: Box, buffer: memoryview) -> None:
        if name not in self._names:
            super().read_into(name, box, buffer)
            return
        if getattr(self._own, "name", None) != name:
            self._own.name, self._own.whole = name, self._expanded(name)
        rows, columns = box
        some = self._own.whole[rows.start : rows.stop, columns.start : columns.stop]
        buffer[:] = some.tobytes()

    def check_unchanged(self) -> None:
        super().check_unchanged()
        self._raw.check_unchanged()

    def close(self) -> None:
        super().close()
        self._raw.close()

    def _expanded(self, name: str) -> Any:
        """[n, k] in numpy's int8."""
        entry = self.entries[name]
        codec = importlib.import_module("qtp.weights.codec")  # it needs torch, which most users of a Store do without
        try:
            return codec.expanded(*self.stream(name, tuple(range(n) for n in entry.shape)), entry.shape)
        except ValueError as error:
            raise ValueError(f"{entry.file}: {name}: {error}; compress the checkpoint again") from None

    def _bytes(self, name: str) -> bytearray:
        entry = self._raw.entries[name]
        raw = bytearray(entry.shape[0] * ITEM_SIZE[entry.dtype])
        self._raw.read_into(name, (range(entry.shape[0]),), memoryview(raw))
        with self._lock:
            self.bytes_read += len(raw)
        return raw


def compressed_names(entries: dict[str, Entry]) -> list[str]:
    """Those of the compressed weights."""
    return [
        name
        for name, entry in entries.items()
        if name.endswith(".weight")
        and (entry.dtype, len(entry.shape)) == ("I8", 1)
        and _is(entries.get(f"{name.removesuffix('.weight')}.index"), "I8")
        and _is(entries.get(f"{name.removesuffix('.weight')}.info"), "I64")
    ]


def _is(entry: Entry | None, dtype: str) -> bool:
    return entry is not None and entry.dtype == dtype and len(entry.shape) == 1


def store_of(folder: Path, entries: dict[str, Entry]) -> Store:
    """The tensors of a file of a part."""
    return CompressedStore(folder, entries) if compressed_names(entries) else Store(folder, entries=entries)

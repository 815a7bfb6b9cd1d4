"""A checkpoint folder of safetensors files, read by boxes: no more bytes than a box holds. Imports no torch.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length of a JSON header, the header, the data.
Everything the header claims is checked against the file before anything is read.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

from qtp.layout.split import Box, elements

ITEM_SIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100_000_000
_SAMPLE = 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: file, safetensors dtype name, shape, byte offset in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


_State = tuple[int, int, int, int]  # device, inode, size, time of the last change: of a file


def encoded_header(metadata: dict[str, str], fields: Mapping[str, object]) -> bytes:
    """The first bytes of a safetensors file. fields: dtype, shape and data_offsets of each tensor by name."""
    text = json.dumps({"__metadata__": metadata, **fields}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Store:
    """The tensors of a folder by name. Files are opened once and read with positioned reads, so threads may share a Store.
    entries: where the tensors lie, if that is known already; then no header is read.

    stem: what the names of the weight files begin with. Raises ValueError naming the file or tensor, and the way out, if one is
    missing, truncated or malformed.
    """

    def __init__(self, folder: Path, stem: str = "model", entries: dict[str, Entry] | None = None) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        self._states: dict[Path, _State] = {}
        self.entries: dict[str, Entry] = {}
        if entries is not None:
            self.entries = entries
            self._states = {file: _state(file) for file in self.files}
            return
        files, weight_map = _files(folder, stem)
        for file in files:
            entries, self._states[file] = read_header(file)
            self.entries.update(entries)
        for name, file_name in weight_map.items():
            if name not in self.entries or self.entries[name].file.name != file_name:
                raise ValueError(
                    f"{folder / file_name}: tensor {name} that the index names is not in it; fetch the checkpoint again"
                )

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})

    def check(self, name: str, shape: tuple[int, ...]) -> Entry:
        """The entry of a tensor that must have this whole shape."""
        return checked(self.folder, self.entries, name, shape)

    def read_into(self, name: str, box: Box, buffer: memoryview) -> None:
        """Reads the elements of `box`, in row-major order, into `buffer` (bytes, exactly as long as the box)."""
        entry = self.entries[name]
        item = ITEM_SIZE[entry.dtype]
        assert buffer.nbytes == elements(box) * item, (name, box, buffer.nbytes)
        if not buffer.nbytes:
            return
        descriptor = self._open(entry.file)
        for start, count, at in runs(entry.shape, box):
            _read_fully(descriptor, buffer[at * item : (at + count) * item], entry.offset + start * item, entry.file)
        with self._lock:
            self.bytes_read += buffer.nbytes

    def stream(self, name: str, box: Box) -> tuple[bytearray, bytearray, bytearray]:
        raise ValueError(
            f"{self.folder}: tensor {name} is not compressed for these ranks; compressed weights lie in parts, which "
            "qtp.sparse_compressor makes"
        )

    def check_unchanged(self) -> None:
        """Raises ValueError if a file that was read from is not as it was when its header was read."""
        for file, descriptor in self._descriptors.items():
            if _state(descriptor) != self._states[file]:
                raise ValueError(f"{file}: changed while it was read; start again when it is complete")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def fingerprint(self) -> str:
        """A digest of the headers and of the first kilobytes of each file's data; reads no more than these."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name} {entry.dtype} {entry.shape} {entry.offset} {entry.file.name}".encode())
        for file in self.files:
            first = min(entry.offset for entry in self.entries.values() if entry.file == file)
            digest.update(os.pread(self._open(file), _SAMPLE, first))
        return digest.hexdigest()

    def _open(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
            return self._descriptors[file]


def checked(folder: Path, entries: dict[str, Entry], name: str, shape: tuple[int, ...]) -> Entry:
    """The entry of a tensor that must be there and have this whole shape; ValueError otherwise."""
    entry = entries.get(name)
    if entry is None:
        raise ValueError(f"{folder}: tensor {name} is missing; config.json and the weight files do not belong together")
    if entry.shape != shape:
        raise ValueError(
            f"{entry.file}: tensor {name} has shape {list(entry.shape)}, but config.json asks for {list(shape)}; "
            "config.json and the weight files do not belong together"
        )
    return entry


def runs(shape: tuple[int, ...], box: Box) -> Iterable[tuple[int, int, int]]:
    """The contiguous runs of a box: (first element in the tensor, how many, first element in the box)."""
    whole_from = len(shape)
    while whole_from > 0 and len(box[whole_from - 1]) == shape[whole_from - 1]:
        whole_from -= 1
    inner = prod(shape[whole_from:])
    if whole_from == 0:
        yield 0, inner, 0
        return
    last = box[whole_from - 1]
    starts = [0]
    for dim in range(whole_from - 1):
        starts = [s * shape[dim] + i for s in starts for i in box[dim]]
    count = len(last) * inner
    for number, start in enumerate(starts):
        yield (start * shape[whole_from - 1] + last.start) * inner, count, number * count


def _read_fully(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    while buffer.nbytes:
        got = os.preadv(descriptor, [buffer], offset)
        if got == 0:
            raise ValueError(f"{file}: ends in the middle of a tensor; fetch the file again")
        buffer, offset = buffer[got:], offset + got


def _files(folder: Path, stem: str) -> tuple[list[Path], dict[str, str]]:
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            if not all(isinstance(name, str) for name in names):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{index}: has no readable weight_map; fetch the file again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder / missing[0]}: file named by {index.name} is missing ({len(missing)} of {len(names)}); fetch it again"
            )
        return [folder / name for name in names], weight_map
    single = folder / f"{stem}.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob(f"{stem}-*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: holds no *.safetensors file; give a folder with the weights of the model")
    return files, {}


def _state(file: int | Path) -> _State:
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_header(file: Path) -> tuple[dict[str, Entry], _State]:
    """(what a safetensors file holds, how the file was then). ValueError as of a Store."""
    try:
        with file.open("rb") as stream:
            state = _state(stream.fileno())
            size = state[2]
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"{file}: truncated or not a safetensors file ({size} bytes); fetch the file again")
            text = stream.read(length)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: the header is not JSON; fetch the file again") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: the header is not an object; fetch the file again")
    header.pop("__metadata__", None)
    return {name: _entry(file, name, fields, 8 + length, size) for name, fields in header.items()}, state


def _entry(file: Path, name: str, fields: Any, data: int, size: int) -> Entry:
    try:
        dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{file}: the header entry of tensor {name} is malformed; fetch the file again")
    if dtype not in ITEM_SIZE:
        raise ValueError(f"{file}: tensor {name} has dtype {dtype!r}, which is not supported; convert the checkpoint to bfloat16")
    if stop - start != prod(shape) * ITEM_SIZE[dtype]:
        raise ValueError(f"{file}: tensor {name} has {stop - start} bytes for shape {list(shape)} {dtype}; fetch the file again")
    if data + stop > size:
        raise ValueError(
            f"{file}: truncated: tensor {name} ends at byte {data + stop} and the file at {size}; fetch the file again"
        )
    return Entry(file, dtype, shape, data + start)

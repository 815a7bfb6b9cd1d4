"""A checkpoint's weight files, written where each tensor belongs by whoever has it: names, types and shapes are known before.

Everything is written to a folder inside the target and moved out at the end, config.json last.
"""

import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from qtp.quantize.raw import as_bytes
from qtp.weights.dtypes import WORDS
from qtp.weights.store import ITEM_SIZE, encoded_header

PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written. dtype: safetensors' word; kind: its type in the description."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str

    @property
    def size(self) -> int:
        return prod(self.shape) * ITEM_SIZE[self.dtype]


class WeightFiles:
    """The files of `planned`, of at most max_bytes of data each (but that a tensor is never cut), in `folder`.

    One rank calls `create`; then any may `put`, from any thread, and all bytes of each tensor must be put once."""

    def __init__(self, folder: Path, stem: str, planned: Sequence[Planned], max_bytes: int) -> None:
        self._folder, self._stem, self.written = folder, stem, 0
        self._parts = parts = _parts(planned, max_bytes)
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._at: dict[str, tuple[Path, int, Planned]] = {}
        self._headers: dict[Path, bytes] = {}
        for number, part in enumerate(parts, start=1):
            path = folder / (f"{stem}.safetensors" if len(parts) == 1 else f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors")
            self._headers[path] = _header(part)
            at = len(self._headers[path])
            for tensor in part:
                self._at[tensor.name] = path, at, tensor
                at += tensor.size
        self.total = sum(tensor.size for tensor in planned)

    def create(self) -> None:
        """Raises ValueError if the disk has not the room."""
        free = shutil.disk_usage(self._folder).free
        if self.total > free:
            raise ValueError(f"{self._folder.parent}: {free / 1e9:.1f} GB are free, {self.total / 1e9:.1f} GB needed; make room")
        for (path, header), part in zip(self._headers.items(), self._parts, strict=True):
            with path.open("wb") as file:
                file.write(header)
                file.truncate(len(header) + sum(tensor.size for tensor in part))
        if len(self._parts) > 1:
            places = {name: path.name for name, (path, _, _) in self._at.items()}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
            write_json(self._folder / f"{self._stem}.safetensors.index.json", index)

    def put(self, name: str, x: Tensor, first: int = 0) -> None:
        """Rows of a tensor from `first` on, or all of it."""
        planned = self._at[name][2]
        assert WORDS[x.dtype] == planned.dtype, (name, x.dtype, planned)
        assert x.shape[1:] == planned.shape[1:], (name, x.shape, planned)
        self.put_bytes(name, as_bytes(x.contiguous()), first * prod(planned.shape[1:]) * ITEM_SIZE[planned.dtype])

    def put_bytes(self, name: str, raw: memoryview, offset: int = 0) -> None:
        """Bytes of a tensor from `offset` on."""
        path, at, planned = self._at[name]
        assert offset + raw.nbytes <= planned.size, name
        with self._lock:
            self.written += raw.nbytes
            descriptor = self._descriptors.get(path)
            if descriptor is None:
                descriptor = self._descriptors[path] = _opened(path)
        at += offset
        while raw.nbytes:
            done = os.pwrite(descriptor, raw, at)
            raw, at = raw[done:], at + done

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}); all ranks must see the folder that rank 0 made"
        ) from None


def _parts(planned: Sequence[Planned], max_bytes: int) -> list[list[Planned]]:
    parts: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if parts[-1] and size + tensor.size > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.size
    return parts


def _header(tensors: Sequence[Planned]) -> bytes:
    fields, at = {}, 0
    for tensor in tensors:
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (at, at + tensor.size)}
        at += tensor.size
    return encoded_header({"format": "pt"}, fields)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_target(source: Path, target: Path) -> None:
    """Raises ValueError if a checkpoint of `source` cannot be written to `target`."""
    if target.exists() and target.resolve() == source.resolve():
        raise ValueError(f"--save_directory {target}: is the model itself; name another folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--save_directory {target}: exists and is not an empty folder; name another one")


def begin(target: Path) -> Path:
    """The folder to write into. Raises ValueError if it cannot be made."""
    try:
        (target / PARTIAL).mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--save_directory {target}: cannot be made ({error.strerror}); name another folder") from None
    return target / PARTIAL


def finish(target: Path) -> None:
    """Moves everything to where it belongs, config.json last."""
    partial = target / PARTIAL
    for path in sorted(partial.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
        path.rename(target / path.name)
    partial.rmdir()


def undo(target: Path, existed: bool) -> None:
    """Leaves nothing of what `begin` made."""
    shutil.rmtree(target / PARTIAL, ignore_errors=True)
    if not existed and target.is_dir() and not any(target.iterdir()):
        target.rmdir()

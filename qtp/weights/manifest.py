"""What the resharder wrote, in a file beside it: `qtp_manifest.json`. It is written last, so a folder that has it is whole.

version     of this format
layout      "parts" (part{rank}-of-{world}/, each with the boxes of a rank) or "hf" (one folder of whole tensors)
names       "hf" or "mindformers": how tensors are called in the files
grid        {"tp"}, for a model with experts {"tp", "moe_ep", "moe_tp"}: the ranks that it was cut for
request     what the resharder was asked for, and of which source
files       for each file its path, size in bytes, SHA-256 of its header, and its tensors: name -> {dtype, shape (whole), box
            ([start, stop] a dimension), xxh3 (XXH3 with 128 bits of the box's bytes)}
digest      SHA-256 of all the rest
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtp.layout.split import Box, Grid

MANIFEST, JOURNAL = "qtp_manifest.json", "qtp_journal.jsonl"
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A tensor in a file: the box that lies there of a tensor of `shape`."""

    dtype: str
    shape: tuple[int, ...]
    box: Box
    xxh3: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldFile:
    """path: relative to the manifest's folder."""

    path: str
    size: int
    header: str
    tensors: dict[str, Held]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    layout: str
    names: str
    grid: dict[str, int]
    request: dict[str, Any]
    files: tuple[HeldFile, ...]

    def text(self) -> str:
        return json.dumps({**self._content(), "digest": self.digest}, indent=1) + "\n"

    @property
    def digest(self) -> str:
        return _digest(self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "layout": self.layout,
            "names": self.names,
            "grid": self.grid,
            "request": self.request,
            "files": [_told_file(file) for file in self.files],
        }

    @classmethod
    def load(cls, folder: Path) -> "Manifest | None":
        """That of a folder, None if it has none. ValueError if it was damaged or is of another version."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: damaged: it is not valid JSON; {_AGAIN}") from None
        if not isinstance(content, dict) or content.get("version") != VERSION:
            version = content.get("version") if isinstance(content, dict) else None
            raise ValueError(f"{path}: is of version {version}, this qtp reads version {VERSION}; {_AGAIN}")
        if content.pop("digest", None) != _digest(content):
            raise ValueError(f"{path}: damaged: it is not as it was written; {_AGAIN}")
        try:
            return cls(
                layout=content["layout"],
                names=content["names"],
                grid={key: int(n) for key, n in content["grid"].items()},
                request=dict(content["request"]),
                files=tuple(_heard_file(file) for file in content["files"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: malformed ({type(error).__name__}: {error}); {_AGAIN}") from None

    def is_for(self, grid: Grid) -> bool:
        """Whether it was cut for these ranks. How experts are cut does not matter to a model that has none."""
        return self.grid.items() <= grid_words(grid, sparse=True).items()


_AGAIN = "write the folder again with python -m qtp.reshard"


def grid_words(grid: Grid, *, sparse: bool) -> dict[str, int]:
    """A grid as a manifest has it; sparse: the model has experts."""
    return {"tp": grid.size, **({"moe_ep": grid.moe_ep, "moe_tp": grid.moe_tp} if sparse else {})}


def told_files(files: Sequence[HeldFile]) -> bytes:
    """As they travel between ranks."""
    return json.dumps([_told_file(file) for file in files]).encode()


def heard_files(told: bytes) -> list[HeldFile]:
    return [_heard_file(file) for file in json.loads(told)]


def _told_file(file: HeldFile) -> dict[str, Any]:
    tensors = {name: _told(held) for name, held in file.tensors.items()}
    return {"path": file.path, "size": file.size, "header": file.header, "tensors": tensors}


def _heard_file(told: dict[str, Any]) -> HeldFile:
    tensors = {name: _heard(held) for name, held in told["tensors"].items()}
    return HeldFile(path=told["path"], size=told["size"], header=told["header"], tensors=tensors)


def _told(held: Held) -> dict[str, Any]:
    box = [[r.start, r.stop] for r in held.box]
    return {"dtype": held.dtype, "shape": list(held.shape), "box": box, "xxh3": held.xxh3}


def _heard(held: dict[str, Any]) -> Held:
    box = tuple(range(start, stop) for start, stop in held["box"])
    return Held(dtype=held["dtype"], shape=tuple(held["shape"]), box=box, xxh3=held["xxh3"])


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

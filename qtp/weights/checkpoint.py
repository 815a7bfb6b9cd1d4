"""What weights are read from, whatever a folder holds: whole tensors in files, or the parts of the ranks. Imports no torch."""

from pathlib import Path
from typing import Protocol, Self

from qtp.layout.split import Box, Grid
from qtp.weights.compressed import Stream
from qtp.weights.manifest import JOURNAL, Manifest, grid_words
from qtp.weights.mindformers import is_mindformers, unstacked
from qtp.weights.parts import Parts
from qtp.weights.store import Entry, Store


class Checkpoint(Protocol):
    """Tensors by name, under the names of Hugging Face; see `Store`. Threads may share it."""

    folder: Path
    entries: dict[str, Entry]

    @property
    def bytes_read(self) -> int: ...

    @property
    def files(self) -> list[Path]: ...

    def check(self, name: str, shape: tuple[int, ...]) -> Entry: ...

    def read_into(self, name: str, box: Box, buffer: memoryview) -> None: ...

    def stream(self, name: str, box: Box) -> Stream: ...

    def check_unchanged(self) -> None: ...

    def fingerprint(self) -> str: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def open_checkpoint(folder: Path, stem: str = "model", grid: Grid | None = None, rank: int = 0) -> Checkpoint:
    """The tensors of a folder, which names and cut it may have. stem: see `Store`; grid: the ranks that are to hold them, if that
    matters; rank: whose part is read first. Reads headers only.

    Raises ValueError as a Store does, if a folder of parts is not complete, and if it was cut for another grid.
    """
    manifest = Manifest.load(folder)
    if manifest is None or manifest.layout != "parts":
        if manifest is None and (JOURNAL in _names(folder) or any(folder.glob("part*-of-*/"))):
            raise ValueError(
                f"{folder}: an unfinished reshard, or one without its manifest; run the same qtp.reshard command again"
            )
        store = Store(folder, stem)
        if is_mindformers(store.entries):
            store.entries = unstacked(store.entries)
        return store
    if grid is not None and not manifest.is_for(grid):
        words = grid_words(grid, sparse="moe_ep" in manifest.grid)
        was, needed = (", ".join(f"{key} {n}" for key, n in cut.items()) for cut in (manifest.grid, words))
        flags = " ".join(f"--{key} {n}" for key, n in words.items())
        command = f"python -m qtp.reshard --model {folder} --save_directory {folder}-tp{grid.size} {flags}"
        raise ValueError(f"{folder}: was cut for {was}, not for {needed}; run {command}")
    return Parts(folder, manifest, rank)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

"""A rank's tensors are the boxes of the checkpoint's, in its dtype, whatever the pieces; files that change are refused."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qtp.layout.spec import Part, Spec
from qtp.layout.split import Box, Even, Grid, OfRows, Replicate, Split
from qtp.weights import loader
from qtp.weights.loader import load
from qtp.weights.store import Store

FILE = "model.safetensors"
CPU = torch.device("cpu")
SHAPES: dict[str, tuple[tuple[int, ...], Split]] = {
    "a": ((13, 6), Even(0)),
    "b": ((5, 6), Even(0)),
    "c": ((7, 31), Even(1)),
    "d": ((17,), Even(0)),
    "e": ((9, 3), Replicate()),
    "f": ((11,), OfRows(Even(1), (11, 5), once=True)),
    "g": ((3, 5, 4), Even(1)),
}
PACKED = {"ab": ("a", "b"), "c": ("c",), "d": ("d",), "e": ("e",), "f": ("f",), "g": ("g",)}
SPECS = [Spec(name, tuple(Part(p, *SHAPES[p]) for p in parts)) for name, parts in PACKED.items()]


def content(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, _) in SHAPES.items()}


@pytest.mark.parametrize("piece", [1, 64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64])
def test_each_rank_gets_its_boxes(
    stored: torch.dtype, dtype: torch.dtype, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(stored)
    save_file(whole, str(tmp_path / FILE))
    monkeypatch.setattr(loader, "_PIECE", piece)
    for size in (1, 2, 3, 8):
        grid, joined = Grid.of(size), dict[str, list[Tensor]]()
        for rank in range(size):
            told: list[int] = []
            with Store(tmp_path) as store:
                shard = load(store, SPECS, rank, grid, dtype, CPU, told.append)
                assert sum(told) == store.bytes_read
            assert list(shard) == list(PACKED)
            for spec in SPECS:
                x = shard[spec.name]
                assert (x.dtype, tuple(x.shape), x.is_contiguous()) == (dtype, spec.shape(rank, grid), True)
                assert not x.numel() or x.data_ptr() % 64 == 0
                rows = 0
                for part in spec.parts:
                    box = part.split.box(part.shape, rank, grid)
                    expected = whole[part.name][tuple(slice(r.start, r.stop) for r in box)].to(dtype)
                    assert torch.equal(x[rows : rows + len(box[0])], expected), (spec.name, rank, size)
                    rows += len(box[0])
                joined.setdefault(spec.name, []).append(x)
        assert torch.equal(torch.cat(joined["c"], 1), whole["c"].to(dtype))


def test_conversion_needs_the_memory_of_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(content(torch.float32), str(tmp_path / FILE))
    monkeypatch.setattr(loader, "_PIECE", 128)
    asked = []
    real = Store.read_into

    def counted(self: Store, name: str, box: Box, into: memoryview) -> None:
        asked.append(into.nbytes)
        real(self, name, box, into)

    monkeypatch.setattr(Store, "read_into", counted)
    with Store(tmp_path) as store:
        load(store, SPECS, 0, Grid.of(1), torch.bfloat16, CPU)
    assert 64 < max(asked) <= 128
    assert sum(asked) == store.bytes_read


def test_pieces_are_read_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(content(torch.float32), str(tmp_path / FILE))
    together = threading.Barrier(2)
    real = Store.read_into

    def meeting(self: Store, *args: object) -> None:
        if not met.is_set():
            together.wait(30)
            met.set()
        real(self, *args)  # type: ignore[arg-type]

    met = threading.Event()
    monkeypatch.setattr(Store, "read_into", meeting)
    with Store(tmp_path) as store:
        load(store, SPECS, 0, Grid.of(1), torch.float32, CPU)
    assert met.is_set()


def test_what_progress_raises_ends_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another rank has died: the rest of the checkpoint is not read first."""
    save_file(content(torch.float32), str(tmp_path / FILE))
    monkeypatch.setattr(loader, "_PIECE", 4)
    begun = []
    real = Store.read_into
    told = threading.Event()

    def slow(self: Store, name: str, *args: object) -> None:
        begun.append(name)
        if len(begun) > 1:
            told.wait(30)
        real(self, name, *args)  # type: ignore[arg-type]

    def stop(count: int) -> None:
        threading.Timer(0.2, told.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "read_into", slow)
    with Store(tmp_path) as store, pytest.raises(KeyboardInterrupt):
        load(store, SPECS, 0, Grid.of(1), torch.float32, CPU, stop)
    assert len(begun) < 30 < sum(shape[0] for shape, _ in SHAPES.values())


def damaged(file: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(file, file.stat().st_size - 40)
    elif how == "written to":
        with file.open("r+b") as stream:
            stream.seek(-8, os.SEEK_END)
            stream.write(bytes(8))
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    else:
        other = file.with_name("other")
        other.write_bytes(file.read_bytes())
        other.rename(file)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["truncated", "written to", "replaced"])
def test_a_file_that_changes_after_its_header_was_read_is_refused(how: str, stored: torch.dtype, tmp_path: Path) -> None:
    save_file(content(stored), str(tmp_path / FILE))
    with Store(tmp_path) as store:
        damaged(tmp_path / FILE, how)
        with pytest.raises(ValueError, match=rf"{FILE}: (ends in the middle|changed while it was read)"):
            load(store, SPECS, 0, Grid.of(1), torch.bfloat16, CPU)


def test_a_file_replaced_after_it_was_opened_is_read_to_its_end(tmp_path: Path) -> None:
    whole = content(torch.float32)
    save_file(whole, str(tmp_path / FILE))
    with Store(tmp_path) as store:
        store.fingerprint()
        damaged(tmp_path / FILE, "replaced")
        assert torch.equal(load(store, SPECS, 0, Grid.of(1), torch.float32, CPU)["e"], whole["e"])

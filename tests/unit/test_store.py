"""The checkpoint reader reads exactly the box, from files that the safetensors library wrote, and refuses every broken file."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtp.layout.split import Box, elements
from qtp.weights.dtypes import TORCH_DTYPES
from qtp.weights.store import ITEM_SIZE, Store

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (5, 3), (4, 1, 6), (2, 3, 4, 5), (0,), (3, 0), (1, 9))
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits that the dtype can have (bool: 0 and 1)."""
    size, count = torch.empty((), dtype=dtype).element_size(), int(torch.Size(shape).numel())
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(high, (count * size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def tensors() -> dict[str, Tensor]:
    names = [(name, shape) for name in TORCH_DTYPES for shape in SHAPES]
    return {f"{name}.{'x'.join(map(str, shape))}": noise(shape, TORCH_DTYPES[name], i) for i, (name, shape) in enumerate(names)}


def some_box(shape: tuple[int, ...], rng: random.Random) -> Box:
    pairs = [sorted((rng.randint(0, n), rng.randint(0, n))) for n in shape]
    return tuple(range(n) if rng.random() < 0.3 else range(a, b) for (a, b), n in zip(pairs, shape, strict=True))


def read(store: Store, name: str, box: Box) -> bytes:
    buffer = bytearray(elements(box) * ITEM_SIZE[store.entries[name].dtype])
    store.read_into(name, box, memoryview(buffer))
    return bytes(buffer)


def sliced(x: Tensor, box: Box) -> bytes:
    """The bytes of a box by way of numpy's slicing of the raw bytes."""
    raw = x.contiguous().reshape(-1).view(torch.uint8).numpy().reshape(*x.shape, x.element_size())
    return raw[tuple(slice(r.start, r.stop) for r in box)].tobytes()


def sharded(folder: Path, content: dict[str, Tensor], files: int) -> dict[str, str]:
    weight_map = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(content)}
    for file in set(weight_map.values()):
        save_file({name: x for name, x in content.items() if weight_map[name] == file}, str(folder / file))
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}), encoding="utf-8")


@pytest.mark.parametrize("files", [0, 1, 3])
def test_boxes_equal_the_librarys(files: int, tmp_path: Path) -> None:
    content = tensors()
    weight_map = sharded(tmp_path, content, files) if files else dict.fromkeys(content, SINGLE)
    if not files:
        save_file(content, str(tmp_path / SINGLE), metadata={"format": "pt"})
    store, rng = Store(tmp_path), random.Random(files)
    assert len(store) == len(content) == len(TORCH_DTYPES) * len(SHAPES)
    for name, file in weight_map.items():
        with safe_open(str(tmp_path / file), "pt") as library:
            x = library.get_tensor(name)
        entry = store.check(name, tuple(x.shape))
        assert TORCH_DTYPES[entry.dtype] == x.dtype
        assert entry.file == tmp_path / file
        for box in [tuple(range(n) for n in x.shape), *(some_box(tuple(x.shape), rng) for _ in range(4))]:
            before, expected = store.bytes_read, sliced(x, box)
            assert read(store, name, box) == expected, (name, box)
            assert store.bytes_read - before == len(expected) == elements(box) * x.element_size()
    store.close()
    store.close()


def test_reads_nothing_but_the_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte asked of the system belongs to the box."""
    import os

    save_file({"w": noise((64, 50), torch.int16, 3)}, str(tmp_path / SINGLE))
    asked = 0

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal asked
        asked += sum(b.nbytes for b in buffers)
        return real(descriptor, buffers, offset)

    real = os.preadv
    monkeypatch.setattr(os, "preadv", counted)
    store = Store(tmp_path)
    read(store, "w", (range(10, 20), range(5, 9)))
    read(store, "w", (range(10, 20), range(50)))
    assert asked == store.bytes_read == 10 * 4 * 2 + 10 * 50 * 2


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    x = noise((9, 11), torch.float32, 4)
    save_file({"w": x}, str(tmp_path / SINGLE))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset))
    box = (range(2, 8), range(11))
    assert read(Store(tmp_path), "w", box) == sliced(x, box)


def test_other_file_names_need_no_index(tmp_path: Path) -> None:
    x, y = noise((3,), torch.int8, 1), noise((4,), torch.int8, 2)
    save_file({"a": x}, str(tmp_path / "first.safetensors"))
    save_file({"b": y}, str(tmp_path / "second.safetensors"))
    store = Store(tmp_path)
    assert read(store, "a", (range(3),)) == sliced(x, (range(3),))
    assert read(store, "b", (range(4),)) == sliced(y, (range(4),))


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    save_file({"w": noise((2, 3), torch.float32, 1)}, str(tmp_path / SINGLE))
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=r"tensor v is missing"):
        store.check("v", (2, 3))
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor w has shape \[2, 3\].*\[3, 2\]"):
        store.check("w", (3, 2))


def write_raw(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{never closed", r"model\.safetensors.*not JSON"),
    "not text": (b'{"\xff\xfe": 1}', r"model\.safetensors.*not JSON"),
    "empty": (b"", r"model\.safetensors.*not JSON"),
    "a list": ([1, 2], r"model\.safetensors.*not an object"),
    "a number": (7, r"model\.safetensors.*not an object"),
    "entry is a list": ({"w": [1]}, "tensor w"),
    "entry is null": ({"w": None}, "tensor w"),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, "tensor w"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, "tensor w"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2]}}, "tensor w"),
    "three offsets": ({"w": entry(offsets=(0, 4, 8))}, "tensor w"),
    "one offset": ({"w": entry(offsets=(8,))}, "tensor w"),
    "offsets are text": ({"w": entry(offsets=("0", "8"))}, "tensor w"),
    "offset is a fraction": ({"w": entry(offsets=(0, 8.0))}, "tensor w"),
    "offset is null": ({"w": entry(offsets=(None, 8))}, "tensor w"),
    "negative offset": ({"w": entry(offsets=(-8, 0))}, "tensor w"),
    "offsets backwards": ({"w": entry(offsets=(8, 0))}, "tensor w"),
    "too few bytes": ({"w": entry(offsets=(0, 4))}, r"tensor w has 4 bytes for shape \[2\] F32"),
    "too many bytes": ({"w": entry(shape=(1,))}, r"tensor w has 8 bytes for shape \[1\] F32"),
    "beyond the file": ({"w": entry(offsets=(4, 12))}, "truncated: tensor w"),
    "far beyond the file": ({"w": entry(shape=(2**61,), offsets=(0, 2**63))}, "truncated: tensor w"),
    "second one beyond": ({"v": entry(), "w": entry(offsets=(8, 16))}, "truncated: tensor w"),
    "negative length": ({"w": entry(shape=(-2,), offsets=(0, 8))}, "tensor w"),
    "two negative lengths": ({"w": entry(shape=(-2, -1))}, "tensor w"),
    "shape is a number": ({"w": entry(shape=2)}, "tensor w"),
    "shape is text": ({"w": entry(shape="2")}, "tensor w"),
    "unknown dtype": ({"w": entry(dtype="F4")}, r"tensor w has dtype 'F4'.*not supported"),
    "dtype is a list": ({"w": entry(dtype=["F32"])}, "tensor w"),
    "dtype is an object": ({"w": entry(dtype={})}, "tensor w"),
    "dtype is null": ({"w": entry(dtype=None)}, "tensor w"),
    "deeply nested": (b"[" * 200_000, r"model\.safetensors"),
    "an enormous number": (b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}", r"model\.safetensors"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused(case: str, tmp_path: Path) -> None:
    header, message = BAD_HEADERS[case]
    write_raw(tmp_path, header, bytes(range(8)))
    with pytest.raises(ValueError, match=message):
        Store(tmp_path)


@pytest.mark.parametrize("length", [10**6, 2**40, 2**63, 2**64 - 1, 3, 0])
def test_a_lying_header_length_is_refused(length: int, tmp_path: Path) -> None:
    write_raw(tmp_path, {"w": entry()}, bytes(8), length=length)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Store(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0", b"\0" * 7])
def test_a_file_without_a_header_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors.*truncated"):
        Store(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=folder.name + r".*no \*\.safetensors"):
            Store(folder)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    content = {"a": noise((5, 4), torch.float32, 1), "b": noise((33,), torch.bfloat16, 2), "c": noise((3, 3), torch.int8, 3)}
    save_file(content, str(tmp_path / SINGLE))
    whole = (tmp_path / SINGLE).read_bytes()
    for end in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            Store(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    save_file({"w": noise((64,), torch.float32, 1)}, str(tmp_path / SINGLE))
    store = Store(tmp_path)
    with (tmp_path / SINGLE).open("r+b") as stream:
        stream.truncate((tmp_path / SINGLE).stat().st_size - 10)
    assert len(read(store, "w", (range(61),))) == 244
    with pytest.raises(ValueError, match=r"model\.safetensors: ends in the middle"):
        read(store, "w", (range(64),))


def test_the_index_must_fit_the_files(tmp_path: Path) -> None:
    content = {f"t{i}": noise((4,), torch.int32, i) for i in range(6)}
    weight_map = sharded(tmp_path, content, 2)
    first, second = sorted(set(weight_map.values()))

    write_index(tmp_path, {**weight_map, "t9": first})
    with pytest.raises(ValueError, match=rf"{first}: tensor t9"):
        Store(tmp_path)
    write_index(tmp_path, {**weight_map, "t0": second})
    with pytest.raises(ValueError, match=rf"{second}: tensor t0"):
        Store(tmp_path)
    write_index(tmp_path, {**weight_map, "t9": "elsewhere.safetensors"})
    with pytest.raises(ValueError, match=r"elsewhere\.safetensors: file named by"):
        Store(tmp_path)
    write_index(tmp_path, weight_map)
    (tmp_path / second).unlink()
    with pytest.raises(ValueError, match=rf"{second}.*\(1 of 2\)"):
        Store(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"7", b"{}", b"\xff\xfe\0", b"[" * 200_000),
        *(
            b'{"weight_map": ' + x + b"}"
            for x in (b"5", b"[1]", b'{"w": [1]}', b'{"w": 3}', b'{"w": null}', b'{"w": 3, "v": "x"}')
        ),
    ],
    ids=range(13),
)
def test_a_bad_index_is_refused(content: bytes, tmp_path: Path) -> None:
    save_file({"w": noise((4,), torch.int32, 1)}, str(tmp_path / SINGLE))
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        Store(tmp_path)


def damage(header: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(header))
        kind = rng.randrange(4)
        if kind == 0:
            header[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            header[at] = rng.choice(b'0123456789"[]{},:-.eE \\nullI8\xff')
        elif kind == 2 and len(header) > 1:
            del header[at]
        else:
            header.insert(at, rng.choice(b'0123456789"[]{},:-'))


@pytest.mark.parametrize("target", ["anywhere", "text"])
def test_a_thousand_damaged_headers_are_refused_or_read_consistently(target: str, tmp_path: Path) -> None:
    """2,000 in all: with a wrong length, and with the length that fits the damaged text."""
    content = {"a": noise((3, 2), torch.float16, 1), "b": noise((5,), torch.int8, 2)}
    save_file(content, str(tmp_path / SINGLE))
    whole = (tmp_path / SINGLE).read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    rng, read_well, unnamed = random.Random(9), 0, 0
    for turn in range(1000):
        header = bytearray(whole[8:end] if target == "text" else whole[:end])
        damage(header, rng)
        damaged = (struct.pack("<Q", len(header)) if target == "text" else b"") + header + whole[end:]
        (tmp_path / SINGLE).write_bytes(damaged)
        try:
            store = Store(tmp_path)
        except ValueError as error:
            unnamed += SINGLE not in str(error)
            continue
        for name, found in store.entries.items():
            data = read(store, name, tuple(range(n) for n in found.shape))
            assert len(data) == int(torch.Size(found.shape).numel()) * ITEM_SIZE[found.dtype]
            assert data == damaged[found.offset : found.offset + len(data)], turn
        read_well += 1
        store.close()
    assert 0 < read_well < 1000
    assert unnamed == 0


def test_threads_share_a_store(tmp_path: Path) -> None:
    import threading

    content = {f"t{i}": noise((40, 30), torch.int16, i) for i in range(8)}
    sharded(tmp_path, content, 4)
    store, wrong = Store(tmp_path), []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            name = rng.choice(list(content))
            box = some_box((40, 30), rng)
            if read(store, name, box) != sliced(content[name], box):
                wrong.append((name, box))

    threads: list[threading.Thread] = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("change", [lambda f: shutil.rmtree(f), lambda f: (f / SINGLE).unlink()])
def test_a_file_that_vanished_is_named(change: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": noise((4,), torch.int32, 1)}, str(folder / SINGLE))
    store = Store(folder)
    change(folder)
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors"):
        read(store, "w", (range(4),))

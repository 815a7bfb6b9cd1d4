"""pytorch_model.bin and its kind: torch says where each tensor lies in the file, and it is read from there like any other.

The only place that calls torch.load: with weights_only, so nothing but tensors and plain containers can come of it, and with fake
tensors, so that nothing is read but the description.
"""

import json
from pathlib import Path
from typing import Any

from qtp.weights.store import ITEM_SIZE, Entry, Store

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def has_bins(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def open_bins(folder: Path) -> Store:
    """The tensors of a folder of .bin files. ValueError if one is missing or damaged, or holds anything but dense tensors."""
    entries: dict[str, Entry] = {}
    for file in _files(folder):
        entries.update(_entries(file))
    return Store(folder, entries=entries)


def _files(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{folder / INDEX}: has no readable weight_map; fetch the file again") from None
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: file named by {INDEX} is missing; fetch it again")
    return files


def _entries(file: Path) -> dict[str, Entry]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from qtp.weights.dtypes import WORDS

    try:
        with FakeTensorMode():
            content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # of many kinds: a damaged archive, a class that is not allowed, an old format
        first = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: cannot be read as tensors alone ({first}); convert it to safetensors") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not tensors by name; convert it to safetensors")
    size, found = file.stat().st_size, {}
    for name, x in content.items():
        if not isinstance(name, str) or not isinstance(x, torch.Tensor):
            raise ValueError(f"{file}: {name} is a {type(x).__name__}, and only tensors are taken; convert it to safetensors")
        if x.layout != torch.strided or x.dtype not in WORDS or not x.is_contiguous():
            how = f"{x.dtype}, {x.layout}, strides {x.stride() if x.layout == torch.strided else None}"
            raise ValueError(f"{file}: tensor {name} ({how}) is not a dense row-major tensor; convert it to safetensors")
        start = x.untyped_storage()._checkpoint_offset
        offset = (start if start is not None else size) + int(x.storage_offset()) * x.element_size()
        entry = Entry(file, WORDS[x.dtype], tuple(map(int, x.shape)), offset)
        if entry.offset + x.numel() * ITEM_SIZE[entry.dtype] > size:
            raise ValueError(f"{file}: tensor {name} does not lie in the file; fetch the file again")
        found[name] = entry
    return found

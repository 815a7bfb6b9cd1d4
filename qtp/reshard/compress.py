"""From W8A8S to W8A8SC: the parts of the ranks, each weight compressed after it was cut (docs/w8a8sc.md)."""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from collectives.communicator import Communicator
from qtp.config import ModelConfig
from qtp.layout.split import Box, Grid, elements
from qtp.reshard.cut import DIGEST_WIDTH, undeclared
from qtp.reshard.folder import beside, check_apart, put
from qtp.reshard.reshard import Request, reshard
from qtp.reshard.words import turned
from qtp.weights import codec
from qtp.weights.checkpoint import Checkpoint, open_checkpoint
from qtp.weights.dtypes import TORCH_DTYPES
from qtp.weights.manifest import MANIFEST, Held, HeldFile, Manifest, grid_words, heard_files, told_files
from qtp.weights.names import declare
from qtp.weights.parts import header_digest
from qtp.weights.store import ITEM_SIZE
from qtp.weights.verify import verify

Bar = Callable[[int, str], Callable[[int], None]]
STEM = "quant_model_weight_w8a8sc"


def check_target(model: ModelConfig, source: Path, target: Path, grid: Grid) -> None:
    """Raises ValueError if the source is no W8A8S checkpoint, cannot be cut so, or the target is not a new or empty folder."""
    if model.quantization is None or model.quantization.word not in ("w8a8s", "w8a8sc"):
        word = "a float checkpoint" if model.quantization is None else model.quantization.word
        raise ValueError(f"--model_path {source}: is {word}, and only w8a8s can be compressed; see python -m qtp.quantize")
    model.check_world(grid.size)
    check_apart(source, target)
    if not target.exists():
        return
    left = {f"part{rank}-of-{grid.size}" for rank in range(grid.size)} | {"config.json", *beside(source)}  # by an unfinished run
    if not target.is_dir() or any(p.name not in left and not p.name.startswith("quant_model_desc") for p in target.iterdir()):
        raise ValueError(f"--save_directory {target}: holds something already; choose a new or an empty folder")


def compressed(comm: Communicator, source: Path, target: Path, grid: Grid, threads: int, split: Path | None, bar: Bar) -> str:
    """Each rank of `comm` writes its part, or one rank those of all of `grid`; rank 0 the rest, and `split`, if it is given: the
    parts before they are compressed. All ranks must call it. Returns a line that says what came of it; on other ranks ""."""
    model = ModelConfig.load(source)
    check_target(model, source, target, grid)
    comm.barrier()  # all have looked before one writes
    if comm.rank == 0 and split is not None:
        reshard(Request(source=source, target=split, grid=grid, workers=threads), bar)
    mine = range(grid.size) if comm.size == 1 else (comm.rank,)
    files = _gathered(comm, [compress_part(model, source, target, grid, rank, threads, bar) for rank in mine])
    said = ""
    if comm.rank == 0:
        before, after = finish(model, source, target, grid, files)
        said = f"{target}: {len(files)} parts; {before} bytes became {after} ({after / max(before, 1):.3f})"
    comm.barrier()
    return said


def _gathered(comm: Communicator, files: Sequence[HeldFile]) -> list[HeldFile]:
    """Those of all ranks, by rank. Every rank must call it."""
    text = bytearray(told_files(files))
    sizes = comm.all_gather(torch.tensor([len(text)])).tolist()
    row = torch.zeros(1, max(sizes), dtype=torch.uint8)
    row[0, : len(text)] = torch.frombuffer(text, dtype=torch.uint8)
    rows = comm.all_gather(row)
    return [file for told, size in zip(rows, sizes, strict=True) for file in heard_files(bytes(told[:size].tolist()))]


def recompressed(request: Request, bar: Bar) -> tuple[int, int]:
    """W8A8SC for other ranks: expanded and cut in a folder beside the target, which is removed at the end, then compressed again.
    Returns as `finish`."""
    target, between = request.target, request.target.with_name(f"{request.target.name}.w8a8s")
    check_target(ModelConfig.load(request.source), request.source, target, request.grid)
    reshard(replace(request, target=between), bar)
    model = ModelConfig.load(between)
    files = [compress_part(model, between, target, request.grid, rank, request.workers, bar) for rank in range(request.grid.size)]
    sizes = finish(model, between, target, request.grid, files)
    shutil.rmtree(between)
    return sizes


def compress_part(model: ModelConfig, source: Path, target: Path, grid: Grid, rank: int, threads: int, bar: Bar) -> HeldFile:
    """Writes the part of `rank`; ValueError as of a Store. Memory: the part, compressed, and a weight for each thread."""
    assert model.quantization is not None
    types = model.quantization.types
    with open_checkpoint(source, model.weight_files) as store:
        specs = declare(model)
        verify(store, specs, grid)
        boxes = {part.name: (part.shape, part.split.box(part.shape, rank, grid)) for spec in specs for part in spec.parts}
        boxes = {name: (shape, box) for name, (shape, box) in boxes.items() if elements(box)}
        for name in undeclared(store, specs) if rank == 0 else ():
            boxes[name] = store.entries[name].shape, tuple(range(n) for n in store.entries[name].shape)
        progress = bar(sum(_bytes(store, name, box) for name, (_, box) in boxes.items()), f"part {rank}")

        def work(name: str) -> tuple[dict[str, Tensor], Held]:
            shape, box = boxes[name]
            raw = bytearray(_bytes(store, name, box))
            store.read_into(name, box, memoryview(raw))
            entry = store.entries[name]
            held = Held(dtype=entry.dtype, shape=shape, box=box, xxh3=xxhash.xxh3_128_hexdigest(raw))
            x = torch.frombuffer(raw, dtype=TORCH_DTYPES[entry.dtype]).view([len(r) for r in box])
            progress(len(raw))
            if types.get(name) not in ("W8A8S", "W8A8SC") or entry.dtype != "I8":
                return {name: x}, held
            own = name.removesuffix(".weight")
            return dict(zip((name, f"{own}.index", f"{own}.info"), codec.compress(x), strict=True)), held

        tensors: dict[str, Tensor] = {}
        told: dict[str, Held] = {}
        with ThreadPoolExecutor(threads, "compress") as pool:
            for name, (made, held) in zip(boxes, pool.map(work, boxes), strict=True):
                tensors |= made
                told[name] = held
        store.check_unchanged()
    path = f"part{rank}-of-{grid.size}/{STEM}.safetensors"
    sums = "".join(held.xxh3 for held in told.values())  # so that a part of another source has another header
    _save(tensors, target / path, hashlib.sha256(sums.encode()).hexdigest()[:DIGEST_WIDTH])
    return HeldFile(path=path, size=(target / path).stat().st_size, header=header_digest(target / path), tensors=told)


def _bytes(store: Checkpoint, name: str, box: Box) -> int:
    return elements(box) * ITEM_SIZE[store.entries[name].dtype]


def _save(tensors: dict[str, Tensor], path: Path, mark: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt", "qtp_part": path.parent.name, "qtp_cut": mark})
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def finish(model: ModelConfig, source: Path, target: Path, grid: Grid, files: Sequence[HeldFile]) -> tuple[int, int]:
    """Writes what is beside the weights, the manifest last. Returns the bytes of the parts' tensors before and now."""
    assert model.quantization is not None
    words = turned(source, Path(model.quantization.source))
    kept = {name: (source / name).read_bytes() for name in beside(source) if not name.startswith("quant_model_description")}
    for name, content in {**kept, **words}.items():  # config.json after all others
        put(target / name, content)
    sparse = model.moe is not None
    request = {"compressed": str(source.name), "grid": grid_words(grid, sparse=sparse)}
    manifest = Manifest(layout="parts", names="hf", grid=grid_words(grid, sparse=sparse), request=request, files=tuple(files))
    put(target / MANIFEST, manifest.text().encode())
    before = sum(elements(held.box) * ITEM_SIZE[held.dtype] for file in files for held in file.tensors.values())
    return before, sum(file.size for file in files)

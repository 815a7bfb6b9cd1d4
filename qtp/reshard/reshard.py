"""From a folder to a folder: what was asked, refused or done."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtp.config import ModelConfig
from qtp.layout.split import Grid
from qtp.quantization import Quantization
from qtp.reshard import folder, verify
from qtp.reshard.bins import has_bins, open_bins
from qtp.reshard.cut import DIGEST_WIDTH, Job, Output, in_files, in_parts, targets, undeclared
from qtp.reshard.journal import Journal, differing
from qtp.reshard.transfer import Convert, Transfer, as_it_is, write_fully
from qtp.reshard.words import turned
from qtp.weights.checkpoint import Checkpoint, open_checkpoint
from qtp.weights.manifest import JOURNAL, MANIFEST, Held, HeldFile, Manifest, grid_words
from qtp.weights.mindformers import is_mindformers, unstacked
from qtp.weights.names import declare
from qtp.weights.parts import Parts, header_digest
from qtp.weights.store import FLOATS, Store

WORDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
GIB = 1 << 30
_OWN = 160 << 20  # bytes of the process before it reads anything
_TORCH = 256 << 20  # and of torch, which converts and reads .bin files
_LONGEST = 2 << 20  # bytes of a read; 1 and 4 MiB take as long, half a MiB a little more

Progress = Callable[[int], None]
Bar = Callable[[int, str], Progress]  # (bytes in all, what is done) -> what is told of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """layout: "parts" or "hf"; names: "hf" or "mindformers"; dtype: a word of WORDS, None to keep what is stored; most: bytes of
    a file of layout "hf"; memory: bytes that the process may have in all; workers: threads that read and write."""

    source: Path
    target: Path
    grid: Grid
    layout: str = "parts"
    names: str = "hf"
    dtype: str | None = None
    most: int = 5 * 10**9
    memory: int = GIB
    workers: int = 2

    def words(self, source: Checkpoint, *, sparse: bool) -> dict[str, Any]:
        """What makes two requests the same one, beside the folder."""
        return {
            "source": source.fingerprint(),
            "state": _state(source.files),
            "format": self.layout,
            "names": self.names,
            "dtype": self.dtype or "as stored",
            "grid": grid_words(self.grid, sparse=sparse),
            **({"max_shard_size": self.most} if self.layout == "hf" else {}),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """bytes: of all tensors that were asked for; written: of those that this call wrote; kept: undeclared tensors."""

    files: int
    tensors: int
    bytes: int
    written: int
    kept: tuple[str, ...]


def open_source(source: Path, stem: str = "model") -> Checkpoint:
    """Whatever can be read: safetensors under either names, parts, .bin files. stem: see `Store`. Raises ValueError if
    it cannot."""
    if not source.is_dir():
        raise ValueError(f"model {source}: no such folder; give a checkpoint folder or a hub id such as Qwen/Qwen2.5-0.5B")
    if Manifest.load(source) is None and not any(source.glob("*.safetensors")) and has_bins(source):
        store = open_bins(source)
        return Store(source, entries=unstacked(store.entries)) if is_mindformers(store.entries) else store
    return open_checkpoint(source, stem)


def chunk_bytes(memory: int, workers: int, *, torch: bool) -> int:
    """How much may be read at once by each of `workers` threads, of which each needs it up to five times (what is read, put
    together and cut out, and converted to twice the width). Raises ValueError if that is next to nothing."""
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1")
    needed = _OWN + (_TORCH if torch else 0)
    chunk = (memory - needed) // (5 * workers)
    if chunk < 1 << 16:
        least = (needed + (5 * workers << 16)) / GIB
        raise ValueError(f"--max-memory {memory / GIB:g} is too little for {workers} workers; give {least:.2f} GiB or more")
    return min(chunk, _LONGEST)


def reshard(request: Request, bar: Bar) -> Outcome:
    """Writes request.target. What an earlier call of the same request has done is checked and kept.

    Raises ValueError for the user's mistakes before anything is written, and OSError, in a line that names the way out, if the
    disk is full or a file cannot be read; the same call then goes on from there.
    """
    model = ModelConfig.load(request.source)
    with open_source(request.source, model.weight_files) as source:
        model.check_world(request.grid.size)
        if model.moe is not None and request.grid.moe_ep > model.moe.num_experts:
            most = model.moe.num_experts
            raise ValueError(f"moe_ep {request.grid.moe_ep} is more than the {most} experts; use {most} or less")
        specs = declare(model)
        _check_dtype(request, source)
        chunk = chunk_bytes(request.memory, request.workers, torch=needs_torch(source, request.dtype))
        found = targets(source, specs, request.grid, request.names, WORDS[request.dtype] if request.dtype else None)
        kept = tuple(undeclared(source, specs))
        places: dict[str, str] = {}
        if request.layout == "parts":
            outputs, jobs = in_parts(found, request.grid.size, _stem(source))
        else:
            outputs, jobs, places = in_files(found, request.most, _stem(source))
        small = _small_files(request, model.quantization, outputs, places)
        folder.check_apart(request.source, request.target)
        words = request.words(source, sparse=model.moe is not None)
        total = sum(job.bytes for job in jobs)
        with folder.entered(request.target):
            folder.check_holds(request.target, outputs, small, source.files)
            written = 0
            if not _is_finished(request, words):
                try:
                    written = _write(request, source, outputs, jobs, small, words, chunk, bar(total, "reshard"))
                except OSError as error:
                    told = error.strerror or str(error)
                    raise OSError(f"{request.target}: {told}; the same command goes on from here when that is mended") from None
        return Outcome(files=len(outputs), tensors=len(jobs), bytes=total, written=written, kept=kept)


def verified(target: Path, source: Checkpoint | None, memory: int, workers: int, bar: Bar) -> Parts:
    """Proves that a folder is what its manifest says, and holds what `source` does if there is one. ValueError if not."""
    parts = verify.opened(target)
    entries = source.entries if source is not None else {}
    converted = any(entry.dtype != entries[name].dtype for name, entry in parts.entries.items() if name in entries)
    torch = source is not None and (converted or any(file.suffix == ".bin" for file in source.files))
    chunk = chunk_bytes(memory, workers, torch=torch)
    total = sum(file.size for file in parts.manifest.files)
    with parts:
        verify.check_sums(parts, chunk, workers, bar(total, "checksums"))
        if source is not None:
            verify.check_equal(parts, source, chunk, workers, converter(converted), bar(total, "compare"))
    return parts


def converter(needed: bool) -> Convert:
    if not needed:
        return as_it_is
    from qtp.reshard.convert import convert  # needs torch, which most reshards do without

    return convert


def needs_torch(source: Checkpoint, dtype: str | None) -> bool:
    """Whether torch is loaded for this: to convert, or since it has already read .bin files."""
    return dtype is not None or any(file.suffix == ".bin" for file in source.files)


def _check_dtype(request: Request, source: Checkpoint) -> None:
    if request.dtype is None:
        return
    if request.dtype not in WORDS:
        raise ValueError(f"--dtype {request.dtype!r} is not supported; choose {', '.join(WORDS)} or auto")
    for name, entry in source.entries.items():
        if entry.dtype not in FLOATS:
            raise ValueError(
                f"{entry.file}: tensor {name} is {entry.dtype}; --dtype converts float checkpoints only, leave it away"
            )


def _stem(source: Checkpoint) -> str:
    """How weight files are called: as those of the source if it is quantized, else model."""
    for file in source.files:
        if file.name.startswith("quant_model_weight_"):
            return file.name.removesuffix(".safetensors").partition("-")[0].replace("w8a8sc", "w8a8s")
    return "model"


def _state(files: Sequence[Path]) -> str:
    """A digest of names, sizes and times of the files that are read: a source may not change between two calls."""
    found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _small_files(
    request: Request, quantization: Quantization | None, outputs: Sequence[Output], places: dict[str, str]
) -> dict[str, bytes]:
    """What is written beside the weights, in that order; config.json comes last."""
    small = {name: (request.source / name).read_bytes() for name in folder.beside(request.source)}
    if len(outputs) > 1 and places:
        stem = outputs[0].path.partition("-")[0]
        total = sum(output.size - len(output.plain) for output in outputs)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        small[f"{stem}.safetensors.index.json"] = (json.dumps(index, indent=2) + "\n").encode()
    content = (request.source / "config.json").read_bytes()
    if quantization is not None and quantization.word == "w8a8sc":  # weights are expanded as they are read
        small.pop(Path(quantization.source).name)
        small |= turned(request.source, Path(quantization.source))
        content = small.pop("config.json")
    if request.dtype is not None:
        config = json.loads(content)
        config.update({key: request.dtype for key in ("dtype", "torch_dtype") if key in config} or {"torch_dtype": request.dtype})
        content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return {**small, "config.json": content}


def _is_finished(request: Request, words: dict[str, Any]) -> bool:
    """Whether the same request was carried out to its end. ValueError if another one was, or a file of it is gone since."""
    manifest = Manifest.load(request.target)
    if manifest is None:
        return False
    differing(request.target, manifest.request, words, "a finished reshard")
    Parts(request.target, manifest)
    (request.target / JOURNAL).unlink(missing_ok=True)  # where the end came between the two
    return True


def _write(
    request: Request,
    source: Checkpoint,
    outputs: list[Output],
    jobs: list[Job],
    small: dict[str, bytes],
    words: dict[str, Any],
    chunk: int,
    progress: Progress,
) -> int:
    journal = Journal(request.target, words)
    descriptors: list[int] = []
    lock, written = threading.Lock(), 0
    sums: dict[str, list[str]] = {}

    def done(job: Job, found: list[str]) -> None:
        nonlocal written
        journal.add(job.name, found)
        with lock:
            sums[job.name] = found
            written += job.bytes

    try:
        descriptors = folder.opened(request.target, outputs)
        transfer = Transfer(source, descriptors, chunk, request.workers, converter(request.dtype is not None))
        good = transfer.checked(jobs, journal.done, progress)
        sums.update((name, journal.done[name]) for name in good)
        entries = source.entries
        order = sorted(jobs, key=lambda job: (entries[job.sources[0]].file, entries[job.sources[0]].offset))
        transfer.run([job for job in order if job.name not in good], done, progress)
        source.check_unchanged()
        _finish(request, outputs, jobs, sums, descriptors, small, words)
    finally:
        journal.close()
        for descriptor in descriptors:
            os.close(descriptor)
    journal.remove()
    return written


def _finish(
    request: Request,
    outputs: list[Output],
    jobs: list[Job],
    sums: dict[str, list[str]],
    descriptors: list[int],
    small: dict[str, bytes],
    words: dict[str, Any],
) -> None:
    """Headers, small files, config.json and the manifest, each on the disk before the next, so that none of them promises what is
    not there."""
    assert sums.keys() == {job.name for job in jobs}
    text = json.dumps([words, sorted(sums.items())], sort_keys=True)
    mark = hashlib.sha256(text.encode()).hexdigest()[:DIGEST_WIDTH].encode()
    for descriptor, output in zip(descriptors, outputs, strict=True):
        write_fully(descriptor, mark.join(output.header) if output.header is not None else output.plain, 0)
        os.fsync(descriptor)
    for name, content in small.items():
        folder.put(request.target / name, content)
    tensors: list[dict[str, Held]] = [{} for _ in outputs]
    for job in jobs:
        for slot, xxh3 in zip(job.slots, sums[job.name], strict=True):
            tensors[slot.file][job.name] = Held(dtype=job.dtype, shape=job.shape, box=slot.box, xxh3=xxh3)
    files = [
        HeldFile(path=o.path, size=o.size, header=header_digest(request.target / o.path), tensors=held)
        for o, held in zip(outputs, tensors, strict=True)
    ]
    grid = words["grid"]
    manifest = Manifest(layout=request.layout, names=request.names, grid=grid, request=words, files=tuple(files))
    folder.put(request.target / MANIFEST, manifest.text().encode())

"""Fills the tensors of one rank from a checkpoint: each byte is read once, straight to where it stays.

Weights are not used from a mapped file: a file that shrinks under a mapping ends the process by a signal, and a core reads huge
pages 8 to 10 % faster than a mapped file's (rows by AVX-512 loads over 0.9 GB; 1 and 2 threads, medians of interleaved rounds).
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from qtp.layout.spec import COMPRESSED, FLOAT8, FLOAT32, INT8, INT32, SCALE_BITS, Spec
from qtp.layout.split import Box, Grid, elements
from qtp.weights import codec
from qtp.weights.checkpoint import Checkpoint
from qtp.weights.dtypes import TORCH_DTYPES
from qtp.weights.store import ITEM_SIZE

Shard = dict[str, Tensor]

_STREAM = (torch.int8, torch.int8, torch.int64)
_HELD = {
    FLOAT32: torch.float32,
    INT8: torch.int8,
    FLOAT8: torch.float8_e4m3fn,
    INT32: torch.int32,
    SCALE_BITS: torch.float32,
}

_PIECE = 8 << 20  # bytes of a read, and of what is converted at once
_READERS = 4  # threads; 2 and 4 alike took half the time of one from a disk, and less on the first touch of memory
_ROOM = 64 << 20  # bytes, of many streams and huge pages
_ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True, slots=True)
class _Piece:
    """Part of a checkpoint tensor, and where its values go: bytes of exactly the box's elements in `dtype`."""

    name: str
    box: Box
    dtype: torch.dtype
    into: memoryview


def load(
    store: Checkpoint,
    specs: Sequence[Spec],
    rank: int,
    grid: Grid,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int], None] = lambda count: None,
) -> Shard:
    """The tensors of `rank` by `Spec.name`, contiguous, in the dtypes of the specs; empty where it holds nothing. On a CPU they
    share one block of memory. `progress` is told, in the calling thread, the number of checkpoint bytes after each piece; what it
    raises ends the reading. Memory beyond the result: a piece of 8 MiB if dtype differs from the file's, one tensor if the device
    is not the CPU. Raises ValueError if a file ends early or changes meanwhile."""
    readers = ThreadPoolExecutor(_READERS, "reader")
    shard: Shard = {}
    try:
        for group in [specs] if device.type == "cpu" else [[spec] for spec in specs]:
            tensors, pieces = _laid_out(store, [spec for spec in group if spec.dtype != COMPRESSED], rank, grid, dtype)
            _fill(store, pieces, readers, progress)
            room = _Room()
            for spec in (spec for spec in group if spec.dtype == COMPRESSED):
                tensors |= _streams(store, spec, rank, grid, room, progress)
            shard.update((name, x.to(device)) for name, x in tensors.items())
    finally:
        readers.shutdown(cancel_futures=True)
    store.check_unchanged()
    return shard


def _laid_out(store: Checkpoint, specs: Sequence[Spec], rank: int, grid: Grid, dtype: torch.dtype) -> tuple[Shard, list[_Piece]]:
    """Tensors without their values yet, and the pieces that fill them."""
    starts = [0]
    for spec in specs:
        starts.append(starts[-1] + -(-spec.bytes(rank, grid, dtype.itemsize) // _ALIGNMENT) * _ALIGNMENT)
    memory = _memory(starts[-1])
    view = memoryview(memory)
    tensors: Shard = {}
    pieces = []
    for spec, start in zip(specs, starts, strict=False):
        at, held = start, _HELD.get(spec.dtype, dtype)
        for part in spec.parts:
            for box in _cut(part.split.box(part.shape, rank, grid), _PIECE // ITEM_SIZE[store.entries[part.name].dtype]):
                stop = at + elements(box) * held.itemsize
                pieces.append(_Piece(part.name, box, held, view[at:stop]))
                at = stop
        count = (at - start) // held.itemsize
        flat = torch.frombuffer(memory, dtype=held, count=count, offset=start) if count else torch.empty(0, dtype=held)
        tensors[spec.name] = flat.view(spec.shape(rank, grid))
    return tensors, pieces


class _Room:
    """Memory of tensors whose sizes are told one after the other. What is never written takes none."""

    def __init__(self) -> None:
        self._memory, self._at = _memory(0), 1  # full

    def copy(self, x: Tensor) -> Tensor:
        """x int8 [bytes], where it stays."""
        if self._at + len(x) > len(self._memory):
            self._memory, self._at = _memory(max(len(x), _ROOM)), 0
        placed = torch.frombuffer(self._memory, dtype=torch.int8, count=len(x), offset=self._at).copy_(x)
        self._at += -(-len(x) // _ALIGNMENT) * _ALIGNMENT
        return placed


def _streams(store: Checkpoint, spec: Spec, rank: int, grid: Grid, room: _Room, progress: Callable[[int], None]) -> Shard:
    """The parts of a compressed weight, which are one stream or several that follow each other (`codec.joined`): data, index and
    info of stream i are `spec.name`.i.data and so on."""
    tensors, streams = {spec.name: torch.empty(0, 0, dtype=torch.int8)}, []
    for part in spec.parts:
        box = part.split.box(part.shape, rank, grid)
        shape = len(box[0]), len(box[1])
        if elements(box):
            raw = store.stream(part.name, box)
            data, index, info = (torch.frombuffer(x, dtype=d) for x, d in zip(raw, _STREAM, strict=True))
            progress(sum(map(len, raw)))
            try:
                codec.check(data, index, info, shape)
            except ValueError as error:
                raise ValueError(f"{store.folder}: {part.name}: {error}; compress the checkpoint again") from None
        else:
            data, index, info = codec.compress(torch.empty(shape, dtype=torch.int8))
        streams.append((data, index, info))
    for i, (data, index, info) in enumerate(codec.joined(streams)):
        tensors |= {f"{spec.name}.{i}.{name}": x for name, x in (("data", room.copy(data)), ("index", index), ("info", info))}
    return tensors


def _memory(size: int) -> mmap.mmap:
    """Fresh private memory, in huge pages where the system has them. It is freed with the last tensor that lies in it."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without them
            pass
    return memory


def _cut(box: Box, most: int) -> Iterator[Box]:
    """A box in pieces along dimension 0, of at most `most` elements where one row is not more."""
    if not elements(box):
        return
    if not box:
        yield box
        return
    rows, rest = box[0], box[1:]
    step = max(1, most // elements(rest))
    for first in range(rows.start, rows.stop, step):
        yield (range(first, min(first + step, rows.stop)), *rest)


def _fill(store: Checkpoint, pieces: Sequence[_Piece], readers: ThreadPoolExecutor, progress: Callable[[int], None]) -> None:
    as_stored = [piece for piece in pieces if TORCH_DTYPES[store.entries[piece.name].dtype] == piece.dtype]
    for count in readers.map(lambda piece: _read(store, piece), as_stored):
        progress(count)
    for piece in pieces:
        if TORCH_DTYPES[store.entries[piece.name].dtype] != piece.dtype:
            progress(_convert(store, piece))


def _read(store: Checkpoint, piece: _Piece) -> int:
    store.read_into(piece.name, piece.box, piece.into)
    return piece.into.nbytes


def _convert(store: Checkpoint, piece: _Piece) -> int:
    stored = TORCH_DTYPES[store.entries[piece.name].dtype]
    raw = bytearray(elements(piece.box) * stored.itemsize)
    store.read_into(piece.name, piece.box, memoryview(raw))
    values = torch.frombuffer(raw, dtype=stored)
    if stored == torch.int64:
        if not bool((values >> 31 == 0).all()):
            raise ValueError(
                f"{store.entries[piece.name].file}: tensor {piece.name} holds integers that are no bits of a float32 above 0"
            )
        values = values.to(torch.int32).view(torch.float32)
    torch.frombuffer(piece.into, dtype=piece.dtype).copy_(values)
    return len(raw)

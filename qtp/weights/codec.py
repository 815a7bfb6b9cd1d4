"""The codec of W8A8SC: int8 matrices most of whose values are -8 ... 7, in little more than 4 bits a value, to be computed from.

docs/w8a8sc.md describes every byte; native/sparse.cpp computes from it. A matrix [n, k] is cut into blocks of 16 rows. A narrow
block holds a 4-bit code for each value, and the outliers: columns, and differences of the values to what their codes say. A wide
block holds two codes for each value. Lossless for every int8 matrix. Streams are little-endian.

An item is what counts and columns are stored in: 2 bytes, or 4 where k > 65536. A code row is the codes of a row, (k + 1) // 2
bytes.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VERSION = int.from_bytes(b"qtp-sc\x01\x00", "little")
BLOCK = 16  # rows
GROUP = 128  # columns, whose codes are 64 bytes: of the first half in the low bits, of the other half in the high ones
ALIGN = 64  # blocks begin at multiples of this; so many zeros follow the last one, for vectors that are read beyond its end
_CHUNK = 1 << 19  # values that are worked on at once
_LIMIT = 1 << 31

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]
Compressed = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Stream:
    """A stream whose index is right, so that every block is where it says. offsets [blocks + 1]; wide [blocks]."""

    n: int
    k: int
    data: Bytes
    offsets: Numbers
    wide: NDArray[np.bool_]

    @property
    def code_row(self) -> int:
        return (self.k + 1) // 2

    @property
    def item(self) -> int:
        return _item(self.k)

    def rows_in(self, blocks: Numbers) -> Numbers:
        return np.minimum(BLOCK, self.n - BLOCK * blocks)

    def chunks(self) -> Iterator[range]:
        """All blocks, some at a time."""
        step = max(1, _CHUNK // (BLOCK * self.k + 1))
        return (range(at, min(at + step, len(self.wide))) for at in range(0, len(self.wide), step))


def compress(weight: Tensor) -> Compressed:
    """data int8 [bytes], index int8 [8 (blocks + 1)], info int64 [5] of a weight int8 [n, k] on the CPU."""
    n, k = weight.shape
    if weight.dtype != torch.int8 or max(n, k) >= _LIMIT:
        raise ValueError(f"W8A8SC: a weight {weight.dtype} {(n, k)} cannot be compressed; it must be int8, below 2^31 each way")
    values = weight.contiguous().numpy()
    pieces: list[Bytes] = []
    entries, at = [], 0
    step = BLOCK * max(1, _CHUNK // (BLOCK * k + 1))
    for first in range(0, n, step):
        for wide, parts in _encoded(values[first : first + step]):
            entries.append(at | wide)
            size = sum(len(part) for part in parts)
            pieces += parts
            pieces.append(np.zeros(-size % ALIGN, np.uint8))
            at += size + -size % ALIGN
    data = np.concatenate([*pieces, np.zeros(ALIGN, np.uint8)])
    return _sealed(n, k, data, np.array([*entries, at], "<i8"))


def decompress(data: Tensor, index: Tensor, info: Tensor) -> Tensor:
    """The weight int8 [n, k]. Raises ValueError for what `check` refuses."""
    stream = _checked(data, index, info, None)
    weight = np.empty((stream.n, stream.k), np.int8)
    for blocks in stream.chunks():
        _decode(stream, blocks, weight[BLOCK * blocks.start : BLOCK * blocks.stop])
    return torch.from_numpy(weight)


def check(data: Tensor, index: Tensor, info: Tensor, shape: tuple[int, int]) -> None:
    """Raises ValueError, in one line that names what is wrong, unless this is a whole stream of a matrix of this shape."""
    _checked(data, index, info, shape)


def expanded(data: bytearray, index: bytearray, info: bytearray, shape: tuple[int, int]) -> NDArray[np.int8]:
    """The matrix of a stream in raw bytes. ValueError as `check`."""
    bytes_, entries = (torch.frombuffer(raw, dtype=torch.int8) for raw in (data, index))
    numbers = torch.frombuffer(info, dtype=torch.int64)
    check(bytes_, entries, numbers, shape)
    whole: NDArray[np.int8] = decompress(bytes_, entries, numbers).numpy()
    return whole


def cut(data: Tensor, index: Tensor, info: Tensor, start: int, stop: int) -> Compressed:
    """Rows start ... stop - 1 of a stream, by slicing bytes. Both must be multiples of 16, or n; the stream must be one that
    `check` accepts."""
    n, k = int(info[1]), int(info[2])
    if not 0 <= start <= stop <= n or any(row % BLOCK and row != n for row in (start, stop)):
        raise ValueError(f"W8A8SC: rows {start} ... {stop} of {n} cannot be cut out; cut at multiples of {BLOCK}")
    entries = _numbers(index)
    first, last = -(-start // BLOCK), -(-stop // BLOCK)
    begin, end = int(entries[first]) // ALIGN * ALIGN, int(entries[last]) // ALIGN * ALIGN
    part = np.concatenate([_bytes(data)[begin:end], np.zeros(ALIGN, np.uint8)])
    part_entries = np.array([*(entries[first:last] - begin), end - begin], "<i8")
    return _sealed(stop - start, k, part, part_entries)


def joined(streams: Sequence[Compressed]) -> list[Compressed]:
    """Streams of equal k, put one after the other wherever the rows of the first are a multiple of 16. They must be ones that
    `check` accepts."""
    runs: list[list[Compressed]] = []
    for stream in streams:
        if runs and int(runs[-1][-1][2][1]) % BLOCK == 0:
            runs[-1].append(stream)
        else:
            runs.append([stream])
    return [_joined(run) if len(run) > 1 else run[0] for run in runs]


def _joined(streams: Sequence[Compressed]) -> Compressed:
    pieces, entries, at = [], [], 0
    for data, index, _ in streams:
        pieces.append(_bytes(data)[:-ALIGN])
        entries.append(_numbers(index)[:-1] + at)
        at += len(pieces[-1])
    (k,) = {int(info[2]) for _, _, info in streams}
    whole = np.concatenate([*pieces, np.zeros(ALIGN, np.uint8)])
    return _sealed(sum(int(info[1]) for _, _, info in streams), k, whole, np.concatenate([*entries, [at]]).astype("<i8"))


def sealed(data: Tensor, index: Tensor, info: Tensor) -> Tensor:
    """info with the checksum that belongs to all the rest."""
    return torch.tensor([*info[:4].tolist(), _checksum(_bytes(data), _bytes(index), info[:4].numpy())], dtype=torch.int64)


def _item(k: int) -> int:
    return 2 if k <= 65536 else 4


def _bytes(tensor: Tensor) -> Bytes:
    array: Bytes = tensor.contiguous().numpy().view(np.uint8)
    return array


def _numbers(index: Tensor) -> Numbers:
    return np.frombuffer(_bytes(index).tobytes(), "<i8")


def _checksum(data: Bytes, index: Bytes, info: Numbers) -> int:
    return zlib.crc32(data.data, zlib.crc32(index.data, zlib.crc32(info.astype("<i8").tobytes())))


def _sealed(n: int, k: int, data: Bytes, entries: Numbers) -> Compressed:
    index = torch.from_numpy(np.frombuffer(bytearray(entries.tobytes()), np.int8))
    info = torch.tensor([VERSION, n, k, len(data), 0], dtype=torch.int64)
    stream = torch.from_numpy(data.view(np.int8))
    return stream, index, sealed(stream, index, info)


def _pack(codes: Bytes) -> Bytes:
    """[rows, k] codes 0 ... 15 to [rows, (k + 1) // 2]."""
    rows, k = codes.shape
    groups = k // GROUP
    whole = groups * GROUP
    packed = np.empty((rows, (k + 1) // 2), np.uint8)
    pairs = codes[:, :whole].reshape(rows, groups, 2, GROUP // 2)
    into = packed[:, : whole // 2].reshape(rows, groups, GROUP // 2)
    np.left_shift(pairs[:, :, 1], 4, out=into)
    into |= pairs[:, :, 0]
    rest, half = codes[:, whole:], (k - whole + 1) // 2
    packed[:, whole // 2 :] = rest[:, :half]
    packed[:, whole // 2 : whole // 2 + k - whole - half] |= rest[:, half:] << 4
    return packed


def _unpack(packed: Bytes, k: int) -> Bytes:
    """What `_pack` was given."""
    rows, groups = len(packed), k // GROUP
    whole = groups * GROUP
    codes = np.empty((rows, k), np.uint8)
    pairs = packed[:, : whole // 2].reshape(rows, groups, GROUP // 2)
    into = codes[:, :whole].reshape(rows, groups, 2, GROUP // 2)
    np.bitwise_and(pairs, 15, out=into[:, :, 0])
    np.right_shift(pairs, 4, out=into[:, :, 1])
    rest, half = packed[:, whole // 2 :], (k - whole + 1) // 2
    codes[:, whole : whole + half] = rest & 15
    codes[:, whole + half :] = rest[:, : k - whole - half] >> 4
    return codes


def _encoded(values: NDArray[np.int8]) -> Iterator[tuple[bool, list[Bytes]]]:
    """Of each block of some rows: whether it is wide, and the parts of it."""
    rows, k = values.shape
    item, code_row = _item(k), (k + 1) // 2
    near = np.clip(values, -8, 7)
    places = np.flatnonzero(near != values)
    owners, columns = np.divmod(places, max(k, 1))
    counts = np.bincount(owners, minlength=rows)
    stored_counts, stored_columns = (x.astype(f"<u{item}").view(np.uint8) for x in (counts, columns))
    differences = (values.reshape(-1)[places] - near.reshape(-1)[places]).view(np.uint8)
    near += 8
    codes = _pack(near.view(np.uint8)).reshape(-1)
    end = 0
    for first in range(0, rows, BLOCK):
        last = min(first + BLOCK, rows)
        begin, end = end, end + int(counts[first:last].sum())
        if (last - first) * item + (end - begin) * (item + 1) > (last - first) * code_row:
            raised: Bytes = values[first:last].view(np.uint8) ^ np.uint8(128)
            yield True, [_pack(half).reshape(-1) for half in (raised >> np.uint8(4), raised & np.uint8(15))]
        else:
            narrow = [codes[first * code_row : last * code_row], stored_counts[first * item : last * item]]
            yield False, [*narrow, stored_columns[begin * item : end * item], differences[begin:end]]


def _items(data: Bytes, places: Numbers, item: int) -> Numbers:
    """The numbers of `item` bytes that lie at these places."""
    numbers = np.zeros(len(places), np.int64)
    for byte in range(item):
        numbers |= data[places + byte].astype(np.int64) << 8 * byte
    return numbers


def _within(counts: Numbers) -> Numbers:
    """0 ... count - 1 for each count."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


@dataclass(frozen=True, slots=True)
class _Narrow:
    """The narrow ones among some blocks. blocks [B], their heights in rows [B], their outliers [B]; rows [R] of the matrix, their
    outliers counts [R]."""

    blocks: Numbers
    heights: Numbers
    outliers: Numbers
    rows: Numbers
    counts: Numbers

    @classmethod
    def of(cls, stream: _Stream, chosen: range) -> "_Narrow":
        every = np.arange(chosen.start, chosen.stop)
        blocks = every[~stream.wide[chosen.start : chosen.stop]]
        heights = stream.rows_in(blocks)
        within = _within(heights)
        rows = BLOCK * np.repeat(blocks, heights) + within
        starts = stream.offsets[blocks] + heights * stream.code_row
        counts = _items(stream.data, np.repeat(starts, heights) + within * stream.item, stream.item)
        outliers = np.add.reduceat(counts, np.cumsum(heights) - heights) if len(blocks) else np.zeros(0, np.int64)
        return cls(blocks, heights, outliers, rows, counts)

    def find(self, stream: _Stream) -> tuple[Numbers, Numbers, NDArray[np.int8]]:
        """Rows, columns and differences of all outliers."""
        starts = stream.offsets[self.blocks] + self.heights * (stream.code_row + stream.item)
        within = _within(self.outliers)
        columns = _items(stream.data, np.repeat(starts, self.outliers) + within * stream.item, stream.item)
        places = np.repeat(starts + self.outliers * stream.item, self.outliers) + within
        return np.repeat(self.rows, self.counts), columns, stream.data[places].view(np.int8)


def _decode(stream: _Stream, blocks: range, weight: NDArray[np.int8]) -> None:
    """Some blocks of a stream that was checked, into their rows of the weight."""
    k, code_row = stream.k, stream.code_row
    every = np.arange(blocks.start, blocks.stop)
    heights, wide = stream.rows_in(every), stream.wide[blocks.start : blocks.stop]
    code_rows = heights * (1 + wide)
    places = zip(stream.offsets[every].tolist(), (code_rows * code_row).tolist(), strict=True)
    packed = np.concatenate([stream.data[at : at + size] for at, size in places])
    codes = _unpack(packed.reshape(int(code_rows.sum()), code_row), k)
    if wide.any():
        starts = np.cumsum(code_rows) - code_rows
        within = _within(heights)
        first, is_wide = np.repeat(starts, heights) + within, np.repeat(wide, heights)
        low = codes[(first + np.repeat(heights, heights))[is_wide]]
        codes = codes[first]
        codes[is_wide] = (codes[is_wide] << 4 | low) - 120  # less the 8 below, modulo 256
    np.subtract(codes, 8, out=weight.view(np.uint8))
    rows, columns, differences = _Narrow.of(stream, blocks).find(stream)
    weight.reshape(-1)[(rows - BLOCK * blocks.start) * k + columns] += differences


def _require(condition: Any, what: str) -> None:
    if not condition:
        raise ValueError(f"W8A8SC: {what}")


def _checked(data: Tensor, index: Tensor, info: Tensor, shape: tuple[int, int] | None) -> _Stream:
    for name, tensor, dtype in (("data", data, torch.int8), ("index", index, torch.int8), ("info", info, torch.int64)):
        _require(tensor.dtype == dtype and tensor.dim() == 1, f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} [..]")
    _require(len(info) == 5, f"info holds {len(info)} numbers, not 5")
    version, n, k, length, checksum = info.tolist()
    _require(version == VERSION, f"info begins with {version:#x}, not {VERSION:#x}: another codec or version made it")
    _require(0 <= n < _LIMIT and 0 <= k < _LIMIT, f"info says {n} x {k}")
    _require(shape is None or (n, k) == tuple(shape), f"info says {n} x {k}, but the weight is {shape}")
    _require(len(data) == length, f"data holds {len(data)} bytes, not the {length} that info says")
    blocks = -(-n // BLOCK)
    _require(len(index) == 8 * (blocks + 1), f"index holds {len(index)} bytes, not the {8 * (blocks + 1)} of {n} rows")
    _require(checksum == _checksum(_bytes(data), _bytes(index), info[:4].numpy()), "the checksum does not match: bytes changed")
    entries = _numbers(index)
    stream = _Stream(n, k, _bytes(data), entries & ~1, (entries[:-1] & 1).astype(bool))
    _check_index(stream, entries)
    for chosen in stream.chunks():
        _check_blocks(stream, chosen)
    return stream


def _check_index(stream: _Stream, entries: Numbers) -> None:
    """Every block begins in data, behind the one before it, and has room for what it must hold."""
    end = len(stream.data) - ALIGN
    _require(end >= 0 and not stream.data[end:].any(), f"data does not end with {ALIGN} zeros")
    _require((stream.offsets % ALIGN == 0).all() and entries[-1] & 1 == 0, "index holds an offset that no block can have")
    ends = entries[0] // 2 == 0 and entries[-1] == end
    _require(ends, f"index says that blocks reach from {entries[0]} to {entries[-1]}, not from 0 to {end}")
    blocks = np.arange(len(stream.wide))
    _require(((stream.offsets >= 0) & (stream.offsets <= end)).all(), "index holds an offset outside of data")
    sizes, heights = np.diff(stream.offsets), stream.rows_in(blocks)
    needed = heights * np.where(stream.wide, 2 * stream.code_row, stream.code_row + stream.item)
    bad = np.flatnonzero(np.where(stream.wide, sizes != needed + -needed % ALIGN, sizes < needed))
    _require(not len(bad), f"block {bad[0] if len(bad) else 0} has another size than its rows")


def _check_blocks(stream: _Stream, chosen: range) -> None:
    """All that blocks hold beside their codes is what `compress` could have written, for some matrix."""
    k, item, code_row = stream.k, stream.item, stream.code_row
    narrow = _Narrow.of(stream, chosen)
    needed = narrow.heights * (code_row + item) + narrow.outliers * (item + 1)
    sizes = stream.offsets[narrow.blocks + 1] - stream.offsets[narrow.blocks]
    bad = narrow.blocks[sizes != needed + -needed % ALIGN]
    _require(not len(bad), f"block {bad[0] if len(bad) else 0} has another size than its outliers")
    bad = narrow.blocks[needed > 2 * narrow.heights * code_row]
    _require(not len(bad), f"block {bad[0] if len(bad) else 0} is narrow and larger than if it were wide")

    every = np.arange(chosen.start, chosen.stop)
    used = 2 * stream.rows_in(every) * code_row
    used[narrow.blocks - chosen.start] = needed
    gaps = stream.offsets[every + 1] - stream.offsets[every] - used
    within = _within(gaps)
    _require(not stream.data[np.repeat(stream.offsets[every] + used, gaps) + within].any(), "bytes between blocks are not zero")

    rows, columns, differences = narrow.find(stream)
    _require((columns < k).all(), f"an outlier is in column {int(columns.max(initial=0))} of {k}")
    _require(((np.diff(columns) > 0) | (np.diff(rows) > 0)).all(), "the outliers of a row are not in the order of their columns")
    places = stream.offsets[rows // BLOCK] + rows % BLOCK * code_row
    codes = _codes(stream, places, columns)
    below = (codes == 0) & (differences < 0) & (differences >= -120)
    above = (codes == 15) & (differences > 0) & (differences <= 120)
    _require((below | above).all(), "an outlier does not go with its code")
    if k % 2:
        counts = stream.rows_in(every) * (1 + stream.wide[chosen.start : chosen.stop])
        within = _within(counts)
        last = stream.data[np.repeat(stream.offsets[every], counts) + within * code_row + code_row - 1]
        _require(not (last >> 4).any(), "the code behind the last column of an odd row is not zero")


def _codes(stream: _Stream, places: Numbers, columns: Numbers) -> Bytes:
    """The codes of these columns in the code rows at these places."""
    whole = stream.k // GROUP * GROUP
    half = np.where(columns < whole, GROUP // 2, (stream.k - whole + 1) // 2)
    start = np.minimum(columns // GROUP * GROUP, whole)
    high = columns - start >= half
    codes: Bytes = stream.data[places + start // 2 + columns - start - np.where(high, half, 0)] >> (4 * high).astype(np.uint8)
    return codes & np.uint8(15)

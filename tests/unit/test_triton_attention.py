"""Paged attention in Triton against float64: steps of any mix, contexts in any number of parts, caches in floats and in int8."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graph_helper import replayed
from torch import Tensor
from triton_helper import DEVICE, poison

from attention_helper import (  # isort: skip
    LAYER,
    NAN,
    Paged,
    Sequences,
    bound,
    check_codes,
    dequantized_attention,
    scales_of,
    with_outliers,
)
from qtp.attention import triton_backend
from qtp.attention.torch_backend import TorchAttention
from qtp.attention.triton_backend import TritonAttention
from qtp.batch import Batch, DeviceTables, make_batch, on_device
from qtp.kv.cache import KVScales

CUDA = DEVICE.type == "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
KV_OF = ((0,), (0,) * 7, (0,) * 7 + (1,) * 3, (0, 1, 1, 2))
PARTS = (1, 2, 8, 9, 17)
Chunks = list[tuple[int, int, int]]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # rows of a group that are not there


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poison():
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Tiles and parts of 16 tokens, so that short contexts have several of both."""
    for name in ("_SPLIT_TILE", "_DECODE_TILE", "_ROWS"):
        monkeypatch.setattr(triton_backend, name, 16)
    monkeypatch.setattr(triton_backend, "_PREFILL_TILE", 32)
    monkeypatch.setattr(triton_backend, "_AHEAD", 3)  # so that some parts have their first tokens early and some do not
    return monkeypatch


def some(seed: int, kv_of: tuple[int, ...], head_dim: int, lengths: list[int], dtype: torch.dtype) -> Sequences:
    """With angles that the run's dtype holds, so that rounding them is not the matter."""
    s = Sequences(seed, kv_of, head_dim, lengths, dtype)
    s.cos, s.sin = s.cos.to(dtype).float(), s.sin.to(dtype).float()
    return s


def paged_of(s: Sequences, block_size: int, seed: int = 0, scales: KVScales | None = None, poison: int = 127) -> Paged:
    return Paged(s, block_size, seed, TritonAttention, scales, poison, DEVICE)


def check_cache(paged: Paged, stops: list[int], tolerance: float) -> None:
    """It holds the first tokens of each sequence, and all else is as it was."""
    right = Paged(paged.s, paged.block_size, backend=TorchAttention)
    right.tables = paged.tables
    right.fill(stops)
    torch.testing.assert_close(paged.cache.keys.cpu(), right.cache.keys, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(paged.cache.values.cpu(), right.cache.values, rtol=0, atol=0, equal_nan=True)


def check(paged: Paged, chunks: Chunks, window: int | None = None) -> None:
    """A step over what comes before it."""
    s, tolerance = paged.s, TOLERANCE[paged.s.dtype]
    starts, stops = ([next((chunk[at] for chunk in chunks if chunk[0] == i), 0) for i in range(len(s.qkv))] for at in (1, 2))
    paged.fill(starts)
    for (i, start, stop), out in zip(chunks, paged.step(chunks, window), strict=True):
        assert out.dtype == s.dtype
        torch.testing.assert_close(out.double(), s.expected(i, start, stop, window), rtol=tolerance, atol=tolerance)
    check_cache(paged, stops, tolerance)


def step(seed: int, dtype: torch.dtype) -> tuple[Sequences, Chunks, int | None, int]:
    """A random one: sequences, chunks, window, block size."""
    dice = random.Random(f"{seed} {dtype}")
    decodes = [dice.choice((1, 2, 15, 16, 17, 18, 33, 40, 100)) for _ in range(dice.randint(0, 2) or seed % 2)]
    starts = [dice.choice((0, 0, 1, 15, 16, 31, 32, 33, 70)) for _ in range(dice.randint(0, 2) or not decodes)]
    kv_of = KV_OF[seed % len(KV_OF)]
    most = 40 // len(kv_of)  # a program in the interpreter takes milliseconds
    counts = [dice.choice((1, 2, 3, 5, min(most, 16), min(most, 17), most)) for _ in starts]
    chunks = [(i, n - 1, n) for i, n in enumerate(decodes)]
    chunks += [(len(decodes) + i, n, n + count) for i, (n, count) in enumerate(zip(starts, counts, strict=True))]
    s = some(seed, kv_of, (16, 20, 64, 128)[dice.randrange(4)], [stop for _, _, stop in chunks], dtype)
    return s, chunks, dice.choice((None, None, 1, 2, 16, 17, 50)), (1, 5, 16, 48, 128)[seed % 5]


@every_dtype
@pytest.mark.parametrize("seed", range(8))
def test_it_is_attention(dtype: torch.dtype, seed: int, small: pytest.MonkeyPatch) -> None:
    """Random steps: decoding sequences and chunks of prompts, over a cache in which all else is NaN."""
    small.setattr(triton_backend, "_PROGRAMS", (8, 1, 30)[seed % 3])
    small.setattr(triton_backend, "_ROWS", 64 if dtype == torch.float32 else 16)
    s, chunks, window, block_size = step(seed, dtype)
    check(paged_of(s, block_size, seed), chunks, window)


@every_dtype
def test_any_number_of_parts(dtype: torch.dtype, small: pytest.MonkeyPatch) -> None:
    """Parts that are full, lack one token or have one: with scores that differ much, so that each part has another maximum."""
    small.setattr(triton_backend, "_PROGRAMS", 17 * len(PARTS) * 2)
    lefts = random.Random(str(dtype)).sample((0, 0, 1, 15, 15), len(PARTS))
    lengths = [16 * parts - left + 1 for parts, left in zip(PARTS, lefts, strict=True)]
    s = some(1, (0, 1, 1), 16, lengths, dtype)
    for x in s.qkv:
        x[:, :3] *= 3
    check(paged_of(s, 16), [(i, n - 1, n) for i, n in enumerate(lengths)])


@pytest.mark.parametrize("window", [1, 2, 16, 17, 33, 47])
def test_windows(window: int, small: pytest.MonkeyPatch) -> None:
    """The tokens of a window, no more and no less, at every place of its begin in a tile."""
    small.setattr(triton_backend, "_PROGRAMS", 12)
    lengths = [41, 48, 49, 50, 75]
    s = some(window, (0, 0), 16, lengths, torch.float32)
    chunks = [(0, 40, 41), (1, 47, 48), (2, 48, 49), (3, 49, 50), (4, 43, 75)]
    check(paged_of(s, 5), chunks, window)


def test_more_query_heads_than_a_tile_has_rows(small: pytest.MonkeyPatch) -> None:
    small.setattr(triton_backend, "_PROGRAMS", 8)
    check(paged_of(some(1, (0,) * 20 + (1,), 20, [40], torch.bfloat16), 16), [(0, 39, 40)])


@every_dtype
def test_far_scores(dtype: torch.dtype, small: pytest.MonkeyPatch) -> None:
    """Scores of hundreds, one key far above the others: nothing overflows, and what is not seen has no part in it."""
    small.setattr(triton_backend, "_PROGRAMS", 8)
    s = Sequences(7, (0, 0), 64, [50, 45], dtype)
    for x in s.qkv:
        x[:, :3] *= 20
    s.cos, s.sin = torch.ones_like(s.cos), torch.zeros_like(s.sin)  # else the last bit of a turned query decides
    paged = paged_of(s, 16)
    paged.fill([49, 36])
    decoded, chunk = paged.step([(0, 49, 50), (1, 36, 45)])
    torch.testing.assert_close(decoded.double(), s.expected(0, 49, 50, None), rtol=0.02, atol=0.02)
    torch.testing.assert_close(chunk.double(), s.expected(1, 36, 45, None), rtol=0.02, atol=0.02)
    assert torch.equal(paged_of(s, 16).step([(0, 0, 1)])[0][0, 0], s.qkv[0][0, 3])


def test_queries_of_strided_rows() -> None:
    s = some(9, (0, 0, 1), 32, [12, 9], torch.bfloat16)
    chunks = [(0, 11, 12), (1, 3, 9)]
    plain, paged = paged_of(s, 16), paged_of(s, 16)
    for p in (plain, paged):
        p.fill([11, 3])
    rows = paged.rows(chunks)
    wide = torch.cat((rows, rows[:, :2]), dim=1)[:, : rows.shape[1]]
    parts = [((1,) * (stop - start), start, paged.tables[i]) for i, start, stop in chunks]
    plan = paged.backend.plan(make_batch(parts, 16, DEVICE), *paged.angles(chunks))
    out = paged.backend.run(plan, LAYER, wide, None).cpu()
    assert torch.equal(out, torch.cat(plain.step(chunks)))
    assert torch.equal(paged.cache.keys.nan_to_num(), plain.cache.keys.nan_to_num())


class Bucket:
    """A step of `size` rows whose numbers lie on the device, some of them idle, as graphs run it."""

    def __init__(self, paged: Paged, size: int) -> None:
        s, d = paged.s, paged.s.head_dim
        self.paged = paged
        self.qkv = torch.zeros(size, len(s.kv_of) + 2 * s.kv_heads, d, dtype=s.dtype, device=DEVICE)
        self.cos, self.sin = torch.zeros(2, size, d // 2, device=DEVICE).unbind()
        self.lens, self.starts = torch.zeros(2, size, dtype=torch.int64, device=DEVICE).unbind()
        self.blocks = torch.zeros(sum(map(len, paged.tables)), dtype=torch.int64, device=DEVICE)
        self.batch = Batch(
            token_ids_T=self.lens,
            positions_T=self.lens,
            slots_T=torch.full((size,), 2**40, device=DEVICE),  # not looked at
            query_lens=(1,) * size,
            kv_lens=(10**6,) * size,
            tables=(),
            num_decodes=size,
            on_device=DeviceTables(lens_S=self.lens, starts_S=self.starts, blocks=self.blocks),
        )

    def set(self, chunks: Chunks, rows: list[int]) -> None:
        """These chunks in these rows; the others are idle, and full of NaN."""
        parts = [((1,), start, self.paged.tables[i]) for i, start, _ in chunks]
        tables = on_device(make_batch(parts, self.paged.block_size, DEVICE), DEVICE)
        self.qkv.fill_(NAN)
        self.lens.zero_(), self.starts.zero_(), self.blocks.zero_()
        self.qkv[rows], self.lens[rows], self.starts[rows] = self.paged.rows(chunks), tables.lens_S, tables.starts_S
        self.cos[rows], self.sin[rows] = self.paged.angles(chunks)
        self.blocks[: len(tables.blocks)] = tables.blocks

    def run(self, window: int | None = None) -> Tensor:
        backend = self.paged.backend
        return backend.run(backend.plan(self.batch, self.cos, self.sin), LAYER, self.qkv, window)


@pytest.mark.parametrize("programs", [1, 40])
@pytest.mark.parametrize("rows", [[0, 1], [3, 1]], ids=str)
def test_idle_rows_of_a_bucket(programs: int, rows: list[int], small: pytest.MonkeyPatch) -> None:
    """Zeros come of them, and nothing goes to the cache."""
    small.setattr(triton_backend, "_PROGRAMS", programs)
    s = some(3, (0, 0, 1), 16, [1, 40], torch.bfloat16)
    paged = paged_of(s, 16)
    paged.fill([0, 39])
    bucket = Bucket(paged, 4)
    chunks = [(0, 0, 1), (1, 39, 40)]
    bucket.set(chunks, rows)
    out = bucket.run().cpu()
    for row, (i, start, stop) in zip(rows, chunks, strict=True):
        torch.testing.assert_close(out[row : row + 1].double(), s.expected(i, start, stop, None), rtol=0.012, atol=0.012)
    assert not out[[row for row in range(4) if row not in rows]].any()
    check_cache(paged, [1, 40], 0.012)
    bucket.set([(0, 0, 1)], [2])
    assert not bucket.run()[[0, 1, 3]].any()


@pytest.mark.parametrize("int8", [False, True])
def test_a_graph_holds_it(int8: bool, small: pytest.MonkeyPatch) -> None:
    """Lengths, tables, and how many rows are idle are not part of a step that is captured."""
    small.setattr(triton_backend, "_PROGRAMS", 30)
    s = some(4, (0, 0, 1), 16, [50, 18, 34], torch.float32)
    scales = scales_of(s, 4) if int8 else None
    paged = paged_of(s, 16, scales=scales)
    paged.fill([47, 15, 33])
    bucket = Bucket(paged, 3)
    bucket.set([(0, 0, 1)], [0])
    replay = replayed(bucket.run)
    paged.fill([47, 15, 33])
    for chunks in ([(0, 47, 48), (1, 15, 16)], [(2, 33, 34), (1, 16, 17), (0, 48, 49)], [(0, 49, 50)], [(1, 17, 18)]):
        rows = list(range(len(chunks)))
        bucket.set(chunks, rows)
        out = replay().cpu()
        for row, (i, start, stop) in enumerate(chunks):
            right = dequantized_attention(paged, i, start, stop, None) if int8 else s.expected(i, start, stop, None)
            torch.testing.assert_close(out[row : row + 1].double(), right, rtol=2e-5, atol=2e-5)
        assert not out[len(chunks) :].any()
    if int8:
        for i, stop in enumerate((50, 18, 34)):
            check_codes(paged, i, 0, stop, 1e-5)
    else:
        check_cache(paged, [50, 18, 34], 1e-5)


def check_int8(s: Sequences, scales: KVScales, chunks: Chunks, window: int | None, block_size: int) -> None:
    dtype = s.dtype
    paged, other = (paged_of(s, block_size, 0, scales, poison) for poison in (127, -128))
    starts = [next((start for i, start, _ in chunks if i == sequence), 0) for sequence in range(len(s.qkv))]
    for p in (paged, other):
        p.fill(starts)
    got, again = (p.step(chunks, window) for p in (paged, other))
    for (i, start, stop), out, twin in zip(chunks, got, again, strict=True):
        check_codes(paged, i, start, stop, max(torch.finfo(dtype).eps, 1e-5))
        right = dequantized_attention(paged, i, start, stop, window)
        torch.testing.assert_close(out.double(), right, rtol=TOLERANCE[dtype], atol=bound(s))
        assert torch.equal(out, twin)  # what was not written is not read
    untouched = torch.ones(len(paged.cache.keys[LAYER].flatten(0, 1)), dtype=torch.bool)
    for i, _, stop in chunks:
        untouched[paged.slots(i, stop)] = False
    for cache in (paged.cache.keys, paged.cache.values):
        assert (cache[LAYER].flatten(0, 1).cpu()[untouched] == 127).all()
        assert (cache[1 - LAYER] == 127).all()


@pytest.mark.parametrize("query", [False, True], ids=["C8", "FAQuant"])
@every_dtype
@pytest.mark.parametrize("seed", range(2))
def test_int8(dtype: torch.dtype, query: bool, seed: int, small: pytest.MonkeyPatch) -> None:
    """Of the codes in the cache, with scales and offsets of every channel, what the formulas make in float64."""
    small.setattr(triton_backend, "_PROGRAMS", (1, 30)[seed % 2])
    s, chunks, window, block_size = step(seed + 20, dtype)
    if not query:
        with_outliers(s, seed)
    check_int8(s, scales_of(s, seed, query), chunks, window, block_size)


@pytest.mark.parametrize("query", [False, True], ids=["C8", "FAQuant"])
def test_int8_codes_are_those_of_torch(query: bool, small: pytest.MonkeyPatch) -> None:
    """But where a turned key lies between two codes, and float32 leaves open which."""
    s = some(5, (0, 1, 1), 20, [20, 30], torch.float32)
    scales = scales_of(s, 5, query)
    ours, theirs = paged_of(s, 16, 0, scales), Paged(s, 16, 0, TorchAttention, scales)
    chunks = [(0, 19, 20), (1, 20, 30)]
    for paged in (ours, theirs):
        paged.fill([19, 20])
    for mine, right in zip(ours.step(chunks), theirs.step(chunks), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    apart = (ours.cache.keys.cpu().int() - theirs.cache.keys.int()).abs()
    assert apart.max() <= 1
    assert apart.sum() <= 2
    assert torch.equal(ours.cache.values.cpu(), theirs.cache.values)


def test_halves_are_rounded_to_even_and_what_is_beyond_is_clamped() -> None:
    s = Sequences(1, (0,), 2, [8], torch.float32)
    s.cos, s.sin = torch.ones_like(s.cos), torch.zeros_like(s.sin)
    values = torch.tensor([0.5, 1.5, -0.5, -2.5, 127.5, 1e9, -128.5, -1e9])
    s.qkv[0][:, 1:] = values[:, None, None]
    one, none = torch.ones(2, 1, 2), torch.zeros(2, 1, 2)
    scales = KVScales(key_scale=one * 2, key_offset=none, value_scale=one, value_offset=one * 3)
    paged = paged_of(s, 8, 0, scales)
    paged.step([(0, 0, 7)])
    paged.step([(0, 7, 8)])
    for found, by, shift in zip(paged.cached(0, 8), (2, 1), (0, 3), strict=True):
        assert found[:, 0, 0].tolist() == torch.clamp(torch.round(values / by + shift), -128, 127).tolist()


LARGE: list[tuple[Any, ...]] = [((0, 0), 20, [300], [], 16, None, torch.bfloat16)]
if CUDA:
    LARGE = [
        ((0,) * 7 + (1,) * 7, 64, [1, 257, 1000, 5000, 4096] * 3, [(0, 700), (3000, 257)], 128, None, torch.bfloat16),
        ((0,) * 7 + (1,) * 7 + (2,) * 7 + (3,) * 7, 128, [4097], [], 16, None, torch.float16),
        ((0,) * 7, 128, [130 * i + 1 for i in range(64)], [], 32, 1000, torch.bfloat16),
        ((0,) * 5 + (1,) * 8 + (2,) * 3, 80, [700, 30], [(100, 1), (0, 300), (513, 127)], 48, 256, torch.float32),
        ((0,) * 8, 128, [2000], [(4096 - 129, 129)], 128, None, torch.bfloat16),
    ]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("kv_of", "head_dim", "decodes", "chunks", "block_size", "window", "dtype"), LARGE)
def test_true_tiles(
    kv_of: tuple[int, ...],
    head_dim: int,
    decodes: list[int],
    chunks: Chunks,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    int8: bool,
) -> None:
    """With the sizes that run; on a CUDA device of models too."""
    lengths = [*decodes, *(start + count for start, count in chunks)]
    steps = [(i, n - 1, n) for i, n in enumerate(decodes)]
    steps += [(len(decodes) + i, start, start + count) for i, (start, count) in enumerate(chunks)]
    s = some(1, kv_of, head_dim, lengths, dtype)
    if int8:
        check_int8(s, scales_of(s, 1), steps, window, block_size)
    else:
        check(paged_of(s, block_size), steps, window)

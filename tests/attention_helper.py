"""Sequences for the tests of attention, what attention over them is in float64, and a paged cache that they go into."""

import random
from dataclasses import fields, replace
from itertools import pairwise

import torch
from torch import Tensor

from qtp.attention.native_backend import NativeAttention
from qtp.batch import make_batch
from qtp.kv.cache import KVCache, KVScales

CPU = torch.device("cpu")
NAN = float("nan")
LAYER = 1
INT8_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # over an int8 cache


class Sequences:
    """Queries, keys and values [L, H + 2 K, d] of some sequences, before rope, and angles [L, d / 2] for each position."""

    def __init__(self, seed: int, kv_of: tuple[int, ...], head_dim: int, lengths: list[int], dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(seed)
        self.kv_of, self.kv_heads, self.head_dim, self.dtype = kv_of, kv_of[-1] + 1, head_dim, dtype
        width = len(kv_of) + 2 * self.kv_heads
        self.qkv = [torch.randn(n, width, head_dim, generator=g).to(dtype) for n in lengths]
        angles = torch.rand(max(lengths), head_dim // 2, generator=g) * 6
        self.cos, self.sin = angles.cos(), angles.sin()

    def heads(self, first: int, stop: int) -> "Sequences":
        """What a rank with query heads first ... stop - 1 has of them."""
        part = object.__new__(Sequences)
        low, high = self.kv_of[first], self.kv_of[stop - 1] + 1
        part.kv_of, part.kv_heads = tuple(k - low for k in self.kv_of[first:stop]), high - low
        part.head_dim, part.dtype, part.cos, part.sin = self.head_dim, self.dtype, self.cos, self.sin
        at = len(self.kv_of)
        columns = [*range(first, stop), *range(at + low, at + high), *range(at + self.kv_heads + low, at + self.kv_heads + high)]
        part.qkv = [x[:, columns].contiguous() for x in self.qkv]
        return part

    def turned(self, sequence: int, stop: int) -> Tensor:
        """Queries and keys [stop, H + K, d] after rope, in float64, rounded to the run's dtype."""
        x = self.qkv[sequence][:stop, : len(self.kv_of) + self.kv_heads].double()
        cos, sin = (t[:stop, None].double() for t in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(self.dtype)

    def expected(self, sequence: int, start: int, stop: int, window: int | None) -> Tensor:
        """[stop - start, H, d] in float64."""
        turned, heads = self.turned(sequence, stop).double(), len(self.kv_of)
        return self.attention(
            turned[start:, :heads], turned[:, heads:], self.qkv[sequence][:stop, heads + self.kv_heads :], window
        )

    def attention(self, query_qHd: Tensor, key_LKd: Tensor, value_LKd: Tensor, window: int | None) -> Tensor:
        """Of the last q tokens of L, in float64."""
        key, value = (x.double()[:, self.kv_of] for x in (key_LKd, value_LKd))
        scores = torch.einsum("qhd,khd->hqk", query_qHd.double(), key) / self.head_dim**0.5
        stop = len(key)
        rows, at = torch.arange(stop - len(query_qHd), stop)[:, None], torch.arange(stop)
        seen = at <= rows if window is None else (at <= rows) & (at > rows - window)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), value)


class Paged:
    """A cache on `device` that is full of NaN (int8: of `poison`), and a backend over it, into which sequences go chunk by chunk.
    What goes in and comes out is on the CPU."""

    def __init__(
        self,
        s: Sequences,
        block_size: int,
        seed: int = 0,
        backend: type = NativeAttention,
        scales: KVScales | None = None,
        poison: int = 127,
        device: torch.device = CPU,
    ) -> None:
        self.s, self.block_size, self.scales, self.device = s, block_size, scales, device
        needed = [-(-len(x) // block_size) for x in s.qkv]
        blocks = list(range(sum(needed) + 3))
        random.Random(seed).shuffle(blocks)
        self.tables = [tuple(blocks[sum(needed[:i]) : sum(needed[: i + 1])]) for i in range(len(needed))]
        there = None if scales is None else moved(scales, device)
        self.cache = KVCache(2, len(blocks), block_size, s.kv_heads, s.head_dim, s.dtype, device, there)
        self.cache.keys.fill_(NAN if scales is None else poison)
        self.cache.values.fill_(NAN if scales is None else poison)
        self.backend = backend(self.cache, s.kv_of, device)

    def step(self, chunks: list[tuple[int, int, int]], window: int | None = None) -> list[Tensor]:
        """Runs (sequence, start, stop)s, those of one token first, and returns what each gives."""
        parts = [((1,) * (stop - start), start, self.tables[i]) for i, start, stop in chunks]
        plan = self.backend.plan(make_batch(parts, self.block_size, self.device), *self.angles(chunks))
        out = self.backend.run(plan, LAYER, self.rows(chunks), window).cpu()
        return list(out.split([stop - start for _, start, stop in chunks]))

    def angles(self, chunks: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        """cos and sin of a step's tokens, on the device."""
        cos, sin = (torch.cat([t[start:stop] for _, start, stop in chunks]) for t in (self.s.cos, self.s.sin))
        return cos.to(self.device), sin.to(self.device)

    def rows(self, chunks: list[tuple[int, int, int]]) -> Tensor:
        """Queries, keys and values of a step's tokens, on the device."""
        return torch.cat([self.s.qkv[i][start:stop] for i, start, stop in chunks]).to(self.device)

    def cached(self, sequence: int, stop: int) -> tuple[Tensor, Tensor]:
        """What is in the cache of a sequence's first tokens: keys and values [stop, K, d]."""
        slots = self.slots(sequence, stop)
        keys, values = (x[LAYER].flatten(0, 1).cpu()[slots] for x in (self.cache.keys, self.cache.values))
        return keys, values

    def slots(self, sequence: int, stop: int) -> Tensor:
        """Of a sequence's first tokens."""
        at = torch.arange(stop)
        return torch.tensor(self.tables[sequence])[at // self.block_size] * self.block_size + at % self.block_size

    def fill(self, stops: list[int]) -> None:
        """The first tokens of each sequence, in float64, rounded."""
        heads = len(self.s.kv_of)
        for i, stop in enumerate(stops):
            if stop:
                keys, values = self.s.turned(i, stop)[:, heads:], self.s.qkv[i][:stop, heads + self.s.kv_heads :]
                self.cache.write(LAYER, *(x.to(self.device) for x in (self.slots(i, stop), keys, values)))


def moved(scales: KVScales, device: torch.device) -> KVScales:
    tensors = {field.name: getattr(scales, field.name) for field in fields(scales)}
    return KVScales(**{name: None if x is None else x.to(device) for name, x in tensors.items()})


def with_outliers(s: Sequences, seed: int) -> Sequences:
    """Some channels of keys and values a hundred times as large; queries there are small, or they alone would decide."""
    dice, heads, half = random.Random(seed), len(s.kv_of), s.head_dim // 2
    for kv_head in range(s.kv_heads):
        key, value = heads + kv_head, heads + s.kv_heads + kv_head
        turned, channel = dice.randrange(half), dice.randrange(s.head_dim)
        for x in s.qkv:
            for i in (turned, turned + half):
                x[:, key, i] *= 100
                x[:, [h for h, k in enumerate(s.kv_of) if k == kv_head], i] *= 0.01
            x[:, value, channel] = x[:, value, channel] * 30 + 100
    return s


def scales_of(s: Sequences, seed: int, query: bool = False) -> KVScales:
    """Scales and offsets per channel from the smallest and the largest of all tokens, moved a little, so that some are clamped
    and offsets are no integers. With `query` per head instead, and of queries as well. What belongs to other layers and heads is
    NaN."""
    g, heads = torch.Generator().manual_seed(seed), len(s.kv_of)
    turned = torch.cat([s.turned(i, len(x)) for i, x in enumerate(s.qkv)]).float()
    values = torch.cat([x[:, heads + s.kv_heads :] for x in s.qkv]).float()

    def measured(x_LHd: Tensor) -> tuple[Tensor, Tensor]:
        over = (0, 2) if query else (0,)
        low, high = x_LHd.amin(over, keepdim=True)[0], x_LHd.amax(over, keepdim=True)[0]
        shift = torch.rand(2, *low.shape, generator=g) * 0.3 - 0.1
        low, high = low - shift[0] * (high - low + 1e-3), high + shift[1] * (high - low + 1e-3)
        scale = (high - low) / 255
        wide = [torch.full((3, len(scale) + 2, s.head_dim), NAN) for _ in range(2)]
        for of, x in zip(wide, (scale, -low / scale - 128), strict=True):
            of[LAYER, 1:-1] = x
        return wide[0][:2, 1:-1], wide[1][:2, 1:-1]

    key, value = measured(turned[:, heads:]), measured(values)
    found = KVScales(key_scale=key[0], key_offset=key[1], value_scale=value[0], value_offset=value[1])
    if not query:
        return found
    scale, offset = measured(turned[:, :heads])
    return replace(found, query_scale=scale[..., 0], query_offset=offset[..., 0])


def codes(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return torch.clamp(torch.round(x.float() / scale + offset), -128, 127)


def dequantized_attention(paged: Paged, sequence: int, start: int, stop: int, window: int | None) -> Tensor:
    """What the formulas make, in float64, of the codes in the cache and the queries of tokens start ... stop - 1."""
    s, scales = paged.s, paged.scales
    assert scales is not None
    query = s.turned(sequence, stop)[start:, : len(s.kv_of)].double()
    if scales.query_scale is not None and scales.query_offset is not None:
        scale, offset = (x[LAYER, :, None] for x in (scales.query_scale, scales.query_offset))
        query = (codes(query, scale, offset).double() - offset.double()) * scale.double()
    key, value = (x.double() for x in paged.cached(sequence, stop))
    key = (key - scales.key_offset[LAYER].double()) * scales.key_scale[LAYER].double()
    value = (value - scales.value_offset[LAYER].double()) * scales.value_scale[LAYER].double()
    return s.attention(query, key, value, window)


def bound(s: Sequences) -> float:
    """How far values may lie apart: one with large values more than another."""
    return INT8_TOLERANCE[s.dtype] * max(1.0, max(float(x[:, len(s.kv_of) + s.kv_heads :].abs().max()) for x in s.qkv) / 4)


def check_codes(paged: Paged, sequence: int, start: int, stop: int, apart: float) -> None:
    """What is in the cache of tokens start ... stop - 1 is what the formula makes of them, give or take `apart` of the range."""
    s, scales = paged.s, paged.scales
    assert scales is not None
    heads = len(s.kv_of)
    keys, values = (x[start:].float() for x in paged.cached(sequence, stop))
    right = codes(s.turned(sequence, stop)[start:, heads:], scales.key_scale[LAYER], scales.key_offset[LAYER])
    assert (keys - right).abs().max() <= max(1.0, 256 * apart)
    if apart < 1e-5:
        assert (keys != right).float().mean() < 1e-3
    right = codes(s.qkv[sequence][start:stop, heads + s.kv_heads :], scales.value_scale[LAYER], scales.value_offset[LAYER])
    assert torch.equal(values, right)


def rank_of(scales: KVScales, s: Sequences, first: int, stop: int) -> KVScales:
    """What of them a rank with query heads first ... stop - 1 has."""
    low, high = s.kv_of[first], s.kv_of[stop - 1] + 1
    kv = {name: getattr(scales, name)[:, low:high] for name in ("key_scale", "key_offset", "value_scale", "value_offset")}
    if scales.query_scale is None or scales.query_offset is None:
        return KVScales(**kv)
    return KVScales(**kv, query_scale=scales.query_scale[:, first:stop], query_offset=scales.query_offset[:, first:stop])


def check_independence(s: Sequences, window: int | None, scales: KVScales | None = None) -> None:
    """Asserts that a row of the first sequence, of 700 tokens beside ones of 90 and 333 at least, is the same bits in chunks of
    any size, alone or beside others, with any blocks and threads, and with some of the heads."""
    torch.set_num_threads(1)
    whole = Paged(s, 128, scales=scales).step([(0, 0, 700)], window)[0]

    for threads, block_size, size in ((2, 128, 7), (3, 5, 256), (1, 16, 64), (2, 48, 699)):
        torch.set_num_threads(threads)
        paged = Paged(s, block_size, seed=size, scales=scales)
        parts = [paged.step([(0, start, stop)], window)[0] for start, stop in pairwise([*range(0, 700, size), 700])]
        assert torch.equal(torch.cat(parts), whole), (threads, block_size, size)

    paged = Paged(s, 16, scales=scales)
    paged.step([(1, 0, 89), (2, 0, 200), (0, 0, 500)], window)
    beside = [
        paged.step([(0, n, n + 1), (2, n - 300, n - 299)] if n % 2 else [(0, n, n + 1)], window)[0] for n in range(500, 600)
    ]
    torch.set_num_threads(1)
    beside += [paged.step([(0, n, n + 1)], window)[0] for n in range(600, 650)]
    beside += [paged.step([(1, 89, 90), (0, 650, 700)], window)[1]]
    assert torch.equal(torch.cat(beside), whole[500:])

    for first, stop in ((0, 1), (6, 8), (3, 12), (8, 13)):
        own = None if scales is None else rank_of(scales, s, first, stop)
        assert torch.equal(Paged(s.heads(first, stop), 32, scales=own).step([(0, 0, 700)], window)[0], whole[:, first:stop]), (
            first
        )
        paged = Paged(s.heads(first, stop), 32, scales=own)
        paged.step([(0, 0, 690)], window)
        assert torch.equal(paged.step([(0, 690, 691)], window)[0], whole[690:691, first:stop]), first

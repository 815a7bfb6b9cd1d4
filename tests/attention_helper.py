"""Sequences for the tests of attention, what attention over them is in float64, and a paged cache that they go into."""

import random
from itertools import pairwise

import torch
from torch import Tensor

from qtp.attention.native_backend import NativeAttention
from qtp.batch import make_batch
from qtp.kv.cache import KVCache, KVScales

CPU = torch.device("cpu")
NAN = float("nan")
LAYER = 1


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
    """A cache that is full of NaN (int8: of `poison`), and a backend over it, into which sequences go chunk by chunk."""

    def __init__(
        self,
        s: Sequences,
        block_size: int,
        seed: int = 0,
        backend: type = NativeAttention,
        scales: KVScales | None = None,
        poison: int = 127,
    ) -> None:
        self.s, self.block_size = s, block_size
        needed = [-(-len(x) // block_size) for x in s.qkv]
        blocks = list(range(sum(needed) + 3))
        random.Random(seed).shuffle(blocks)
        self.tables = [tuple(blocks[sum(needed[:i]) : sum(needed[: i + 1])]) for i in range(len(needed))]
        self.cache = KVCache(2, len(blocks), block_size, s.kv_heads, s.head_dim, s.dtype, CPU, scales)
        self.cache.keys.fill_(NAN if scales is None else poison)
        self.cache.values.fill_(NAN if scales is None else poison)
        self.backend = backend(self.cache, s.kv_of, CPU)

    def step(self, chunks: list[tuple[int, int, int]], window: int | None = None) -> list[Tensor]:
        """Runs (sequence, start, stop)s, those of one token first, and returns what each gives."""
        parts = [((1,) * (stop - start), start, self.tables[i]) for i, start, stop in chunks]
        rows = [slice(start, stop) for _, start, stop in chunks]
        cos, sin = (torch.cat([t[r] for r in rows]) for t in (self.s.cos, self.s.sin))
        qkv = torch.cat([self.s.qkv[i][r] for (i, _, _), r in zip(chunks, rows, strict=True)])
        out = self.backend.run(self.backend.plan(make_batch(parts, self.block_size, CPU), cos, sin), LAYER, qkv, window)
        return list(out.split([stop - start for _, start, stop in chunks]))

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
                self.cache.write(LAYER, self.slots(i, stop), keys, values)


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

"""Sequences for the tests of attention, what attention over them is in float64, and a paged cache that they go into."""

import random

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

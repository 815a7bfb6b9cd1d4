"""Paged attention from torch's own operations; runs on any device.

Decoding sequences are padded to the longest and go together; a prefill chunk goes alone, tile by tile of its queries.
Over an int8 cache it computes in float32.
Shapes: T tokens, S decoding sequences, L cached tokens, H query heads, K KV heads, G = H / K, d head_dim, n queries of a tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qtp.batch import Batch
from qtp.kv.cache import KVCache

_TILE = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """A prefill chunk: rows [first, first + count) of the step, at positions start ..., over the slots [start + count]."""

    first: int
    count: int
    start: int
    slots: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """slots [T] of the step's tokens; cos, sin [T, 1, d / 2] in the run's dtype. decode_slots [S, longest]: the slots of each
    decoding sequence in order of position, padded with its first, so that no slot is read that was not written; decode_lens [S];
    longest: the largest of them."""

    slots: Tensor
    cos: Tensor
    sin: Tensor
    decode_slots: Tensor
    decode_lens: Tensor
    longest: int
    even_lens: bool
    chunks: tuple[_Chunk, ...]


class TorchAttention:
    """kv_of[h] is the local KV head that local query head h reads; groups may be ragged."""

    def __init__(self, cache: KVCache, kv_of: tuple[int, ...], device: torch.device) -> None:
        kv_heads = kv_of[-1] + 1
        group = len(kv_of) // kv_heads
        self.cache = cache
        self.device = device
        self.uniform = kv_of == tuple(h // group for h in range(kv_heads * group))
        self.kv_of_H = torch.tensor(kv_of, device=device)

    def plan(self, batch: Batch, cos: Tensor, sin: Tensor) -> _Plan:
        decodes = batch.num_decodes
        lens = batch.kv_lens[:decodes]
        longest = max(lens, default=0)
        lens_S = torch.tensor(lens, dtype=torch.int64, device=self.device)
        at = torch.arange(longest, device=self.device)
        chunks, first = [], decodes
        for count, length, table in zip(batch.query_lens[decodes:], batch.kv_lens[decodes:], batch.tables[decodes:], strict=True):
            slots = self._slots((table,), torch.arange(length, device=self.device)[None])[0]
            chunks.append(_Chunk(first=first, count=count, start=length - count, slots=slots))
            first += count
        dtype = self.cache.dtype
        return _Plan(
            slots=batch.slots_T,
            cos=cos[:, None].to(dtype),
            sin=sin[:, None].to(dtype),
            decode_slots=self._slots(batch.tables[:decodes], torch.where(at < lens_S[:, None], at, 0)),
            decode_lens=lens_S,
            longest=longest,
            even_lens=len(set(lens)) < 2,
            chunks=tuple(chunks),
        )

    def run(self, plan: object, layer: int, qkv_THd: Tensor, window: int | None) -> Tensor:
        assert isinstance(plan, _Plan)
        heads, kv_heads = len(self.kv_of_H), self.cache.keys.shape[3]
        qk_THd, value_TKd = qkv_THd.split((heads + kv_heads, kv_heads), dim=1)
        query_THd, key_TKd = rotate(qk_THd, plan.cos, plan.sin).split((heads, kv_heads), dim=1)
        self.cache.write(layer, plan.slots, key_TKd, value_TKd)
        out_THd = torch.empty_like(query_THd)
        if self.cache.scales is not None:
            query_THd = self.cache.scales.query(layer, query_THd)
        decodes = len(plan.decode_lens)
        if decodes:
            out_THd[:decodes] = self._decode(plan, layer, query_THd[:decodes], window)
        for chunk in plan.chunks:
            rows = slice(chunk.first, chunk.first + chunk.count)
            out_THd[rows] = self._prefill(chunk, layer, query_THd[rows], window)
        return out_THd

    def _decode(self, plan: _Plan, layer: int, query_SHd: Tensor, window: int | None) -> Tensor:
        keys, values = self._read(layer, plan.decode_slots)
        mask = None
        if not plan.even_lens or (window is not None and window < plan.longest):
            at = torch.arange(plan.longest, device=self.device)
            lens = plan.decode_lens[:, None]
            mask = at < lens if window is None else (at < lens) & (at >= lens - window)
        sequences, heads, width = query_SHd.shape
        grouped = query_SHd.view(sequences, keys.shape[2], -1, width)
        if mask is not None:
            mask = mask[:, None, None].expand(sequences, 1, grouped.shape[2], plan.longest)
        out = scaled_dot_product_attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
        return out.reshape(sequences, heads, width)

    def _prefill(self, chunk: _Chunk, layer: int, query_THd: Tensor, window: int | None) -> Tensor:
        length = chunk.start + chunk.count
        keys, values = (kv.transpose(0, 1)[None] for kv in self._read(layer, chunk.slots))
        query = query_THd.transpose(0, 1)[None]
        gqa = keys.shape[1] != query.shape[1]
        if chunk.start == 0 and chunk.count <= _TILE and (window is None or window >= length):
            out = scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=gqa)
            return out[0].transpose(0, 1)
        parts = []
        for tile in range(0, chunk.count, _TILE):
            stop = min(tile + _TILE, chunk.count)
            seen = chunk.start + stop
            rows = torch.arange(chunk.start + tile, seen, device=self.device)[:, None]
            at = torch.arange(seen, device=self.device)
            mask = at <= rows if window is None else (at <= rows) & (at > rows - window)
            parts.append(
                scaled_dot_product_attention(
                    query[:, :, tile:stop], keys[:, :, :seen], values[:, :, :seen], attn_mask=mask, enable_gqa=gqa
                )
            )
        return torch.cat(parts, dim=2)[0].transpose(0, 1)

    def _read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at slots [..., L]: [..., L, K, d]; with ragged groups one KV head a query head, [..., L, H, d]."""
        keys, values = self.cache.read(layer, slots)
        if self.uniform:
            return keys, values
        return keys.index_select(-2, self.kv_of_H), values.index_select(-2, self.kv_of_H)

    def _slots(self, tables: tuple[tuple[int, ...], ...], positions: Tensor) -> Tensor:
        """The slots of positions [S, L] of the sequences with these block tables."""
        width = max(map(len, tables), default=0)
        padded = [table + (0,) * (width - len(table)) for table in tables]
        blocks = torch.tensor(padded, dtype=torch.int64, device=self.device).view(len(tables), width)
        size = self.cache.block_size
        return blocks.gather(1, positions // size) * size + positions % size


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head's vector turned by its position: [T, H, d] to [T, H, d], with cos and sin [T, 1, d / 2]."""
    first, second = x_THd.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

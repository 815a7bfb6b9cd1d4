"""Paged attention by the Triton kernels of `qtp.kernels.triton.attention`, for CUDA. T tokens, S decoding
sequences, H query heads, K KV heads, d head_dim.

Decoding sequences go together in one kernel, rope and the writing of keys and values included, each cut over its context so that
few of them fill the card too; prefill chunks in tiles of their queries. No step needs another launch for another length, so
`run` can be captured in a CUDA graph whose plan lies in tensors that change.
"""

from dataclasses import dataclass
from itertools import accumulate
from math import e, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtp.batch import Batch, DeviceTables, on_device
from qtp.kernels.triton import attention
from qtp.kernels.triton.launch import options
from qtp.kv.cache import KVCache

_KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ROWS, _PREFILL_TILE = 128, 64
_DECODE_TILE, _SPLIT_TILE = 128, 64  # tokens at a time: many sequences, and parts of few
_PROGRAMS = 2 * 132  # that decoding should fill: two for each multiprocessor of an H100
_FEW_SPLITS, _MOST_SPLITS = 8, 64
_AHEAD = 8  # parts of a sequence from which on a program has so few tokens that it waits for its first ones


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """slots_T; cos, sin [T, d / 2] float32. tiles: [tiles, 4] int64, of the prefill chunks; see `attention.prefill`."""

    slots_T: Tensor
    cos: Tensor
    sin: Tensor
    decodes: int
    tables: DeviceTables
    tiles: Tensor | None


class TritonAttention:
    """kv_of[h] is the local KV head that local query head h reads, ascending; groups may be ragged. The cache must not move."""

    def __init__(self, cache: KVCache, kv_of: tuple[int, ...], device: torch.device) -> None:
        assert sorted(kv_of) == list(kv_of), kv_of
        _, _, self.block_size, self.kv_heads, self.head_dim = cache.keys.shape
        assert sorted(set(kv_of)) == list(range(self.kv_heads)), f"{kv_of} of {self.kv_heads} KV heads"
        assert self.head_dim % 2 == 0, self.head_dim
        self.cache, self.heads, self.device = cache, len(kv_of), device
        groups = [kv_of.count(k) for k in range(self.kv_heads)]
        self._starts = torch.tensor([0, *accumulate(groups)], dtype=torch.int64, device=device)
        self._kv_of = torch.tensor(kv_of, dtype=torch.int64, device=device)
        kind = _KINDS[cache.dtype]
        half = triton.next_power_of_2(max(16, self.head_dim // 2))
        self._scales = _each_layer(cache)
        scales, full = cache.scales, cache.dtype == torch.float32
        shape: dict[str, Any] = {"HEAD_DIM": self.head_dim, "DTYPE": kind, "INT8": scales is not None}
        query = {"QUERY_INT8": scales is not None and scales.query_scale is not None}
        group = max(16, triton.next_power_of_2(max(groups)))
        self._decode: dict[str, Any] = {**shape, **query, "HALF": half, "GROUP": group}
        self._turn: dict[str, Any] = {**shape, **query, "HALF": half}
        # float32 needs twice the shared memory
        self._rows, tile = (_ROWS // 4, _PREFILL_TILE // 2) if full else (_ROWS, _PREFILL_TILE)
        self._prefill: dict[str, Any] = {**shape, "WIDTH": 2 * half, "ROWS": self._rows, "TILE": tile}
        self._scale = log2(e) / self.head_dim**0.5
        self._merge: dict[str, Any] = {"HEAD_DIM": self.head_dim, "HALF": half}

    def plan(self, batch: Batch, cos: Tensor, sin: Tensor) -> _Plan:
        tables = batch.on_device or on_device(batch, self.device)
        tiles, first = [], batch.num_decodes
        prefilling = list(zip(batch.query_lens, batch.kv_lens, strict=True))[batch.num_decodes :]
        for s, (count, length) in enumerate(prefilling, start=batch.num_decodes):
            for at in range(0, count, self._rows):
                tiles.append((s, first + at, length - count + at, min(self._rows, count - at)))
            first += count
        tiles.sort(key=lambda tile: -tile[2])  # the longest first
        return _Plan(
            slots_T=batch.slots_T,
            cos=cos.contiguous(),
            sin=sin.contiguous(),
            decodes=batch.num_decodes,
            tables=tables,
            tiles=torch.tensor(tiles, dtype=torch.int64).to(self.device) if tiles else None,
        )

    def run(self, plan: object, layer: int, qkv_THd: Tensor, window: int | None) -> Tensor:
        assert isinstance(plan, _Plan)
        assert qkv_THd.stride()[1:] == (self.head_dim, 1), qkv_THd.stride()
        out_THd = qkv_THd.new_empty(len(qkv_THd), self.heads, self.head_dim)
        if plan.decodes:
            self._run_decodes(plan, layer, qkv_THd, out_THd, window)
        if plan.tiles is not None:
            self._run_chunks(plan, plan.tiles, layer, qkv_THd, out_THd, window)
        return out_THd

    def _run_decodes(self, plan: _Plan, layer: int, qkv_THd: Tensor, out_THd: Tensor, window: int | None) -> None:
        decodes, tables = plan.decodes, plan.tables
        splits = min(_MOST_SPLITS, max(1, _PROGRAMS // (decodes * self.kv_heads)))
        split, half = splits > 1, self._decode["HALF"]
        sums = stats = out_THd
        if split:
            sums = torch.empty(decodes, self.heads, splits, 2 * half, dtype=torch.float32, device=self.device)
            stats = torch.empty(decodes, self.heads, splits, 2, dtype=torch.float32, device=self.device)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        wide = not split and self.cache.dtype != torch.float32  # which needs twice the shared memory
        flags: dict[str, Any] = {"TILE": _DECODE_TILE if wide else _SPLIT_TILE, "WINDOW": window is not None}
        attention.decode[(decodes, self.kv_heads, splits)](
            *(qkv_THd, keys, values, out_THd, sums, stats, tables.lens_S, tables.starts_S, tables.blocks, plan.cos, plan.sin),
            *(self._starts, *self._scales[layer], self._scale, qkv_THd.stride(0), self.heads, self.kv_heads, self.block_size),
            *(splits, window or 0),
            **self._decode,
            **flags,
            SPLIT=split,
            AHEAD=splits >= _AHEAD,
            **options(qkv_THd, 4, 2),
        )
        if split:
            attention.merge[(decodes, self.heads, 2)](
                *(sums, stats, out_THd, tables.lens_S, self.heads, splits, window or 0),
                **self._merge,
                **flags,
                SPLITS=_FEW_SPLITS if splits <= _FEW_SPLITS else _MOST_SPLITS,  # each size is a kernel to compile
                **options(qkv_THd, 1, 1),
            )

    def _run_chunks(self, plan: _Plan, tiles: Tensor, layer: int, qkv_THd: Tensor, out_THd: Tensor, window: int | None) -> None:
        keys, values, tables, decodes = self.cache.keys[layer], self.cache.values[layer], plan.tables, plan.decodes
        rows, scales = qkv_THd[decodes:], self._scales[layer]
        attention.turn_and_write[(len(rows), self.heads + self.kv_heads)](
            *(rows, keys, values, plan.slots_T[decodes:], plan.cos[decodes:], plan.sin[decodes:], *scales),
            *(qkv_THd.stride(0), self.heads, self.kv_heads),
            **self._turn,
            **options(qkv_THd, 1, 1),
        )
        attention.prefill[(len(tiles), self.heads)](
            *(qkv_THd, keys, values, out_THd, tiles, tables.starts_S, tables.blocks, self._kv_of),
            *(*scales[:4], self._scale, qkv_THd.stride(0), self.heads, self.kv_heads, self.block_size, window or 0),
            **self._prefill,
            WINDOW=window is not None,
            **options(qkv_THd, 8, 3),
        )


def _each_layer(cache: KVCache) -> list[tuple[Tensor | None, ...]]:
    """Scales and offsets of keys, values and queries of each layer, contiguous."""
    s = cache.scales
    if s is None:
        return [(None,) * 6] * len(cache.keys)
    all_layers = (s.key_scale, s.key_offset, s.value_scale, s.value_offset, s.query_scale, s.query_offset)
    return [tuple(None if x is None else x[i].contiguous() for x in all_layers) for i in range(len(cache.keys))]

"""Paged attention of the extension module qtp.kernels._native, for CPUs. T tokens, H query heads, K KV heads, d head_dim.

Over an int8 cache a float32 run computes in float32. In the other dtypes a query, times the scales of the keys, is rounded to
16 bits of its largest element, and probabilities to 1 / 32767 of the largest among 256 tokens; products are exact.

A query row's result does not depend on the rest of the step: not on the chunk that its token came in, the other sequences, the
heads that this rank has, the number of threads, or where blocks lie.
"""

from array import array
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from collectives.communicator import Communicator
from qtp.batch import Batch
from qtp.kernels.extension import native, why_not
from qtp.kernels.interface import Deferred, Op, RowOp, Whole
from qtp.kernels.native_kernels import Linear
from qtp.kernels.native_quantized import DTYPES
from qtp.kv.cache import KVCache, KVScales

_NO_WINDOW = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """address: of `step`, which holds the addresses of the tensors."""

    address: int
    step: "array[int]"
    slots_T: Tensor
    cos: Tensor
    sin: Tensor


class NativeAttention:
    """kv_of[h] is the local KV head that local query head h reads, ascending; groups may be ragged. The cache must not move."""

    def __init__(self, cache: KVCache, kv_of: tuple[int, ...], device: torch.device) -> None:
        assert why_not() is None, why_not()
        assert device.type == "cpu", device
        assert sorted(kv_of) == list(kv_of), kv_of
        _, _, block_size, kv_heads, head_dim = cache.keys.shape
        assert sorted(set(kv_of)) == list(range(kv_heads)), f"{kv_of} of {kv_heads} KV heads"
        assert head_dim % 2 == 0, head_dim
        self.cache = cache
        self.heads, self.head_dim, self.all_heads = len(kv_of), head_dim, len(kv_of) + 2 * kv_heads
        starts = (*(kv_of.index(k) for k in range(kv_heads)), len(kv_of))
        self._spec = array("q", (DTYPES[cache.dtype], len(kv_of), kv_heads, head_dim, block_size, *starts))
        self._address = self._spec.buffer_info()[0]
        self._keys = [layer.data_ptr() for layer in cache.keys]
        self._values = [layer.data_ptr() for layer in cache.values]
        self._scales = [0] * len(cache.keys) if cache.scales is None else self._addresses(cache.scales)
        self._attend: Any = native.attend

    def _addresses(self, scales: KVScales) -> list[int]:
        """Of each layer, the address of its scales' addresses."""
        kv = (scales.key_scale, scales.key_offset, scales.value_scale, scales.value_offset)
        query = () if scales.query_scale is None or scales.query_offset is None else (scales.query_scale, scales.query_offset)
        self._kept = [[x.contiguous() for x in layer] for layer in zip(*kv, *query, strict=True)]
        self._lists = [array("q", [*(x.data_ptr() for x in layer), 0, 0][:6]) for layer in self._kept]
        return [own.buffer_info()[0] for own in self._lists]

    def plan(self, batch: Batch, cos: Tensor, sin: Tensor) -> _Plan:
        cos, sin = cos.contiguous(), sin.contiguous()
        slots_T = batch.slots_T.contiguous()
        tokens, sequences = len(slots_T), len(batch.query_lens)
        head = (tokens, sequences, slots_T.data_ptr(), cos.data_ptr(), sin.data_ptr(), *batch.query_lens, *batch.kv_lens)
        step = array("q", [*head, *chain.from_iterable(batch.tables)])
        return _Plan(address=step.buffer_info()[0], step=step, slots_T=slots_T, cos=cos, sin=sin)

    def surrounded(self, qkv: Op, o: RowOp, comm: Communicator, layer: int, window: int | None) -> Whole | None:
        """As `Surrounded.surrounded`."""
        if not isinstance(qkv, Linear):
            return None
        cache, seen = (self._keys[layer], self._values[layer]), _NO_WINDOW if window is None else window
        whole = qkv.joined(o, comm, (self._address, *cache, seen, self._scales[layer]))
        if whole is None:
            return None

        def run(x: Tensor, plan: object) -> Deferred | None:
            assert isinstance(plan, _Plan)
            return whole(x, plan.address)

        return run

    def run(self, plan: object, layer: int, qkv_THd: Tensor, window: int | None) -> Tensor:
        assert isinstance(plan, _Plan)
        tokens, width = len(qkv_THd), self.head_dim
        assert qkv_THd.shape[1] == self.all_heads
        assert qkv_THd.stride()[1:] == (width, 1), qkv_THd.stride()
        out_THd = qkv_THd.new_empty((tokens, self.heads, width))
        self._attend(
            self._address,
            plan.address,
            self._keys[layer],
            self._values[layer],
            qkv_THd.data_ptr(),
            qkv_THd.stride(0),
            _NO_WINDOW if window is None else window,
            out_THd.data_ptr(),
            self._scales[layer],
        )
        return out_THd

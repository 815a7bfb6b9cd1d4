"""The tensors of the paged KV cache of one rank. T tokens, H query heads, K KV heads, d head_dim of this rank."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class KVScales:
    """How keys (turned by their positions) and values become int8: q = clamp(round(x / scale + offset), -128, 127), halves to
    even, and are read as (q - offset) * scale. All float32, scales above 0, of this rank's heads.

    key_*, value_*: [layers, K, d]; a scale of a whole head is repeated over d. query_*: [layers, H], or both None; with them a
    query (turned) is replaced by what it reads as after the same rounding, and is not rounded again.
    """

    key_scale: Tensor
    key_offset: Tensor
    value_scale: Tensor
    value_offset: Tensor
    query_scale: Tensor | None = None
    query_offset: Tensor | None = None

    def query(self, layer: int, query_THd: Tensor) -> Tensor:
        """The query that meets the cached keys, in float32."""
        if self.query_scale is None or self.query_offset is None:
            return query_THd.float()
        scale, offset = self.query_scale[layer, :, None], self.query_offset[layer, :, None]
        return dequantized(quantized(query_THd, scale, offset), scale, offset)


def quantized(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """x as int8; see `KVScales`."""
    return (x.float() / scale + offset).round().clamp(-128, 127).to(torch.int8)


def dequantized(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """What x, int8, stands for, in float32; see `KVScales`."""
    return (x.float() - offset) * scale


class KVCache:
    """Keys and values of `kv_heads` heads for every layer, [blocks, block_size, kv_heads, head_dim] a layer.

    Slot s is position s % block_size of block s // block_size. Memory is not initialised: what was not written is never read.
    dtype: of the run, and of keys and values unless there are `scales`, with which they are int8.
    """

    def __init__(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: KVScales | None = None,
    ) -> None:
        shape = (layers, num_blocks, block_size, kv_heads, head_dim)
        stored = dtype if scales is None else torch.int8
        self.keys = torch.empty(shape, dtype=stored, device=device)
        self.values = torch.empty(shape, dtype=stored, device=device)
        self.block_size, self.dtype, self.scales = block_size, dtype, scales
        if scales is not None:
            for own in (scales.key_scale, scales.key_offset, scales.value_scale, scales.value_offset):
                assert own.shape == (layers, kv_heads, head_dim), own.shape
                assert own.dtype == torch.float32, own.dtype
            assert (scales.query_scale is None) == (scales.query_offset is None)

    @property
    def block_bytes(self) -> int:
        """Of one block's keys and values, over all layers."""
        return (self.keys.nbytes + self.values.nbytes) // self.keys.shape[1]

    def resize(self, num_blocks: int) -> None:
        """Makes it one of `num_blocks` blocks, which hold nothing that was written before. `keys` and `values` are other tensors
        then: who has kept theirs, or the address of them, has the old ones."""
        layers, _, *rest = self.keys.shape
        dtype, device = self.keys.dtype, self.keys.device
        del self.keys, self.values  # first, so that the memory of both is never held at once
        self.keys = torch.empty(layers, num_blocks, *rest, dtype=dtype, device=device)
        self.values = torch.empty(layers, num_blocks, *rest, dtype=dtype, device=device)

    def write(self, layer: int, slots_T: Tensor, keys_THd: Tensor, values_THd: Tensor) -> None:
        """Stores the new tokens' keys and values at their slots."""
        if (s := self.scales) is not None:
            keys_THd = quantized(keys_THd, s.key_scale[layer], s.key_offset[layer])
            values_THd = quantized(values_THd, s.value_scale[layer], s.value_offset[layer])
        self.keys[layer].flatten(0, 1).index_copy_(0, slots_T, keys_THd)
        self.values[layer].flatten(0, 1).index_copy_(0, slots_T, values_THd)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at slots [...]: [..., kv_heads, head_dim] twice. In the cache's dtype, or with scales in float32: what
        8 bits and an offset hold, bfloat16 does not."""
        flat = slots.flatten()
        keys, values = (
            cache[layer].flatten(0, 1).index_select(0, flat).unflatten(0, slots.shape) for cache in (self.keys, self.values)
        )
        if (s := self.scales) is None:
            return keys, values
        return (
            dequantized(keys, s.key_scale[layer], s.key_offset[layer]),
            dequantized(values, s.value_scale[layer], s.value_offset[layer]),
        )

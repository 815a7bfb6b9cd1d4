"""The tensors of the paged KV cache of one rank."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `kv_heads` heads for every layer, [blocks, block_size, kv_heads, head_dim] a layer.

    Slot s is position s % block_size of block s // block_size. Memory is not initialised: what was not written is never read.
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
    ) -> None:
        shape = (layers, num_blocks, block_size, kv_heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.block_size = block_size

    def write(self, layer: int, slots_T: Tensor, keys_THd: Tensor, values_THd: Tensor) -> None:
        """Stores the new tokens' keys and values at their slots."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots_T, keys_THd)
        self.values[layer].flatten(0, 1).index_copy_(0, slots_T, values_THd)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at slots [...]: [..., kv_heads, head_dim] twice."""
        flat = slots.flatten()
        keys, values = (
            cache[layer].flatten(0, 1).index_select(0, flat).unflatten(0, slots.shape) for cache in (self.keys, self.values)
        )
        return keys, values

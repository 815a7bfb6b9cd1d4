"""The attention of a block, up to its partial sum. T tokens, D hidden, H and K local query and KV heads, d head_dim."""

from dataclasses import dataclass

from torch import Tensor

from qtp.attention.backend import AttentionBackend
from qtp.batch import Batch
from qtp.kv.cache import KVCache
from qtp.layers.linear import Linear
from qtp.layers.rope import rotate


@dataclass(frozen=True, slots=True)
class Step:
    """A batch with what all layers of a step share: rope's cos and sin [T, 1, d / 2] and the attention plan."""

    batch: Batch
    cos: Tensor
    sin: Tensor
    plan: object


class Attention:
    """Takes the full x_TD and gives a partial sum [T, D] over this rank's query heads.

    qkv: [(H + 2 K) d, D], rows in the order query, key, value; o: [D, H d]. window: as `AttentionBackend.run`.
    """

    def __init__(
        self,
        qkv: Linear,
        o: Linear,
        backend: AttentionBackend,
        cache: KVCache,
        *,
        layer: int,
        heads: int,
        kv_heads: int,
        window: int | None,
    ) -> None:
        self.qkv, self.o, self.backend, self.cache = qkv, o, backend, cache
        self.layer, self.heads, self.kv_heads, self.window = layer, heads, kv_heads, window

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        qkv_THd = self.qkv(x_TD).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
        qk_THd, v_TKd = qkv_THd.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        q_THd, k_TKd = rotate(qk_THd, step.cos, step.sin).split((self.heads, self.kv_heads), dim=1)
        self.cache.write(self.layer, step.batch.slots_T, k_TKd, v_TKd)
        return self.o(self.backend.run(step.plan, self.layer, q_THd, self.window).flatten(1))

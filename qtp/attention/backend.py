"""What a backend of paged attention offers."""

from typing import Protocol

from torch import Tensor

from qtp.batch import Batch


class AttentionBackend(Protocol):
    """Causal attention of one rank's query heads over the KV heads they read. T tokens, H local query heads, d head_dim.

    The keys and values of the step's own tokens are in the cache before `run` is called.
    """

    def plan(self, batch: Batch) -> object:
        """What `run` needs to know of a step, made once for all layers."""
        ...

    def run(self, plan: object, layer: int, query_THd: Tensor, window: int | None) -> Tensor:
        """[T, H, d]: softmax(q k^T / sqrt(d)) v for each token over its sequence up to itself, or over the last `window`
        tokens of it (itself included)."""
        ...

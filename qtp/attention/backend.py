"""What a backend of paged attention offers."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from collectives.communicator import Communicator
from qtp.batch import Batch
from qtp.kernels.interface import Op, RowOp, Whole


class AttentionBackend(Protocol):
    """Causal attention of one rank's query heads over the KV heads they read, rope and the writing of the KV cache included.
    T tokens, H local query heads, K local KV heads, d head_dim."""

    def plan(self, batch: Batch, cos: Tensor, sin: Tensor) -> object:
        """What `run` needs to know of a step, made once for all layers. cos, sin: [T, d / 2] float32, for the positions."""
        ...

    def run(self, plan: object, layer: int, qkv_THd: Tensor, window: int | None) -> Tensor:
        """[T, H, d]: softmax(q k^T / sqrt(d)) v for each token over its sequence up to itself, or over the last `window`
        tokens of it (itself included).

        qkv_THd: [T, H + 2 K, d], queries, keys, values; it may be written to. Queries and keys are turned by their positions
        (arXiv 2104.09864; halves are first and second, not interleaved), keys and values go to the cache at the batch's slots."""
        ...


@runtime_checkable
class Surrounded(Protocol):
    """A backend that can do a whole half of a block in one call (`kernels.interface.Joins`)."""

    def surrounded(self, qkv: Op, o: RowOp, comm: Communicator, layer: int, window: int | None) -> Whole | None:
        """reduce(o(run(qkv(x)))), the sum being over `comm`; None where these cannot go together."""
        ...

"""The attention of a block, up to its partial sum. T tokens, D hidden, H and K local query and KV heads, d head_dim."""

from torch import Tensor

from collectives.communicator import Communicator
from qtp.attention.backend import AttentionBackend, Surrounded
from qtp.kernels.interface import Op, Partial, RowOp


class Attention:
    """Takes the full x_TD and gives a partial sum [T, D] over this rank's query heads, or a `Deferred` over all of `comm`.

    qkv: with its norm, to (H + 2 K) d columns, in the order query, key, value; o: from H d columns to D. window: as
    `AttentionBackend.run`.
    """

    def __init__(
        self, qkv: Op, o: RowOp, backend: AttentionBackend, comm: Communicator, *, layer: int, head_dim: int, window: int | None
    ) -> None:
        self.qkv, self.o, self.backend = qkv, o, backend
        self.layer, self.head_dim, self.window = layer, head_dim, window
        self.whole = backend.surrounded(qkv, o, comm, layer, window) if isinstance(backend, Surrounded) else None

    def __call__(self, x_TD: Tensor, plan: object) -> Partial:
        if self.whole is not None and (whole := self.whole(x_TD, plan)) is not None:
            return whole
        qkv_THd = self.qkv(x_TD).unflatten(-1, (-1, self.head_dim))
        return self.o(self.backend.run(plan, self.layer, qkv_THd, self.window).flatten(1))

"""The gated feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x)). T tokens, D hidden, F this rank's columns."""

from torch import Tensor

from collectives.communicator import Communicator
from qtp.kernels.interface import Joins, Op, Partial, RowOp


class GatedMLP:
    """gated: `Kernels.gated`, with its norm, [T, D] to [T, F]; down: [T, F] to [T, D]. Takes the full x_TD and gives a partial
    sum [T, D]; where it is given `comm`, over which the sum is, perhaps a `Deferred`."""

    def __init__(self, gated: Op, down: RowOp, comm: Communicator | None = None) -> None:
        self.gated, self.down = gated, down
        self.whole = gated.joined(down, comm) if comm is not None and isinstance(gated, Joins) else None

    def __call__(self, x_TD: Tensor) -> Partial:
        if self.whole is not None and (whole := self.whole(x_TD, None)) is not None:
            return whole
        return self.down(self.gated(x_TD))

"""The gated feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x)). T tokens, D hidden, F this rank's columns."""

from torch import Tensor

from qtp.kernels.interface import Op, Partial, RowOp


class GatedMLP:
    """gated: `Kernels.gated`, with its norm, [T, D] to [T, F]; down: [T, F] to [T, D]. Takes the full x_TD and gives a partial
    sum [T, D]."""

    def __init__(self, gated: Op, down: RowOp) -> None:
        self.gated, self.down = gated, down

    def __call__(self, x_TD: Tensor) -> Partial:
        return self.down(self.gated(x_TD))

"""The gated feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x)). T tokens, D hidden, F this rank's columns."""

from torch import Tensor
from torch.nn import functional as F

from qtp.layers.linear import Linear


class GatedMLP:
    """gate_up: gate and up packed, [2 F, D]; down: [D, F]. Takes the full x_TD and gives a partial sum [T, D]."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up, self.down = gate_up, down

    def __call__(self, x_TD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))

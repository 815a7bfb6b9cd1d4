"""The linear layer of a shard."""

from torch import Tensor
from torch.nn import functional as F


class Linear:
    """y = x W^T + b with this rank's box of W.

    Cut on its rows (a column linear, in Megatron's word), it takes the full input and gives this rank's columns of the
    output. Cut on its columns (a row linear), it takes this rank's part of the input and gives a PARTIAL sum of the full
    output, to be reduced by the block; its bias, if any, is held by one rank only (`layout.split.Once`).

    weight: [n, k]; bias: [n] or None; x: [tokens, k].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

"""RMSNorm (arXiv 1910.07467)."""

import torch
from torch import Tensor


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. weight: [hidden]; x: [tokens, hidden].

    The division is done in float32 and rounded before the weight is applied, as in transformers. Written out, because
    torch's own rms_norm on the CPU takes 1 to 3 ms for 1024 x 896 in bfloat16, and this 0.3 ms.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight

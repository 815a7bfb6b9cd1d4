"""RMSNorm (arXiv 1910.07467)."""

from torch import Tensor
from torch.nn import functional as F


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the mean in float32. weight: [hidden]; x: [tokens, hidden]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

"""Rotary position embedding (arXiv 2104.09864), with static YaRN (arXiv 2309.00071).

Halves are (first, second), not interleaved. Shapes: T tokens, H heads, d = head_dim.
"""

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from qtp.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[d / 2] float32. YaRN blends interpolated (divided by factor) and original frequencies by a ramp between the dimensions
    that turn beta_fast and beta_slow times over the original context (section 3.2 of the paper)."""
    base = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.original_max_position == 0:
        return 1.0 / base

    def dimension(turns: float) -> float:
        return head_dim * log(rope.original_max_position / (turns * 2 * pi)) / (2 * log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (1.0 / (rope.factor * base)) * ramp + (1.0 / base) * (1 - ramp)


class Rope:
    """cos and sin for the positions of a step, and the rotation."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        self.frequencies = inverse_frequencies(rope, head_dim).to(device)
        self.attention_factor = rope.attention_factor

    def table(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, 1, d / 2] each; made once a step."""
        angles = positions_T.to(torch.float32)[:, None, None] * self.frequencies
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head's vector turned by its position: [T, H, d] to [T, H, d]."""
    first, second = x_THd.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

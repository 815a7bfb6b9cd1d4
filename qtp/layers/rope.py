"""Rotary position embedding (arXiv 2104.09864), with static YaRN (arXiv 2309.00071).

Shapes: T tokens, d = head_dim.
"""

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from qtp.config import RopeConfig

_PIECE = 2048


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
    """cos and sin for the positions of a step; the attention backend rotates by them. They are made for whole pieces of _PIECE
    positions at a time and kept: so they are the same bits for a position whatever else is in the step."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        self.frequencies = inverse_frequencies(rope, head_dim).to(device)
        self.attention_factor = rope.attention_factor
        self._made = torch.empty(2, 0, head_dim // 2, device=device)

    def table(self, positions_T: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, d / 2] float32 each. All positions are below `longest`."""
        while self._made.shape[1] < longest:
            start = self._made.shape[1]
            positions = torch.arange(start, start + _PIECE, dtype=torch.float32, device=self._made.device)
            angles = positions[:, None] * self.frequencies
            piece = torch.stack((angles.cos(), angles.sin())) * self.attention_factor
            self._made = torch.cat((self._made, piece), dim=1)
        cos, sin = self._made.index_select(1, positions_T).unbind()
        return cos, sin

"""The table of rotary embeddings is that of the formula at every position, whatever was asked for before."""

import torch

from qtp.config import RopeConfig
from qtp.layers.rope import Rope, inverse_frequencies


def test_positions_far_apart_and_in_any_order() -> None:
    config = RopeConfig(theta=1e4, factor=4.0, original_max_position=1024, attention_factor=1.2)
    frequencies = inverse_frequencies(config, 32).double()
    rope = Rope(config, 32, torch.device("cpu"))
    for positions in ([0], [2047, 2048, 5], [9000, 0, 4095, 4096], [3]):
        cos, sin = rope.table(torch.tensor(positions), max(positions) + 1)
        angles = torch.tensor(positions, dtype=torch.float64)[:, None] * frequencies
        assert cos.shape == sin.shape == (len(positions), 16)
        assert cos.dtype == torch.float32
        assert (cos - 1.2 * angles.cos()).abs().max() < 2e-3  # the angles themselves are float32
        assert (sin - 1.2 * angles.sin()).abs().max() < 2e-3


def test_a_position_has_the_same_bits_in_any_company() -> None:
    rope, other = (Rope(RopeConfig(theta=1e6), 14, torch.device("cpu")) for _ in range(2))
    whole = rope.table(torch.arange(5000), 5000)
    for position in (0, 1, 2047, 2048, 4999):
        alone = other.table(torch.tensor([position]), position + 1)
        assert torch.equal(alone[0][0], whole[0][position])
        assert torch.equal(alone[1][0], whole[1][position])

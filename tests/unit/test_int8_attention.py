"""Attention over an int8 cache: torch's against a plain float64 computation of the formulas, the native one against both."""

import random
from dataclasses import replace

import pytest
import torch
from attention_helper import LAYER, NAN, Paged, Sequences
from torch import Tensor

from qtp.attention.torch_backend import TorchAttention
from qtp.kv.cache import KVScales

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
KV_OF = ((0,), (0, 1, 2), (0,) * 7, (0,) * 7 + (1,) * 7, (0, 0, 0, 1), (0, 1, 1, 1, 1, 1, 2, 2), (0,) * 9 + (1,) * 3)


def with_outliers(s: Sequences, seed: int) -> Sequences:
    """Some channels of keys and values a hundred times as large; queries there are small, or they alone would decide."""
    dice, heads, half = random.Random(seed), len(s.kv_of), s.head_dim // 2
    for kv_head in range(s.kv_heads):
        key, value = heads + kv_head, heads + s.kv_heads + kv_head
        turned, channel = dice.randrange(half), dice.randrange(s.head_dim)
        for x in s.qkv:
            for i in (turned, turned + half):
                x[:, key, i] *= 100
                x[:, [h for h, k in enumerate(s.kv_of) if k == kv_head], i] *= 0.01
            x[:, value, channel] = x[:, value, channel] * 30 + 100
    return s


def scales_of(s: Sequences, seed: int, query: bool = False) -> KVScales:
    """Scales and offsets per channel from the smallest and the largest of all tokens, moved a little, so that some are clamped
    and offsets are no integers. With `query` per head instead, and of queries as well. What belongs to other layers and heads is
    NaN."""
    g, heads = torch.Generator().manual_seed(seed), len(s.kv_of)
    turned = torch.cat([s.turned(i, len(x)) for i, x in enumerate(s.qkv)]).float()
    values = torch.cat([x[:, heads + s.kv_heads :] for x in s.qkv]).float()

    def measured(x_LHd: Tensor) -> tuple[Tensor, Tensor]:
        over = (0, 2) if query else (0,)
        low, high = x_LHd.amin(over, keepdim=True)[0], x_LHd.amax(over, keepdim=True)[0]
        shift = torch.rand(2, *low.shape, generator=g) * 0.3 - 0.1
        low, high = low - shift[0] * (high - low + 1e-3), high + shift[1] * (high - low + 1e-3)
        scale = (high - low) / 255
        wide = [torch.full((3, len(scale) + 2, s.head_dim), NAN) for _ in range(2)]
        for of, x in zip(wide, (scale, -low / scale - 128), strict=True):
            of[LAYER, 1:-1] = x
        return wide[0][:2, 1:-1], wide[1][:2, 1:-1]

    key, value = measured(turned[:, heads:]), measured(values)
    found = KVScales(key_scale=key[0], key_offset=key[1], value_scale=value[0], value_offset=value[1])
    if not query:
        return found
    scale, offset = measured(turned[:, :heads])
    return replace(found, query_scale=scale[..., 0], query_offset=offset[..., 0])


def codes(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return torch.clamp(torch.round(x.float() / scale + offset), -128, 127)


def expected(paged: Paged, sequence: int, start: int, stop: int, window: int | None) -> Tensor:
    """What the formulas make, in float64, of the codes in the cache and the queries of tokens start ... stop - 1."""
    s, scales = paged.s, paged.cache.scales
    assert scales is not None
    slots, query = paged.slots(sequence, stop), s.turned(sequence, stop)[start:, : len(s.kv_of)].double()
    if scales.query_scale is not None and scales.query_offset is not None:
        scale, offset = (x[LAYER, :, None] for x in (scales.query_scale, scales.query_offset))
        query = (codes(query, scale, offset).double() - offset.double()) * scale.double()
    key, value = (x[LAYER].flatten(0, 1)[slots].double() for x in (paged.cache.keys, paged.cache.values))
    key = (key - scales.key_offset[LAYER].double()) * scales.key_scale[LAYER].double()
    value = (value - scales.value_offset[LAYER].double()) * scales.value_scale[LAYER].double()
    return s.attention(query, key, value, window)


def bound(s: Sequences) -> float:
    """How far values may lie apart: one with large values more than another."""
    return TOLERANCE[s.dtype] * max(1.0, max(float(x[:, len(s.kv_of) + s.kv_heads :].abs().max()) for x in s.qkv) / 4)


def check_codes(paged: Paged, sequence: int, start: int, stop: int, apart: float) -> None:
    """What is in the cache of tokens start ... stop - 1 is what the formula makes of them, give or take `apart` of the range."""
    s, scales = paged.s, paged.cache.scales
    assert scales is not None
    slots, heads = paged.slots(sequence, stop)[start:], len(s.kv_of)
    keys, values = (x[LAYER].flatten(0, 1)[slots].float() for x in (paged.cache.keys, paged.cache.values))
    right = codes(s.turned(sequence, stop)[start:, heads:], scales.key_scale[LAYER], scales.key_offset[LAYER])
    assert (keys - right).abs().max() <= max(1.0, 256 * apart)
    if apart < 1e-5:
        assert (keys != right).float().mean() < 1e-3
    right = codes(s.qkv[sequence][start:stop, heads + s.kv_heads :], scales.value_scale[LAYER], scales.value_offset[LAYER])
    assert torch.equal(values, right)


def case(seed: int, dtype: torch.dtype, query: bool) -> tuple[Sequences, KVScales, list[tuple[int, int, int]], int | None, int]:
    """A random step over a cache that holds what comes before it: chunks, window, block size."""
    dice = random.Random(f"{seed} {dtype} {query}")
    lengths = [max(1, int((1500 if seed == 0 else 500) ** dice.random())) for _ in range(dice.randint(1, 5))]
    lengths[0] = 1500 if seed == 0 else lengths[0]
    starts = [n - 1 if i < len(lengths) // 2 else n - dice.randint(1, min(n, 400)) for i, n in enumerate(lengths)]
    s = Sequences(seed, dice.choice(KV_OF), dice.choice((2, 8, 14, 32, 64, 80, 128)), lengths, dtype)
    if not query:
        with_outliers(s, seed)
    chunks = [(i, starts[i], lengths[i]) for i in range(len(lengths))]
    return s, scales_of(s, seed, query), chunks, dice.choice((None, None, 1, 17, 256, 300)), (1, 5, 16, 128, 256, 48)[seed]


@pytest.mark.parametrize("query", [False, True], ids=["C8", "FA3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_torch_computes_the_formulas(dtype: torch.dtype, seed: int, query: bool) -> None:
    s, scales, chunks, window, block_size = case(seed, dtype, query)
    s.cos, s.sin = torch.ones_like(s.cos), torch.zeros_like(s.sin)  # torch turns in the run's dtype, which is not the matter here
    scales = scales_of(s, seed, query)
    paged = Paged(s, block_size, seed, TorchAttention, scales)
    paged.fill([start for _, start, _ in chunks])
    for (i, start, stop), out in zip(chunks, paged.step(chunks, window), strict=True):
        assert out.dtype == dtype
        check_codes(paged, i, 0, stop, 0.0)
        torch.testing.assert_close(out.double(), expected(paged, i, start, stop, window), rtol=TOLERANCE[dtype], atol=bound(s))

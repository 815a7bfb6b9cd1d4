"""Attention over an int8 cache: torch's against a plain float64 computation of the formulas, the native one against both."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from attention_helper import LAYER, NAN, Paged, Sequences, check_independence
from torch import Tensor

from qtp.attention.native_backend import NativeAttention
from qtp.attention.torch_backend import TorchAttention
from qtp.kernels.extension import native, why_not
from qtp.kv.cache import KVScales

ISAS = native.isas() if why_not() is None else []
each_isa = pytest.mark.parametrize("isa", range(len(ISAS)), ids=ISAS)
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


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs are full of NaN before they are written; threads and instruction set are put back."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, shape: self.new_full(shape, NAN))
    yield
    torch.set_num_threads(threads)
    native.use_isa(len(ISAS) - 1)


@each_isa
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("query", [False, True], ids=["C8", "FA3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_native_computes_the_formulas(isa: int, dtype: torch.dtype, seed: int, query: bool) -> None:
    s, scales, chunks, window, block_size = case(seed, dtype, query)
    native.use_isa(isa)
    torch.set_num_threads((1, 2, 4)[seed % 3])
    paged, other = (Paged(s, block_size, seed, scales=scales, poison=poison) for poison in (127, -128))
    for p in (paged, other):
        p.fill([start for _, start, _ in chunks])
    got, again = (p.step(chunks, window) for p in (paged, other))
    for (i, start, stop), out, twin in zip(chunks, got, again, strict=True):
        check_codes(paged, i, start, stop, torch.finfo(dtype).eps)
        torch.testing.assert_close(out.double(), expected(paged, i, start, stop, window), rtol=TOLERANCE[dtype], atol=bound(s))
        assert torch.equal(out, twin)  # what was not written is not read


@each_isa
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    ("dtype", "window", "query"),
    [(torch.float32, 300, False), (torch.bfloat16, 300, True), (torch.bfloat16, None, False)],
    ids=str,
)
def test_a_row_does_not_depend_on_the_step(isa: int, dtype: torch.dtype, window: int | None, query: bool) -> None:
    """Bit for bit: chunks of any size, alone or beside others, any blocks and threads, all heads of a model or some."""
    native.use_isa(isa)
    torch.set_num_threads(1)
    s = Sequences(3, (0,) * 7 + (1,) * 7, 64, [700, 90, 333], dtype)
    check_independence(s, window, scales_of(s, 3, query))


@each_isa
@pytest.mark.usefixtures("_poisoned")
def test_a_long_sequence_is_shared_by_threads(isa: int) -> None:
    native.use_isa(isa)
    s = with_outliers(Sequences(5, (0,) * 6 + (1,) * 6, 128, [2700], torch.bfloat16), 5)
    paged = Paged(s, 128, scales=scales_of(s, 5))
    paged.fill([2699])
    outs = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        outs.append(paged.step([(0, 2699, 2700)])[0])
    assert all(torch.equal(out, outs[0]) for out in outs)
    torch.testing.assert_close(outs[0].double(), expected(paged, 0, 2699, 2700, None), rtol=0.01, atol=bound(s))


@each_isa
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_scores_and_none(isa: int, dtype: torch.dtype) -> None:
    """One key far above the others; a query that is 0 sees the mean of all; one that is not a number gives none."""
    native.use_isa(isa)
    s = Sequences(7, (0, 0), 64, [300], dtype)
    s.qkv[0][:, :3] *= 20
    s.cos, s.sin = torch.ones_like(s.cos), torch.zeros_like(s.sin)
    s.qkv[0][290, 0], s.qkv[0][291, 0] = 0.0, NAN
    scales = scales_of(s, 7)
    paged = Paged(s, 16, scales=scales)
    out = paged.step([(0, 0, 300)])[0]
    right = expected(paged, 0, 0, 300, None)
    assert out[291, 0].isnan().all()
    out[291, 0], right[291, 0] = 0.0, 0.0
    torch.testing.assert_close(out.double(), right, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.skipif(not ISAS, reason=str(why_not()))
@pytest.mark.parametrize("query", [False, True], ids=["C8", "FA3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_is_as_torch(dtype: torch.dtype, query: bool) -> None:
    s, scales, chunks, window, block_size = case(4, dtype, query)
    s.cos, s.sin = torch.ones_like(s.cos), torch.zeros_like(s.sin)  # torch turns in the run's dtype
    native_one, torch_one = (Paged(s, block_size, 4, backend, scales) for backend in (NativeAttention, TorchAttention))
    for paged in (native_one, torch_one):
        paged.fill([start for _, start, _ in chunks])
    for ours, theirs in zip(native_one.step(chunks, window), torch_one.step(chunks, window), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2 * TOLERANCE[dtype], atol=2 * bound(s))
    assert torch.equal(native_one.cache.keys, torch_one.cache.keys)
    assert torch.equal(native_one.cache.values, torch_one.cache.values)


@pytest.mark.usefixtures("_poisoned")
@each_isa
def test_halves_are_rounded_to_even_and_what_is_beyond_is_clamped(isa: int) -> None:
    native.use_isa(isa)
    s = Sequences(1, (0,), 2, [8], torch.float32)
    s.cos, s.sin = torch.ones_like(s.cos), torch.zeros_like(s.sin)
    values = torch.tensor([0.5, 1.5, -0.5, -2.5, 127.5, 1e9, -128.5, -1e9])
    s.qkv[0][:, 1:] = values[:, None, None]
    one, none = torch.ones(2, 1, 2), torch.zeros(2, 1, 2)
    for backend in (NativeAttention, TorchAttention):
        for scale, offset in ((one, none), (one * 2, one * 3)):
            paged = Paged(s, 8, 0, backend, KVScales(key_scale=scale, key_offset=none, value_scale=one, value_offset=offset))
            paged.step([(0, 0, 8)])
            for cache, by, shift in ((paged.cache.keys, scale, 0), (paged.cache.values, one, offset[0, 0, 0])):
                right = torch.clamp(torch.round(values / by[0, 0, 0] + shift), -128, 127)
                assert cache[LAYER].flatten(0, 1)[paged.slots(0, 8)][:, 0, 0].tolist() == right.tolist()

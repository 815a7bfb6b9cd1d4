"""Attention over an int8 cache: torch's against a plain float64 computation of the formulas, the native one against both."""

import random
from collections.abc import Iterator

import pytest
import torch
from attention_helper import (
    INT8_TOLERANCE,
    LAYER,
    NAN,
    Paged,
    Sequences,
    bound,
    check_codes,
    check_independence,
    dequantized_attention,
    scales_of,
    with_outliers,
)

from qtp.attention.native_backend import NativeAttention
from qtp.attention.torch_backend import TorchAttention
from qtp.kernels.extension import native, why_not
from qtp.kv.cache import KVScales

ISAS = native.isas() if why_not() is None else []
each_isa = pytest.mark.parametrize("isa", range(len(ISAS)), ids=ISAS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KV_OF = ((0,), (0, 1, 2), (0,) * 7, (0,) * 7 + (1,) * 7, (0, 0, 0, 1), (0, 1, 1, 1, 1, 1, 2, 2), (0,) * 9 + (1,) * 3)


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
        torch.testing.assert_close(
            out.double(), dequantized_attention(paged, i, start, stop, window), rtol=INT8_TOLERANCE[dtype], atol=bound(s)
        )


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
        torch.testing.assert_close(
            out.double(), dequantized_attention(paged, i, start, stop, window), rtol=INT8_TOLERANCE[dtype], atol=bound(s)
        )
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
    torch.testing.assert_close(outs[0].double(), dequantized_attention(paged, 0, 2699, 2700, None), rtol=0.01, atol=bound(s))


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
    right = dequantized_attention(paged, 0, 0, 300, None)
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
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2 * INT8_TOLERANCE[dtype], atol=2 * bound(s))
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

"""Native paged attention against a plain float64 computation and the torch fallback, and bit for bit against itself."""

import random
from collections.abc import Iterator

import pytest
import torch
from attention_helper import CPU, NAN, Paged, Sequences, check_independence

from collectives.solo import Solo
from qtp.attention.native_backend import NativeAttention
from qtp.attention.torch_backend import TorchAttention
from qtp.batch import make_batch
from qtp.kernels.extension import native, why_not
from qtp.kernels.interface import Norm
from qtp.kernels.native_kernels import NativeKernels
from qtp.kv.cache import KVCache

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
ISAS = native.isas() if why_not() is None else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_isa = pytest.mark.parametrize("isa", range(len(ISAS)), ids=ISAS)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs are full of NaN before they are written; threads and instruction set are put back."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, shape: self.new_full(shape, NAN))
    yield
    torch.set_num_threads(threads)
    if ISAS:
        native.use_isa(len(ISAS) - 1)


TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
KV_OF = ((0,), (0, 1, 2), (0,) * 7, (0,) * 7 + (1,) * 7, (0, 0, 0, 1), (0, 1, 1, 1, 1, 1, 2, 2), (0,) * 20, (0,) * 9 + (1,) * 3)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_it_is_attention(isa: int, dtype: torch.dtype, seed: int) -> None:
    """Random steps: decoding sequences and chunks of prompts, over a cache in which all else is NaN."""
    dice = random.Random(f"{seed} {dtype}")
    longest = 3000 if seed == 0 else 600
    lengths = [max(1, int(longest ** dice.random())) for _ in range(dice.randint(1, 5))]
    lengths[0] = longest if seed == 0 else lengths[0]
    starts = [n - 1 if i < len(lengths) // 2 else n - dice.randint(1, min(n, 400)) for i, n in enumerate(lengths)]
    window = dice.choice((None, None, 1, 17, 256, 700))
    s = Sequences(seed, dice.choice(KV_OF), dice.choice((2, 10, 32, 48, 64, 80, 96, 128, 256)), lengths, dtype)
    block_size = (1, 5, 16, 128, 256, 48)[seed]
    native.use_isa(isa)
    torch.set_num_threads((1, 2, 4)[seed % 3])
    paged, oracle = Paged(s, block_size, seed), Paged(s, block_size, seed, TorchAttention)
    paged.fill(starts)
    oracle.fill(starts)
    chunks = [(i, starts[i], lengths[i]) for i in range(len(lengths))]
    got, other = paged.step(chunks, window), oracle.step(chunks, window)
    bound = TOLERANCE[dtype]
    for (i, start, stop), out, torchs in zip(chunks, got, other, strict=True):
        expected = s.expected(i, start, stop, window)
        torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)
        torch.testing.assert_close(out.double(), torchs.double(), rtol=4 * bound, atol=4 * bound)  # it rounds cos and sin as well
    for mine, theirs in ((paged.cache.keys, oracle.cache.keys), (paged.cache.values, oracle.cache.values)):
        torch.testing.assert_close(mine, theirs, rtol=4 * bound, atol=4 * bound, equal_nan=True)


@each_isa
@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, 300), (torch.bfloat16, 300), (torch.bfloat16, None)], ids=str)
def test_a_row_does_not_depend_on_the_step(isa: int, dtype: torch.dtype, window: int | None) -> None:
    """Bit for bit: chunks of any size, alone or beside others, any blocks and threads, all heads of a model or some."""
    native.use_isa(isa)
    torch.set_num_threads(1)
    check_independence(Sequences(3, (0,) * 7 + (1,) * 7, 64, [700, 90, 333], dtype), window)


@each_isa
def test_many_rows_do_not_depend_on_the_step(isa: int) -> None:
    """The last bit of a sum shows in few outputs in bfloat16; here are half a million."""
    native.use_isa(isa)
    torch.set_num_threads(2)
    dice = random.Random(11)
    s = Sequences(11, (0,) * 7 + (1,) * 3, 64, [dice.randint(20, 200) for _ in range(60)], torch.bfloat16)
    whole = Paged(s, 128).step([(i, 0, len(x)) for i, x in enumerate(s.qkv)])
    paged, back = Paged(s, 128), 12
    paged.step([(i, 0, len(x) - back) for i, x in enumerate(s.qkv)])
    for n in range(back, 0, -1):
        step = paged.step([(i, len(x) - n, len(x) - n + 1) for i, x in enumerate(s.qkv)])
        assert all(torch.equal(one[0], all_[-n]) for one, all_ in zip(step, whole, strict=True)), n


@each_isa
@pytest.mark.parametrize("window", [None, 20])
def test_a_short_chunk_over_a_cut(isa: int, window: int | None) -> None:
    """Few rows, some of which see one partition more or less than others, are shared by threads."""
    native.use_isa(isa)
    torch.set_num_threads(4)
    s = Sequences(13, (0, 1), 64, [300], torch.float32)
    paged = Paged(s, 16)
    paged.fill([230])
    out = paged.step([(0, 230, 300)], window)[0]
    torch.testing.assert_close(out.double(), s.expected(0, 230, 300, window), rtol=1e-5, atol=1e-5)


@each_isa
def test_a_long_sequence_is_shared_by_threads(isa: int) -> None:
    native.use_isa(isa)
    s = Sequences(5, (0,) * 6 + (1,) * 6, 128, [2700], torch.bfloat16)
    paged = Paged(s, 128)
    paged.fill([2699])
    outs = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        outs.append(paged.step([(0, 2699, 2700)])[0])
    assert all(torch.equal(out, outs[0]) for out in outs)
    torch.testing.assert_close(outs[0].double(), s.expected(0, 2699, 2700, None), rtol=0.01, atol=0.002)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 9])
def test_between_its_two_layers_in_one_call(isa: int, dtype: torch.dtype, window: int | None) -> None:
    """x + o(attention(qkv(x))), of a chunk of a prompt and then of decodes beside a chunk: the bits of one op after the other."""
    native.use_isa(isa)
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(12)
    heads, kv_of, width, d = 5, (0, 0, 0, 1, 1), 44, 32
    kernels = NativeKernels()
    qkv = kernels.linear(
        torch.randn((heads + 4) * d, width, generator=generator).to(dtype),
        torch.randn((heads + 4) * d, generator=generator).to(dtype),
        norm=Norm(torch.randn(width, generator=generator).to(dtype), 1e-6),
    )
    o = kernels.linear((torch.randn(width, heads * d, generator=generator) / 8).to(dtype))
    backends = [NativeAttention(KVCache(2, 12, 8, 2, d, dtype, CPU), kv_of, CPU) for _ in range(2)]
    for backend in backends:
        backend.cache.keys.fill_(NAN)
        backend.cache.values.fill_(NAN)
    whole = backends[0].surrounded(qkv, o, Solo(CPU), 1, window)
    assert whole is not None
    assert backends[0].surrounded(lambda x: x, o, Solo(CPU), 1, window) is None
    for parts in ([((0,) * 11, 0, (3, 1)), ((0,) * 4, 0, (5,))], [((0,), 4, (5,)), ((0,) * 7, 11, (3, 1, 0))]):
        batch = make_batch(parts, 8, CPU)
        angles = torch.rand(len(batch.slots_T), d // 2, generator=generator)
        x = torch.randn(len(batch.slots_T), width, generator=generator).to(dtype)
        plans = [backend.plan(batch, angles.cos(), angles.sin()) for backend in backends]
        deferred, residual = whole(x, plans[0]), x.clone()
        assert deferred is not None
        attended = backends[1].run(plans[1], 1, qkv(x).unflatten(-1, (-1, d)), window)
        assert torch.equal(deferred.add_to(residual), x + o(attended.flatten(1)))
        assert torch.equal(backends[0].cache.keys[1].nan_to_num(), backends[1].cache.keys[1].nan_to_num())


@each_isa
def test_far_scores(isa: int) -> None:
    """Scores of hundreds, one key far above the others: nothing overflows, and what is not seen has no part in it."""
    native.use_isa(isa)
    for dtype in DTYPES:
        s = Sequences(7, (0, 0), 64, [300], dtype)
        s.qkv[0][:, :3] *= 20
        s.cos, s.sin = torch.ones_like(s.cos), torch.zeros_like(s.sin)  # else the last bit of a turned query decides
        out = Paged(s, 16).step([(0, 0, 300)])[0]
        torch.testing.assert_close(out.double(), s.expected(0, 0, 300, None), rtol=0.02, atol=0.02)
        assert torch.equal(out[0, 0], s.qkv[0][0, 3])


def test_queries_of_strided_rows() -> None:
    s = Sequences(9, (0, 0, 1), 32, [40], torch.bfloat16)
    plain = Paged(s, 16).step([(0, 0, 40)])[0]
    wide = torch.cat((s.qkv[0], s.qkv[0][:, :2]), dim=1)
    paged = Paged(s, 16)
    plan = paged.backend.plan(make_batch([((1,) * 40, 0, paged.tables[0])], 16, CPU), s.cos, s.sin)
    assert torch.equal(paged.backend.run(plan, 1, wide[:, : s.qkv[0].shape[1]], None), plain)

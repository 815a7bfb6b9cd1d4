"""W8A8FP8: rounding to float8 e4m3, how weights are brought to it, and its kernels, against the formulas in float64.

Shapes are random and mostly odd; what lies between the rows of an input is NaN.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from quantized_helper import e4m3
from torch import Tensor

from collectives.communicator import Communicator
from collectives.loopback import loopback
from collectives.tree import tree_sum
from qtp.kernels.interface import Expert, Norm
from qtp.kernels.native_kernels import NativeKernels
from qtp.kernels.torch_kernels import TorchKernels
from qtp.kernels.torch_quantized import quantized_input, to_fp8
from qtp.quantize.arithmetic import rows_fp8
from qtp.weights.quantized import W8A8FP8, W8A16, Float, Packed

FLOAT8 = torch.float8_e4m3fn
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
KERNELS = {"torch": TorchKernels, "native": NativeKernels}
every_kind = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)


def weight(rows: int, columns: int, generator: torch.Generator, biased: bool = False) -> W8A8FP8:
    codes = torch.randn(rows, columns + 5, generator=generator).mul_(60).clamp_(-448, 448).to(FLOAT8)
    scale = 0.001 * (0.1 + torch.rand(rows, generator=generator))
    return W8A8FP8(codes[:, 2 : 2 + columns], scale, torch.randn(rows, generator=generator) if biased else None)


def drawn(tokens: int, columns: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    apart = torch.full((tokens, columns + 7), float("nan"), dtype=dtype)
    x = apart[:, 3 : 3 + columns]
    x.copy_(torch.randn(tokens, columns, generator=generator) * torch.rand(tokens, 1, generator=generator).mul_(9).exp_())
    return x


def cases(seed: int, count: int) -> Iterator[tuple[torch.Generator, torch.dtype, int, int, int]]:
    """(generator, dtype, tokens, rows, columns)."""
    for i in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        tokens, rows, columns = (int(torch.randint(1, most, (1,), generator=generator)) for most in (20, 90, 200))
        yield generator, list(ROUNDING)[i % 3], tokens, rows, columns


def exact(w: W8A8FP8, x: Tensor) -> tuple[Tensor, Tensor]:
    """y in float64, and the sum of the magnitudes of what was added up. Divided in float32, as it is defined."""
    s_x = x.float().abs().amax(1, keepdim=True) / torch.tensor(448.0)
    s_x = torch.where(s_x == 0, 1.0, s_x)
    x_q, w_q = e4m3((x.float() / s_x).double()), w.weight.float().double()
    scale = s_x.double() * w.weight_scale.double()
    bias = 0.0 if w.bias is None else w.bias.double()
    return (x_q @ w_q.T) * scale + bias, (x_q.abs() @ w_q.abs().T) * scale


def assert_close(got: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape
    assert ((got.double() - expected).abs() <= ROUNDING[dtype] * expected.abs() + 2e-6 * size + 1e-7).all()


def test_rounding() -> None:
    """All values and what is between them, each way from the middle, and beyond the ends, where nothing becomes NaN."""
    values = torch.arange(256, dtype=torch.uint8).view(FLOAT8).double()
    values = values[values.isfinite()].unique()
    assert (len(values), float(values[-1]), float(values[values > 0][0])) == (253, 448.0, 2.0**-9)
    middles = (values[1:] + values[:-1]) / 2
    beyond = torch.tensor([449.0, 463.9, 464.0, 465.0, 480.0, 1e30, float("inf")], dtype=torch.float64)
    x = torch.cat((values, middles, middles * (1 + 1e-6), middles * (1 - 1e-6), beyond, -beyond)).float()
    for scale in (1.0, 0.25):
        got = to_fp8(x * scale, torch.tensor(scale))
        assert got.dtype == FLOAT8
        assert torch.equal(got.double(), e4m3(x.double()))
    assert torch.equal(got.double()[: len(values)], values)


def test_weights_have_a_scale_for_each_row() -> None:
    w = torch.randn(40, 130, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 9, 40)[:, None]
    w[3], w[5], w[7] = 0.0, 1e-45, 3e38
    q, scales = rows_fp8(w)
    assert (q.dtype, scales.dtype, scales.shape) == (FLOAT8, torch.float32, (40, 1))
    expected = w.double().abs().amax(1, keepdim=True) / 448
    usual = [i for i in range(40) if i not in (3, 5)]
    torch.testing.assert_close(scales.double()[usual], expected[usual], rtol=1e-6, atol=0)
    assert scales[[3, 5]].eq(1).all(), "any scale will do for zeros, and for what no float32 scale is small enough for"
    assert torch.equal(q.double(), e4m3((w / scales).double()))
    assert q[usual].float().abs().amax(1).eq(448).all(), "the largest of a row is the largest there is"
    error = (q.double() * scales.double() - w.double()).abs()
    assert (error <= w.double().abs() * 2.0**-4 * (1 + 1e-6) + scales.double() * 2.0**-10).all()


@every_kind
def test_the_formula(kernels: Any) -> None:
    for generator, dtype, tokens, rows, columns in cases(2, 30):
        w, x = weight(rows, columns, generator, biased=tokens % 2 == 0), drawn(tokens, columns, generator, dtype)
        w = w if w.bias is None else replace(w, bias=w.bias.to(dtype))
        got = kernels().linear(w)(x)
        assert got.dtype == dtype
        assert_close(got, *exact(w, x), dtype)
        assert_close(kernels().head(w).logits(x), *exact(w, x), torch.float32)


@every_kind
def test_the_ends_of_what_a_float_holds(kernels: Any) -> None:
    """Zeros, and numbers of which a 448th is none or of which the product could be infinite, beside each other."""
    generator = torch.Generator().manual_seed(3)
    w = weight(33, 40, generator)
    for dtype in ROUNDING:
        x = drawn(6, 40, generator, dtype)
        largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        x[1], x[2], x[3] = 0.0, least, 0.0
        x[3, 4], x[4, 7] = least, largest
        q, _ = quantized_input(w, x)
        assert q.float().isfinite().all()
        y = kernels().linear(w)(x)
        assert y[[0, 1, 2, 3, 5]].isfinite().all()
        assert y[1].eq(0).all()
        assert not y.isnan().any()


@every_kind
def test_ranks_agree_on_the_largest_of_a_token(kernels: Any) -> None:
    for generator, dtype, tokens, rows, columns in cases(4, 8):
        w, x = weight(rows, columns, generator), drawn(tokens, columns, generator, dtype)
        cuts = (0, columns // 5, columns // 5, columns)  # of three ranks; the second has nothing

        def rank(comm: Communicator, w: W8A8FP8 = w, x: Tensor = x, cuts: tuple[int, ...] = cuts) -> Tensor:
            own = slice(*cuts[comm.rank : comm.rank + 2])
            return kernels().linear(replace(w, weight=w.weight[:, own]), across=comm)(x[:, own])

        with ThreadPoolExecutor(3) as pool:
            partials = list(pool.map(rank, loopback(3, timeout=30.0)))
        assert all(partial.dtype == dtype for partial in partials)
        total = torch.stack([partial.double() for partial in partials]).sum(0)
        y, size = exact(w, x)
        assert_close(total, y, size * (1 + ROUNDING[dtype] / 1e-6), torch.float32)


@every_kind
def test_leaves(kernels: Any) -> None:
    """Those of two ranks, side by side, are those of one, and their sum is y."""
    for generator, dtype, tokens, rows, columns in cases(5, 8):
        w, x = weight(rows, columns, generator), drawn(tokens, columns, generator, dtype)
        cuts = (0, columns // 7, columns // 3, columns // 3, columns)
        found = kernels().linear_leaves(w, cuts)(x)
        assert (found.shape, found.dtype) == ((4, tokens, rows), torch.float32)
        assert_close(found.double().sum(0), *exact(w, x), torch.float32)
        assert torch.equal(kernels().linear(w, cuts=cuts)(x), tree_sum(found.unbind()))

        def rank(comm: Communicator, w: W8A8FP8 = w, x: Tensor = x, cuts: tuple[int, ...] = cuts) -> tuple[Tensor, Tensor]:
            own = cuts[2 * comm.rank : 2 * comm.rank + 3]
            part, inner = replace(w, weight=w.weight[:, own[0] : own[2]]), tuple(c - own[0] for c in own)
            here = x[:, own[0] : own[2]]
            return kernels().linear_leaves(part, inner, comm)(here), kernels().linear(part, cuts=inner, across=comm)(here)

        with ThreadPoolExecutor(2) as pool:
            leaves, sums = zip(*pool.map(rank, loopback(2, timeout=30.0)), strict=True)
        if kernels is NativeKernels:
            assert torch.equal(torch.cat(leaves), found)
        assert_close(torch.cat(leaves), found.double(), exact(w, x)[1], torch.float32)
        assert torch.equal(torch.stack(sums), torch.stack([tree_sum(part.unbind()) for part in leaves]))


def test_native_sums_do_not_depend_on_the_other_tokens() -> None:
    generator = torch.Generator().manual_seed(6)
    for columns in (31, 1024, 4864):
        w, x = weight(70, columns, generator), drawn(300, columns, generator, torch.bfloat16)
        op = NativeKernels().linear(w)
        whole = op(x)
        for a, b in pairwise((0, 1, 3, 20, 99, 300)):
            assert torch.equal(op(x[a:b]), whole[a:b])


@every_kind
def test_beside_others_and_behind_norms(kernels: Any) -> None:
    """Packed, gated, in experts and under an anti-outlier norm, which the part in float does not take."""
    for generator, dtype, tokens, rows, columns in cases(7, 6):
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        plain, other = (torch.randn(columns, generator=generator).to(dtype) for _ in range(2))
        norm = Norm(plain, 1e-6, anti=Norm(other, 1e-6, plain))
        w, f = weight(rows, columns, generator), Float(torch.randn(9, columns, generator=generator).to(dtype), None)
        w16 = W8A16(torch.ones(4, columns, dtype=torch.int8), torch.ones(4, 1), torch.zeros(4, 1), None, 0, 0)
        k = kernels()
        got = k.linear(Packed((w, f, w16)), norm=norm)(x)
        anti = k.rms_norm(norm.anti)(x)
        expected = [k.linear(w)(anti), k.linear(f.weight, norm=Norm(plain, 1e-6))(x), k.linear(w16)(anti)]
        assert torch.equal(got, torch.cat(expected, 1))

        up, down = weight(2 * rows, columns, generator), weight(columns, rows, generator)
        gate, value = k.linear(up)(x).double().chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate) * value
        gated = k.gated(up)(x)
        assert ((gated.double() - inner).abs() <= 3 * ROUNDING[dtype] * inner.abs() + 1e-7 * (1 + value.abs())).all()

        share, chosen = torch.rand(tokens, 1, generator=generator).to(dtype), torch.zeros(tokens, 1, dtype=torch.int64)
        out = k.experts({0: Expert(up, down)})(x, share, chosen, torch.zeros_like(x))
        whole = share.double() * k.head(down).logits(gated).double()
        assert ((out.double() - whole).abs() <= 4 * ROUNDING[dtype] * whole.abs() + 1e-7).all()


@every_kind
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (3, 5, 0), (300, 3, 0)])
def test_nothing_at_all(kernels: Any, shape: tuple[int, int, int]) -> None:
    tokens, rows, columns = shape
    w = weight(rows, columns, torch.Generator().manual_seed(8), biased=True)
    assert w.bias is not None
    y = kernels().linear(w)(torch.ones(tokens, columns))
    assert y.shape == (tokens, rows)
    assert columns or torch.equal(y, w.bias.expand(tokens, rows))

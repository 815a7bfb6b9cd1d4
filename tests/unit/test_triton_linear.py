"""Float linear layers, norms and the gate in Triton against float64, and what joins the residual stream at once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton_helper import DEVICE, poison

from qtp.kernels.interface import Deferred, Norm
from qtp.kernels.torch_kernels import TorchKernels
from qtp.kernels.triton.linear import OneToken
from qtp.kernels.triton.norm import rms_norm, silu_and_mul
from qtp.kernels.triton_kernels import TritonKernels
from qtp.models.qwen2 import Block

CUDA = DEVICE.type == "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 0.1  # large enough to show
SHAPES = [(1, 1), (7, 33), (9, 1030), (2, 2049), (17, 0)]  # outputs, inputs
if CUDA:
    SHAPES += [(4608, 3584), (3584, 18944), (1152, 896), (896, 4864), (512, 3584), (18944, 3584)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poison():
        yield


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def apart(x: Tensor, gap: int) -> Tensor:
    """x in the middle of NaN, `gap` elements between its rows."""
    rows, columns = x.shape
    around = torch.full((rows + 2, columns + gap), float("nan"), dtype=x.dtype, device=x.device)
    return around[1:-1, gap // 2 : gap // 2 + columns].copy_(x)


def vector(x: Tensor) -> Tensor:
    """A vector with NaN around it."""
    return apart(x[None], 6)[0]


def a_norm(width: int, dtype: torch.dtype, bias: bool = False) -> Norm:
    weight = vector(random(width, seed=91, dtype=dtype) + 1)
    return Norm(weight, EPS, vector(random(width, seed=92, dtype=dtype)) if bias else None)


def normed(norm: Norm, x: Tensor) -> Tensor:
    """In float64."""
    unit = x.double() / (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return unit * norm.weight.double() + (0.0 if norm.bias is None else norm.bias.double())


def check(y: Tensor, wanted: Tensor, size: Tensor, dtype: torch.dtype, steps: int = 1) -> None:
    """Rounded `steps` times to the dtype, and what float32 errs in sums of terms that add up to `size` if none is negative."""
    assert y.dtype == dtype
    assert y.shape == wanted.shape
    eps = torch.finfo(dtype).eps
    error = (y.double() - wanted).abs() - steps * eps * wanted.abs()
    assert (error <= 1e-6 * size + 1e-7 + (steps - 1) * eps * size / 8).all(), float(error.max())


@every_dtype
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_one_token(outputs: int, inputs: int, norm: bool, gated: bool, dtype: torch.dtype) -> None:
    """With bias and without, alone and added to what is there; rows of the weight lie apart."""
    rows = 2 * outputs if gated else outputs
    weight = apart(random(rows, inputs, seed=1, dtype=torch.float32).mul_(max(1, inputs) ** -0.5).to(dtype), 10)
    bias, x = vector(random(rows, seed=2, dtype=dtype)), apart(random(1, inputs, seed=3, dtype=dtype), 6)
    own = a_norm(inputs, dtype) if norm and inputs else None
    inner = x.double() if own is None else normed(own, x)
    y, size = inner @ weight.double().t(), inner.abs() @ weight.double().abs().t()
    if gated:
        gate, up = y.chunk(2, dim=1)
        y, size = F.silu(gate) * up, size.chunk(2, dim=1)[0] * up.abs() + size.chunk(2, dim=1)[1] * gate.abs() + 1
        check(OneToken(weight, None, own, True)(x), y, size, dtype)
        return
    check(OneToken(weight, None, own, False)(x), y, size, dtype)
    check(OneToken(weight, bias, own, False)(x), y + bias.double(), size, dtype)
    into = apart(random(1, outputs, seed=4, dtype=dtype), 8)
    wanted = y + into.double()
    around: Any = into._base
    assert OneToken(weight, None, own, False)(x, into) is into
    check(into, wanted, size + wanted.abs(), dtype)
    assert around.isnan().sum() == around.numel() - outputs


def test_nothing_to_make() -> None:
    for gated in (False, True):
        assert OneToken(torch.empty(0, 5, device=DEVICE), None, None, gated)(torch.ones(1, 5, device=DEVICE)).shape == (1, 0)


@every_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(3, 33), (1, 1), (2, 1030), (0, 8), *([(300, 3584)] if CUDA else [])])
def test_rms_norm(tokens: int, width: int, bias: bool, dtype: torch.dtype) -> None:
    x, norm = apart(random(tokens, width, seed=5, dtype=dtype), 6), a_norm(width, dtype, bias)
    y = rms_norm(x, norm)
    assert y.is_contiguous()
    wanted = normed(norm, x)
    unit = wanted - (norm.bias.double() if norm.bias is not None else 0)
    check(y, wanted, 4 * unit.abs(), dtype, 2)
    eps = torch.finfo(dtype).eps
    rtol, atol = eps, 1e-6
    if CUDA and tokens:  # a sum in another order, and what is rounded before a bias that takes most of it away
        rtol, atol = 2 * eps, 2 * eps * float(unit.abs().max())
    torch.testing.assert_close(y, TorchKernels().rms_norm(norm)(x), rtol=rtol, atol=atol)


@every_dtype
@pytest.mark.parametrize(("tokens", "width"), [(3, 33), (1, 2049), (2, 1), (0, 8), *([(300, 18944)] if CUDA else [])])
def test_silu_and_mul(tokens: int, width: int, dtype: torch.dtype) -> None:
    x = apart(random(tokens, 2 * width, seed=6, dtype=dtype) * 3, 6)
    gate, up = x.double().chunk(2, dim=1)
    check(silu_and_mul(x), F.silu(gate) * up, (gate * up).abs(), dtype)


@every_dtype
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_joining_is_the_residual_and_the_linear_layer(tokens: int, dtype: torch.dtype) -> None:
    """In the place of the residual, by way of the block."""
    weight = apart(random(9, 33, seed=7, dtype=dtype), 7)
    x, residual = random(tokens, 33, seed=8, dtype=dtype), random(tokens, 9, seed=9, dtype=dtype)
    joining = TritonKernels(DEVICE).joining(weight)
    partial = joining(x)
    assert isinstance(partial, Deferred)
    wanted = residual.double() + x.double() @ weight.double().t()
    size = residual.double().abs() + x.double().abs() @ weight.double().abs().t()

    def never(x: Any) -> Tensor:
        raise AssertionError("a lone rank has nobody to reduce with")

    own, before = residual.clone(), residual.clone()
    joined = Block(None, None, never)._join(own, partial)  # type: ignore[arg-type]
    assert joined.data_ptr() == own.data_ptr()
    check(joined, wanted, size, dtype)
    plain = TritonKernels(DEVICE).linear(weight)(x)
    assert isinstance(plain, Tensor)
    reduced = Block(None, None, lambda partial: partial * 2)._join(before, plain)  # type: ignore[arg-type, operator, return-value]
    check(reduced, residual.double() + 2 * plain.double(), size, dtype)


@every_dtype
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_kernels_are_as_those_of_torch(tokens: int, with_bias: bool, dtype: torch.dtype) -> None:
    """Norms with a bias too, which no kernel fuses."""
    ours, theirs = TritonKernels(DEVICE), TorchKernels()
    x, weight = random(tokens, 33, seed=11, dtype=dtype), apart(random(18, 33, seed=12, dtype=dtype) / 6, 7)
    bias, norm = random(18, seed=13, dtype=dtype), a_norm(33, dtype, with_bias)
    bound = {"rtol": 4 * torch.finfo(dtype).eps, "atol": max(4 * torch.finfo(dtype).eps, 2e-6 if CUDA else 0.0)}
    torch.testing.assert_close(ours.linear(weight, bias, norm=norm)(x), theirs.linear(weight, bias, norm=norm)(x), **bound)
    torch.testing.assert_close(ours.linear(weight)(x), theirs.linear(weight)(x), **bound)
    torch.testing.assert_close(ours.gated(weight, norm=norm)(x), theirs.gated(weight, norm=norm)(x), **bound)
    torch.testing.assert_close(ours.gated(weight)(x), theirs.gated(weight)(x), **bound)
    cut = ours.linear(weight, cuts=(0, 8, 33))(x)
    torch.testing.assert_close(cut, theirs.linear(weight, cuts=(0, 8, 33))(x))
    assert cut.dtype == torch.float32


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_a_norm_does_not_overflow_halves(tokens: int, gated: bool) -> None:
    """Of large elements the norm's weight makes more than float16 holds, before it is divided by their root mean square."""
    x = random(tokens, 33, seed=14, dtype=torch.float16).sign() * 3e4
    norm = Norm(torch.full((33,), 8.0, dtype=torch.float16, device=DEVICE), 1e-6)
    weight = random(18, 33, seed=15, dtype=torch.float16) / 6
    kernels = TritonKernels(DEVICE)
    y = kernels.gated(weight, norm=norm)(x) if gated else kernels.linear(weight, norm=norm)(x)
    wanted = (x.double().sign() * 8) @ weight.double().t()
    if gated:
        wanted = F.silu(wanted[:, :9]) * wanted[:, 9:]
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), wanted, rtol=2e-3, atol=0.1)

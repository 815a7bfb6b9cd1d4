"""Native products with compressed weights against exact integers, on every instruction set that this processor has.

Memory that is to be written holds something else before, and so does memory around it and around what is read.
"""

from random import Random

import pytest
import torch
from torch import Tensor

from collectives.loopback import loopback
from qtp.kernels.interface import Norm
from qtp.kernels.native_kernels import NativeKernels
from qtp.kernels.native_quantized import Handle
from qtp.kernels.torch_kernels import TorchKernels
from qtp.weights import codec
from qtp.weights.quantized import W8A8, W8A8SC

INTEGER = 2


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def matrix(generator: torch.Generator, n: int, k: int, share: float) -> Tensor:
    weight = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    picked = torch.rand(n, k, generator=generator) < share
    weight[picked] = numbers(generator, int(picked.sum()))
    return weight


def compressed(weight: Tensor) -> W8A8SC:
    return plain(codec.compress(weight))


def plain(stream: codec.Compressed) -> W8A8SC:
    """With nothing before and after the product."""
    n = int(stream[2][1])
    return W8A8SC(*stream, 1.0, 0.0, torch.zeros(n, dtype=torch.int32), torch.ones(n))


def apart(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """Numbers of int8 in float32, whose rows lie apart, with others between them and around."""
    return numbers(generator, rows + 2, columns + 7).float()[1:-1, 3 : 3 + columns]


def exact(weight: Tensor, x: Tensor) -> Tensor:
    return (x.double() @ weight.double().T).to(torch.int32)


def check(weight: Tensor, x: Tensor) -> None:
    """The native product, into memory that holds something else; and nothing is written around it."""
    held, (tokens, rows) = compressed(weight), (x.shape[0], weight.shape[0])
    around = torch.full((tokens + 2, rows + 9), 77_777)
    out = around.to(torch.int32)
    inside = out[1:-1, 4 : 4 + rows]
    Handle(held).run(x, inside, INTEGER)
    assert torch.equal(inside, exact(weight, x)), (tuple(weight.shape), tokens)
    inside.fill_(77_777)
    assert (out == 77_777).all()


def test_odd_shapes(isa: str, threads: int) -> None:
    generator, random = torch.Generator().manual_seed(1), Random(1)
    for _ in range(60):
        rows, columns = random.randint(0, 150), random.choice([random.randint(0, 700), 128 * random.randint(0, 5)])
        share = random.choice([0.0, 0.011, 0.011, 0.1, 0.2, 1.0])
        check(matrix(generator, rows, columns, share), apart(generator, random.choice([1, 1, 2, 3, 8, 9, 23]), columns))


@pytest.mark.parametrize("columns", [70, 128, 333, 384])
def test_every_number_of_tokens(isa: str, columns: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = matrix(generator, 53, columns, 0.03)
    weight[16:32] = numbers(generator, 16, columns)
    for tokens in (0, *range(1, 41), 200):
        check(weight, apart(generator, tokens, columns))


def test_more_tokens_than_are_laid_out_at_once(isa: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = matrix(generator, 20, 200, 0.05)
    for tokens in (256, 257, 700):
        check(weight, apart(generator, tokens, 200))
    weight = matrix(generator, 18, 30_001, 0.01)
    for tokens in (8, 9, 17):
        check(weight, apart(generator, tokens, 30_001))


@pytest.mark.parametrize("value", [-128, -8, -9, 7, 8, 127])
def test_extremes(isa: str, value: int) -> None:
    """The largest sums, of all signs: int16 would overflow first."""
    for columns in (127, 256, 1024, 5000):
        weight = torch.full((18, columns), value, dtype=torch.int8)
        for x in (-128, 127, 0):
            check(weight, torch.full((5, columns), float(x)))
            check(weight, torch.full((1, columns), float(x)))
        sparse = torch.full((18, columns), 7 if value > 0 else -8, dtype=torch.int8)
        sparse[:, ::9] = value
        check(sparse, torch.full((3, columns), -128.0))
        check(sparse, torch.full((1, columns), 127.0))


def test_columns_of_four_bytes(isa: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for columns in (65_536, 65_537, 80_000):
        weight = matrix(generator, 19, columns, 0.011)
        weight[:, -2:] = torch.tensor([-128, 127], dtype=torch.int8)
        for tokens in (1, 5):
            check(weight, apart(generator, tokens, columns))


def test_outliers_at_the_edges(isa: str) -> None:
    """The first and the last column of a row, of a group and of its halves; rows with none, one and as many as fit."""
    generator = torch.Generator().manual_seed(6)
    for columns in (63, 128, 192, 257, 400):
        weight = torch.zeros(33, columns, dtype=torch.int8)
        for row, column in enumerate((0, 1, 62, 63, 64, 65, 127, 128, 191, 192, 255, 256, columns - 2, columns - 1)):
            weight[2 * row, min(column, columns - 1)] = 100 - 13 * row
        weight[32, : columns // 8] = 50
        for tokens in (1, 2, 12):
            check(weight, apart(generator, tokens, columns))


def test_the_same_bits_as_what_is_not_compressed(isa: str, threads: int) -> None:
    """In every form and dtype, with a norm before or none, of x that is rounded and cut off."""
    generator, random = torch.Generator().manual_seed(7), Random(7)
    for i, dtype in enumerate(24 * [torch.float32, torch.bfloat16, torch.float16]):
        tokens, rows = random.choice([1, 1, 2, 5, 8, 9, 40, 300]), 2 * random.randint(0, 90)
        columns = random.choice([random.randint(1, 700), 128 * random.randint(1, 5)])
        weight = matrix(generator, rows, columns, random.choice([0.0, 0.011, 0.3]))
        quant_bias = torch.randint(-(10**6), 10**6, (rows,), generator=generator, dtype=torch.int32)
        scale = 1e-5 * (0.1 + torch.rand(rows, generator=generator))
        how = (random.uniform(0.01, 0.1), float(random.randint(-120, 120)), quant_bias, scale)
        sparse, whole = W8A8SC(*codec.compress(weight), *how), W8A8(weight, *how)
        x = 2 * torch.randn(tokens + 2, columns + 7, generator=generator)
        x[random.randrange(tokens + 2), random.randrange(columns)] = 1e4
        x = x.to(dtype)[1:-1, 3 : 3 + columns]
        weights, bias = torch.randn(2, columns, generator=generator).to(dtype)
        norm = [None, Norm(weights, 1e-6), Norm(weights, 1e-6, anti=Norm(weights, 1e-5, bias))][i // 3 % 3]
        for kernels in (NativeKernels(), TorchKernels()):
            if isinstance(kernels, TorchKernels):
                x, norm = x[:20], None
            assert torch.equal(kernels.linear(sparse, norm=norm)(x), kernels.linear(whole, norm=norm)(x))
            assert torch.equal(kernels.gated(sparse, norm=norm)(x), kernels.gated(whole, norm=norm)(x))
            assert torch.equal(kernels.head(sparse).logits(x), kernels.head(whole).logits(x))
            two = (kernels.linear(part, across=loopback(1)[0])(x) for part in (sparse, whole))
            got, expected = ((each.total, each.scaled(each.total)) for each in two)
            assert got[0].dtype == torch.int32
            assert got[1].dtype == dtype
            assert all(map(torch.equal, got, expected))
        assert torch.equal(NativeKernels().linear(sparse)(x), TorchKernels().linear(sparse)(x))


def test_a_part_of_the_rows_computes_the_same(isa: str) -> None:
    """What `codec.cut` gives, and `codec.joined`."""
    generator = torch.Generator().manual_seed(8)
    weight, x = matrix(generator, 70, 222, 0.011), numbers(generator, 4, 222).float()
    stream = codec.compress(weight)
    whole = exact(weight, x).float()
    for start, stop in ((0, 32), (16, 70), (64, 70)):
        part = plain(codec.cut(*stream, start, stop))
        assert torch.equal(NativeKernels().linear(part)(x), whole[:, start:stop])
    (joined,) = codec.joined([codec.compress(weight[:32]), codec.compress(weight[32:])])
    assert torch.equal(NativeKernels().linear(plain(joined))(x), whole)

"""Native kernels against float64, on every instruction set that this processor has.

Shapes, strides and lengths are random and mostly odd; memory that is to be written holds NaN before, and so does memory around
what may be read.
"""

import ctypes
from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch
from torch import Tensor

from collectives.errors import CollectiveError
from collectives.solo import Solo
from collectives.tree import tree_sum
from qtp.kernels.interface import Expert, Joins, Norm
from qtp.kernels.native_kernels import NativeKernels
from qtp.kernels.torch_kernels import TorchKernels, top

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def strided(generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """A matrix whose rows lie apart, with NaN between them and around."""
    apart = torch.full((rows + 2, columns + 7), float("nan"), dtype=dtype)
    inside = apart[1:-1, 3 : 3 + columns]
    inside.copy_(scale * torch.randn(rows, columns, generator=generator))
    return inside


def cases(seed: int, count: int) -> Iterator[tuple[Random, torch.Generator, torch.dtype]]:
    for i in range(count):
        yield Random(seed * 1000 + i), torch.Generator().manual_seed(seed * 1000 + i), DTYPES[i % 3]


def assert_close(got: Tensor, exact: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """size: the sum of the magnitudes of what was added up; each result is rounded once, and sums err in float32."""
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + 2e-6 * size + 1e-7).all()


def test_linear(isa: str, threads: int) -> None:
    for random, generator, dtype in cases(1, 60):
        tokens, rows, columns = (
            random.choice([1, 2, 3, 4, 5, 6, 7, 9, 16, 17, 33, 130]),
            random.randint(1, 150),
            random.randint(1, 300),
        )
        weight, x = strided(generator, rows, columns, dtype), strided(generator, tokens, columns, dtype)
        bias = torch.randn(rows, generator=generator).to(dtype) if random.random() < 0.7 else None
        exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        size = x.double().abs() @ weight.double().abs().T
        assert_close(NativeKernels().linear(weight, bias)(x), exact, size, dtype)


def test_linear_over_more_tokens_than_are_laid_out_at_once(isa: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for dtype in DTYPES:
        weight, x = strided(generator, 37, 70, dtype), strided(generator, 700, 70, dtype)
        assert_close(
            NativeKernels(deterministic=True).linear(weight)(x),
            x.double() @ weight.double().T,
            x.double().abs() @ weight.double().abs().T,
            dtype,
        )


def test_many_rows_with_few_tokens(isa: str, threads: int) -> None:
    """More rows than are taken together: the bits that they have with many tokens, whole and by leaves."""
    for random, generator, dtype in cases(13, 12):
        rows, columns = random.choice([191, 192, 193, 400, 577]), random.randint(1, 90)
        weight, x = strided(generator, rows, columns, dtype), strided(generator, 19, columns, dtype)
        kernels, bias = NativeKernels(deterministic=True), torch.randn(rows, generator=generator).to(dtype)
        exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        linear, leaves = kernels.linear(weight, bias), kernels.linear(weight, cuts=(0, columns // 3, columns))
        assert_close(linear(x), exact + bias.double(), size + bias.double().abs(), dtype)
        assert_close(leaves(x), exact, size, torch.float32)
        for start, stop in ((0, 1), (3, 5), (2, 5), (5, 9)):
            assert torch.equal(linear(x[start:stop]), linear(x)[start:stop]), (dtype, rows, columns, start, stop)
            assert torch.equal(leaves(x[start:stop]), leaves(x)[start:stop]), (dtype, rows, columns, start, stop)


def test_long_rows(isa: str) -> None:
    """Rows that are taken in several pieces, in one leaf and in two."""
    for random, generator, dtype in cases(12, 12):
        rows, columns = random.randint(1, 40), random.choice([1024, 1025, 2300, 3333])
        weight, x = strided(generator, rows, columns, dtype), strided(generator, 23, columns, dtype)
        exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        kernels = NativeKernels(deterministic=True)
        assert_close(kernels.linear(weight)(x), exact, size, dtype)
        leaves = kernels.linear(weight, cuts=(0, columns // 3, columns))
        whole = leaves(x)
        assert_close(whole, exact, size, torch.float32)
        for start, stop in ((0, 1), (3, 5), (2, 7), (5, 18)):
            assert torch.equal(leaves(x[start:stop]), whole[start:stop]), (dtype, rows, columns, start, stop)
            assert torch.equal(kernels.linear(weight)(x[start:stop]), kernels.linear(weight)(x)[start:stop])


@pytest.mark.parametrize("deterministic", [False, True])
def test_many_tokens(deterministic: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    kernels = NativeKernels(deterministic=deterministic)
    for dtype in DTYPES:
        weight, x, bias = strided(generator, 46, 96, dtype, 0.2), strided(generator, 1100, 96, dtype), torch.randn(46).to(dtype)
        exact = x.double() @ weight.double().T
        size = x.double().abs() @ weight.double().abs().T + 5
        assert_close(kernels.linear(weight)(x), exact, size, dtype)
        assert_close(kernels.linear(weight, bias)(x), exact + bias.double(), size, dtype)
        gate, up = exact.chunk(2, dim=1)
        got, exact = kernels.gated(weight)(x), torch.nn.functional.silu(gate) * up
        assert (got.double() - exact).abs().max() <= 4 * ROUNDING[dtype] * exact.abs().max() + 1e-5


def test_a_product_does_not_depend_on_the_other_tokens(isa: str, threads: int) -> None:
    for random, generator, dtype in cases(2, 30):
        rows, columns = random.randint(1, 100), random.randint(1, 300)
        weight, x = strided(generator, rows, columns, dtype), strided(generator, 120, columns, dtype)
        linear = NativeKernels(deterministic=True).linear(weight)
        whole = linear(x)
        for start, stop in ((0, 1), (7, 9), (20, 23), (1, 18), (40, 75), (119, 120)):
            assert torch.equal(linear(x[start:stop]), whole[start:stop]), (dtype, rows, columns, start, stop)


def test_gated(isa: str, threads: int) -> None:
    for random, generator, dtype in cases(3, 30):
        tokens, width, columns = random.choice([1, 2, 5, 16, 40]), random.randint(1, 90), random.randint(1, 200)
        weight, x = strided(generator, 2 * width, columns, dtype, 0.2), strided(generator, tokens, columns, dtype)
        gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
        size = (x.double().abs() @ weight.double().abs().T).view(tokens, 2, width)
        exact = torch.nn.functional.silu(gate) * up
        assert_close(NativeKernels().gated(weight)(x), exact, (1 + size[:, 0]) * (1 + size[:, 1]), dtype)


class TwoAlike(Solo):
    """Two ranks that always have the same."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.size = 2

    def sum_at(self, dtype: torch.dtype) -> tuple[Callable[[int, int, int], None], int]:
        def double(address: int, count: int, code: int) -> None:
            assert code == 7
            size = count * dtype.itemsize
            memory = (ctypes.c_byte * size).from_address(address)
            torch.frombuffer(memory, dtype=dtype).mul_(2)

        return double, 7


def test_two_layers_in_one_call(isa: str, threads: int) -> None:
    """x + reduce(down(gated(norm(x)))): the bits of one op after the other. What is added over leaves is reduced in float32."""
    for random, generator, dtype in cases(14, 24):
        width, inner, tokens = random.randint(1, 70), random.randint(1, 90), random.choice([1, 2, 3, 5, 9, 31])
        norm = Norm(torch.randn(width, generator=generator).to(dtype), 1e-6)
        gated = NativeKernels().gated(strided(generator, 2 * inner, width, dtype, 0.2), norm=norm)
        cuts = random.choice([None, (0, inner), (0, inner // 3, inner)])
        down = NativeKernels().linear(strided(generator, width, inner, dtype), cuts=cuts)
        assert isinstance(gated, Joins)
        x = torch.randn(tokens, width, generator=generator).to(dtype)
        for comm, ranks in ((Solo(torch.device("cpu")), 1), (TwoAlike(), 2)):
            whole = gated.joined(down, comm)
            assert whole is not None
            deferred, residual = whole(x, None), x.clone()
            assert deferred is not None
            assert deferred.add_to(residual) is residual
            due = x + (ranks * down(gated(x))).to(dtype)
            assert torch.equal(residual, due), (dtype, width, inner, tokens, ranks, cuts)
            assert whole(torch.zeros(65, width, dtype=dtype), None) is None


def test_a_sum_that_fails_leaves_the_residual_stream_as_it_was() -> None:
    generator = torch.Generator().manual_seed(15)
    first, second = (NativeKernels().linear(strided(generator, 8, 8, torch.float32)) for _ in range(2))

    class Broken(TwoAlike):
        def sum_at(self, dtype: torch.dtype) -> tuple[Callable[[int, int, int], None], int]:
            def fail(address: int, count: int, code: int) -> None:
                raise CollectiveError("a peer is gone")

            return fail, 0

    assert isinstance(first, Joins)
    whole = first.joined(second, Broken())
    x = torch.randn(2, 8, generator=generator)
    kept = x.clone()
    assert whole is not None
    deferred = whole(x, None)
    assert deferred is not None
    with pytest.raises(CollectiveError, match="a peer is gone"):
        deferred.add_to(x)
    assert torch.equal(x, kept)


def test_what_does_not_go_in_one_call() -> None:
    generator, solo = torch.Generator().manual_seed(16), Solo(torch.device("cpu"))
    weight = strided(generator, 8, 8, torch.float32)
    kernels = NativeKernels()
    linear, leaves = kernels.linear(weight), kernels.linear(weight, cuts=(0, 3, 8))
    assert isinstance(linear, Joins)
    assert isinstance(leaves, Joins)
    assert leaves.joined(linear, solo) is None
    assert linear.joined(leaves, solo) is not None
    assert linear.joined(kernels.linear(weight.bfloat16()), solo) is None
    assert linear.joined(lambda x: x, solo) is None

    more = TwoAlike()
    assert linear.joined(leaves, more) is not None
    more.size = 3  # whose float32 are added along a tree
    assert linear.joined(leaves, more) is None
    assert linear.joined(linear, more) is not None

    solo.size = 2  # and no `sum_at`
    assert linear.joined(linear, solo) is None


def test_silu_far_from_zero(isa: str) -> None:
    """Gates from -200 to 200, in float32."""
    gates = torch.linspace(-200, 200, 801)
    weight = torch.stack((torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])))
    got = NativeKernels().gated(weight)(torch.stack((gates, torch.ones(801)), dim=1))[:, 0]
    exact = torch.nn.functional.silu(gates.double())
    assert ((got.double() - exact).abs() <= 4e-7 * exact.abs() + 1e-35).all()


def test_rms_norm(isa: str, threads: int) -> None:
    for random, generator, dtype in cases(4, 30):
        rows, width = random.choice([1, 3, 70]), random.randint(1, 900)
        x = (3 * torch.randn(rows, width, generator=generator)).to(dtype)
        weight = (1 + 0.3 * torch.randn(width, generator=generator)).to(dtype)
        exact = TorchKernels().rms_norm(Norm(weight.double(), 1e-6))(x.double())
        got = NativeKernels().rms_norm(Norm(weight, 1e-6))(x)
        assert ((got.double() - exact).abs() <= (2.1 * ROUNDING[dtype] + 1e-6) * exact.abs()).all()


def test_a_norm_inside_is_the_norm_before(isa: str, threads: int) -> None:
    """Bit for bit, whoever multiplies."""
    for random, generator, dtype in cases(5, 30):
        tokens, rows, columns = random.choice([1, 3, 17, 200]), 2 * random.randint(1, 40), random.choice([7, 64, 133])
        weight, x = strided(generator, rows, columns, dtype, 0.2), torch.randn(tokens, columns, generator=generator).to(dtype)
        norm = Norm((1 + 0.3 * torch.randn(columns, generator=generator)).to(dtype), 1e-3)
        bias = torch.randn(rows, generator=generator).to(dtype)
        kernels = NativeKernels(deterministic=random.random() < 0.5)
        normed = kernels.rms_norm(norm)(x)
        assert torch.equal(kernels.linear(weight, bias, norm=norm)(x), kernels.linear(weight, bias)(normed))
        assert torch.equal(kernels.gated(weight, norm=norm)(x), kernels.gated(weight)(normed))


def test_best_is_the_best_of_the_allowed(isa: str, threads: int) -> None:
    for random, generator, dtype in cases(6, 40):
        tokens, rows, columns = random.choice([1, 2, 7, 40]), random.randint(2, 400), random.randint(1, 80)
        weight, x = strided(generator, rows, columns, dtype), strided(generator, tokens, columns, dtype)
        allowed = random.randint(1, rows)
        count = random.randint(1, min(allowed, 64))
        values, picked = NativeKernels().head(weight).best(x, count, allowed)
        logits = NativeKernels().linear(weight.float())(x.float())[:, :allowed] if dtype == torch.float32 else None
        exact = (x.double() @ weight.double().T)[:, :allowed]
        size = (x.double().abs() @ weight.double().abs().T)[:, :allowed]
        assert_close(values, exact.gather(1, picked), size.gather(1, picked), torch.float32)
        assert (values[:, :-1] >= values[:, 1:]).all()
        left_out = exact.scatter(1, picked, float("-inf")).max(dim=1).values
        assert (values[:, -1] >= left_out - 4e-6 * size.max() - 1e-6).all()
        if logits is not None:
            expected = top(logits, count)
            assert torch.equal(values, expected[0])
            assert torch.equal(picked, expected[1])


def test_of_equals_the_lower_column_is_taken(isa: str, threads: int) -> None:
    random = Random(3)
    for count in (1, 2, 5, 30):
        rows = torch.tensor([[float(random.randint(0, 3))] for _ in range(333)])
        values, columns = NativeKernels().head(rows).best(torch.ones(2, 1), count, 300)
        expected = top((rows[:300, 0]).expand(2, -1), count)
        assert torch.equal(values, expected[0])
        assert torch.equal(columns, expected[1])


def test_best_of_what_is_no_number_names_a_column() -> None:
    weight = torch.full((70, 3), float("nan"))
    _, columns = NativeKernels().head(weight).best(torch.ones(1, 3), 2, 70)
    assert ((columns >= 0) & (columns < 70)).all()


def test_experts(isa: str, threads: int) -> None:
    for random, generator, dtype in cases(7, 12):
        tokens, hidden, width = random.choice([1, 3, 33]), random.randint(3, 90), random.randint(3, 60)
        total, choices = 9, random.randint(1, 4)
        held = {e: _expert(generator, hidden, width, dtype) for e in sorted(random.sample(range(total), 5))}
        x = strided(generator, tokens, hidden, dtype)
        weights = torch.rand(tokens, choices, generator=generator).to(dtype)
        chosen = torch.stack([torch.randperm(total, generator=generator)[:choices] for _ in range(tokens)])
        partial = torch.randn(tokens, hidden, generator=generator).to(dtype)
        wide = {e: Expert(expert.gate_up.double(), expert.down.double()) for e, expert in held.items()}
        exact = TorchKernels().experts(wide)(x.double(), weights.double(), chosen, partial.double())
        got = NativeKernels().experts(held)(x, weights, chosen, partial.clone())
        assert (got.double() - exact).abs().max() <= (3 * ROUNDING[dtype] + 1e-5) * exact.abs().max()


def test_experts_of_which_none_is_here_add_nothing() -> None:
    held = {3: _expert(torch.Generator().manual_seed(1), 8, 4, torch.float32)}
    partial = torch.randn(2, 8)
    chosen = torch.tensor([[0, 1], [2, 8]])
    for experts in ({}, held):
        got = NativeKernels().experts(experts)(torch.randn(2, 8), torch.ones(2, 2), chosen, partial.clone())
        assert torch.equal(got, partial)


def _expert(generator: torch.Generator, hidden: int, width: int, dtype: torch.dtype) -> Expert:
    return Expert(strided(generator, 2 * width, hidden, dtype, 0.3), strided(generator, hidden, width, dtype, 0.3))


def test_choice_of_experts(isa: str, threads: int) -> None:
    for random, generator, dtype in cases(8, 30):
        tokens, experts = random.choice([1, 5, 600]), random.randint(1, 70)
        choices, norm = random.randint(1, experts), random.random() < 0.5
        logits = (4 * torch.randn(tokens, experts, generator=generator)).to(dtype)
        weights, chosen = NativeKernels().choose(choices, norm)(logits)
        exact, _ = TorchKernels().choose(choices, norm)(logits.double())
        assert ((weights.double() - exact).abs() <= (ROUNDING[dtype] + 1e-6) * exact + 1e-7).all()
        assert torch.equal(chosen, top(logits.float(), choices)[1])
        assert weights.dtype == dtype


def test_scale(isa: str, threads: int) -> None:
    for random, generator, dtype in cases(9, 20):
        tokens, width = random.choice([1, 5, 300]), random.randint(1, 200)
        gate = (5 * torch.randn(tokens, 1, generator=generator)).to(dtype)
        leaves = torch.randn(3, tokens, width, generator=generator)
        for x in (leaves[0].to(dtype), leaves):
            exact = torch.sigmoid(gate.double()) * x.double()
            got = NativeKernels().scale(gate, x.clone())
            assert got.dtype == x.dtype
            assert ((got.double() - exact).abs() <= (ROUNDING[x.dtype] + 1e-6) * exact.abs() + 1e-7).all()


def test_leaves_are_added_along_a_tree(isa: str, threads: int) -> None:
    """Bit for bit as each leaf by itself, added by tree_sum; a world of n holds 8 / n leaves."""
    for random, generator, dtype in cases(10, 20):
        tokens, rows, columns = random.choice([1, 3, 20, 40]), random.randint(1, 70), random.randint(1, 300)
        weight, x = strided(generator, rows, columns, dtype), strided(generator, tokens, columns, dtype)
        count = random.choice([1, 2, 4, 8])
        cuts = (0, *sorted(random.randint(0, columns) for _ in range(count - 1)), columns)
        leaves = NativeKernels().linear_leaves(weight, cuts)(x)
        assert leaves.shape == (count, tokens, rows)
        for leaf, a, b in zip(leaves, cuts, cuts[1:], strict=False):
            exact, size = (
                x[:, a:b].double() @ weight[:, a:b].double().T,
                x[:, a:b].double().abs() @ weight[:, a:b].double().abs().T,
            )
            assert_close(leaf, exact, size, torch.float32)
        assert torch.equal(NativeKernels().linear(weight, cuts=cuts)(x), tree_sum(leaves.unbind()))


def test_experts_by_leaves(isa: str) -> None:
    generator = torch.Generator().manual_seed(4)
    held = {e: _expert(generator, 40, 24, torch.bfloat16) for e in range(2, 7)}
    x, weights = strided(generator, 9, 40, torch.bfloat16), torch.rand(9, 3, generator=generator).to(torch.bfloat16)
    chosen = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(9)])
    start = torch.randn(4, 9, 40, generator=generator)
    leaves = (range(2), range(2, 4), range(4, 4), range(4, 8))
    each = [
        NativeKernels().experts({e: held[e] for e in leaf if e in held})(x, weights, chosen, part.clone())
        for leaf, part in zip(leaves, start, strict=True)
    ]
    got = NativeKernels().experts(held, leaves)(x, weights, chosen, start.clone())
    assert torch.equal(got, tree_sum(each))
    exact = TorchKernels().experts({e: Expert(v.gate_up.double(), v.down.double()) for e, v in held.items()}, leaves)(
        x.double(), weights.double(), chosen, start.double()
    )
    assert (got - exact).abs().max() < 0.02 * exact.abs().max()

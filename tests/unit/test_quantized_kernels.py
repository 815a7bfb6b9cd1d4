"""Kernels of quantized weights: torch's against the formulas in float64, native ones against torch's on every instruction set
that this processor has. Integers are equal exactly.

Shapes and strides are random and mostly odd; what lies around the weights and inputs, and what is to be written, is poisoned.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.loopback import loopback
from collectives.tree import tree_sum
from qtp.kernels.interface import Expert, Norm
from qtp.kernels.native_kernels import NativeKernels
from qtp.kernels.native_quantized import Handle
from qtp.kernels.torch_kernels import TorchKernels, top
from qtp.kernels.torch_quantized import int_product
from qtp.weights.quantized import W8A8, W8A16, Float, Packed, Quantized, Unscaled, W8A8Dynamic

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
TOKENS = (1, 2, 3, 4, 5, 7, 8, 11, 16, 17, 32, 40, 300)


class Case:
    """A source of weights and inputs, of one dtype."""

    def __init__(self, seed: int) -> None:
        self.random, self.generator = Random(seed), torch.Generator().manual_seed(seed)
        self.dtype = DTYPES[seed % 3]

    def shape(self, columns: Sequence[int] = ()) -> tuple[int, int, int]:
        """Tokens, outputs, columns."""
        random = self.random
        rows = random.choice((random.randint(1, 150), random.randint(250, 600)))  # more than are taken together, too
        return random.choice(TOKENS), rows, random.choice(columns) if columns else random.randint(1, 300)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.generator)

    def x(self, tokens: int, columns: int, scale: float = 1.0) -> Tensor:
        """Rows that lie apart, with NaN between them; some elements are far beyond what 8 bits hold."""
        apart = torch.full((tokens + 2, columns + 7), float("nan"), dtype=self.dtype)
        x = apart[1:-1, 3 : 3 + columns]
        x.copy_(self.normal(tokens, columns, scale=scale))
        return x.masked_fill_(torch.rand(tokens, columns, generator=self.generator) < 0.01, 60.0 * scale)

    def int8(self, rows: int, columns: int) -> Tensor:
        apart = torch.full((rows + 2, columns + 37), -128, dtype=torch.int8)
        w = apart[1:-1, 5 : 5 + columns]
        values = torch.randint(-128, 128, (rows, columns), generator=self.generator, dtype=torch.int8)
        w.copy_(values if self.random.random() < 0.8 else torch.full_like(values, self.random.choice([-128, 127])))
        return w if self.random.random() < 0.7 else w.contiguous()

    def positive(self, *shape: int) -> Tensor:
        return 0.01 * (0.1 + torch.rand(shape, generator=self.generator))

    def bias(self, rows: int) -> Tensor | None:
        return self.normal(rows).to(self.dtype) if self.random.random() < 0.6 else None

    def w8a8(self, rows: int, columns: int) -> W8A8:
        quant_bias = torch.randint(-(10**6), 10**6, (rows,), generator=self.generator, dtype=torch.int32)
        offset = float(self.random.randint(-120, 120))
        return W8A8(self.int8(rows, columns), self.random.uniform(0.01, 0.1), offset, quant_bias, self.positive(rows))

    def dynamic(self, rows: int, columns: int) -> W8A8Dynamic:
        return W8A8Dynamic(self.int8(rows, columns), self.positive(rows), self.bias(rows))

    def w8a16(self, rows: int, columns: int) -> W8A16:
        group = self.random.choice([0, 0, 4, 32, 64])
        phase = self.random.randrange(group) if group and self.random.random() < 0.5 else 0
        groups = -(-(phase + columns) // group) if group else 1
        symmetric = self.random.random() < 0.3
        offset = torch.zeros(rows, groups) if symmetric else self.normal(rows, groups, scale=40.0).round()
        return W8A16(self.int8(rows, columns), self.positive(rows, groups), offset, self.bias(rows), group, phase)

    def any(self, rows: int, columns: int) -> Quantized:
        return self.random.choice([self.w8a8, self.dynamic, self.w8a16])(rows, columns)


def cases(seed: int, count: int) -> Iterator[Case]:
    return (Case(seed * 1000 + i) for i in range(count))


def exact_input(weight: W8A8 | W8A8Dynamic, x: Tensor) -> tuple[Tensor, Tensor]:
    """x_q, and the scale of each token or one for all; divided in float32, as it is defined, all else in Python's words."""
    scale = x.float().abs().amax(dim=1, keepdim=True) / torch.tensor(127.0) if isinstance(weight, W8A8Dynamic) else None
    if scale is None:
        scale = torch.tensor(weight.input_scale, dtype=torch.float32).view(1, 1)
    scale = torch.where(scale == 0, 1.0, scale)
    offset = weight.input_offset if isinstance(weight, W8A8) else 0.0
    return torch.round(x.float() / scale + offset).clamp(-128, 127).long(), scale.double()


def exact(weight: Quantized, x: Tensor) -> tuple[Tensor, Tensor]:
    """y in float64, and the sum of the magnitudes of what was added up."""
    if isinstance(weight, W8A16):
        columns = range(weight.shape[1])
        group = [(weight.phase + d) // weight.group if weight.group else 0 for d in columns]
        w = (weight.weight.double() - weight.offset.double()[:, group]) * weight.scale.double()[:, group]
        largest = (weight.weight.double().abs() + weight.offset.double().abs()[:, group]) * weight.scale.double()[:, group]
        y, size = x.double() @ w.T, x.double().abs() @ largest.T
    else:
        x_q, s_x = exact_input(weight, x)
        total = x_q @ weight.weight.long().T
        if isinstance(weight, W8A8):
            return (total + weight.quant_bias) * weight.deq_scale.double(), torch.zeros(())
        y = total * s_x * weight.weight_scale.double()
        size = torch.zeros(()) if weight.bias is None else y.abs()
    return y + (0.0 if weight.bias is None else weight.bias.double()), size


def assert_close(got: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """size: as of `exact`; float16 ends at 65504."""
    assert got.shape == expected.shape
    close = (got.double() - expected).abs() <= ROUNDING[dtype] * expected.abs() + 2e-6 * size + 1e-7
    beyond = (expected.abs() > 65000) & (got.double().abs() > 65000)
    assert (close | beyond if dtype == torch.float16 else close).all()


def test_an_integer_product_is_exact() -> None:
    for case in cases(1, 10):
        tokens, rows, columns = case.shape((1, 1000, 1024, 1025, 5000))
        x, w = case.int8(min(tokens, 20), columns), case.int8(rows, columns)
        assert torch.equal(int_product(x, w).long(), x.long() @ w.long().T)
    largest = torch.full((1, 130_000), -128, dtype=torch.int8)
    assert int_product(largest, largest).item() == 130_000 * 128 * 128


def test_torch_does_what_is_defined() -> None:
    for case in cases(2, 60):
        tokens, rows, columns = case.shape()
        x, weight = case.x(tokens, columns), case.any(rows, columns)
        assert_close(TorchKernels().linear(weight)(x), *exact(weight, x), case.dtype)
        assert_close(TorchKernels().head(weight).logits(x), *exact(weight, x), torch.float32)


KERNELS = {"torch": TorchKernels, "native": NativeKernels}
every_kind = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)


def columns_of(weight: Quantized, start: int, stop: int) -> Quantized:
    """What the rank of these columns holds."""
    w = weight.weight[:, start:stop]
    if isinstance(weight, W8A8):
        return replace(
            weight, weight=w, quant_bias=weight.quant_bias if start == 0 < stop else torch.zeros_like(weight.quant_bias)
        )
    if isinstance(weight, W8A8Dynamic):
        return replace(weight, weight=w, bias=None)
    if not weight.group:
        return replace(weight, weight=w, bias=None)
    first, last = (weight.phase + start) // weight.group, -(-(weight.phase + stop) // weight.group)
    held = [t[:, first:last].contiguous() for t in (weight.scale, weight.offset)]
    return W8A16(w, *held, None, weight.group, (weight.phase + start) % weight.group)


def run_ranks(size: int, rank: Callable[[Communicator], Tensor]) -> list[Tensor]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, loopback(size, timeout=30.0)))


def cut(case: Case, columns: int, parts: int) -> tuple[int, ...]:
    return (0, *sorted(case.random.randint(0, columns) for _ in range(parts - 1)), columns)


@every_kind
def test_integers_have_the_same_bits_at_every_world_size(kernels: Any) -> None:
    for case in cases(3, 20):
        tokens, rows, columns = case.shape()
        x, weight = case.x(tokens, columns), case.random.choice([case.w8a8, case.dynamic])(rows, columns)
        if isinstance(weight, W8A8Dynamic):
            weight = replace(weight, bias=None)
        whole = kernels().linear(weight)(x)
        assert_close(whole, *exact(weight, x), case.dtype)
        size = case.random.choice([1, 2, 3])
        cuts = cut(case, columns, size)

        def rank(comm: Communicator, weight: Quantized = weight, x: Tensor = x, cuts: tuple[int, ...] = cuts) -> Tensor:
            start, stop = cuts[comm.rank : comm.rank + 2]
            partial = kernels().linear(columns_of(weight, start, stop), cuts=(0, stop - start), across=comm)(x[:, start:stop])
            assert isinstance(partial, Unscaled)
            assert partial.total.dtype == torch.int32
            return partial.scaled(comm.all_reduce(partial.total))

        for got in run_ranks(size, rank):
            assert got.dtype == x.dtype
            assert torch.equal(got, whole)


@every_kind
def test_leaves(kernels: Any) -> None:
    """Those of two ranks, side by side, are those of one, bit for bit, and their sum is y."""
    for case in cases(4, 30):
        tokens, rows, columns = case.shape()
        x, weight = case.x(tokens, columns), case.any(rows, columns)
        weight = weight if isinstance(weight, W8A8) else replace(weight, bias=None)
        cuts = cut(case, columns, 4)
        leaves = kernels().linear_leaves(weight, cuts)(x)
        assert leaves.shape == (4, tokens, rows)
        assert leaves.dtype == torch.float32
        y, size = exact(weight, x)
        assert_close(leaves.double().sum(dim=0), y, size + leaves.double().abs().sum(dim=0), torch.float32)
        if not isinstance(weight, W8A16):
            unit = weight.deq_scale if isinstance(weight, W8A8) else exact_input(weight, x)[1].float() * weight.weight_scale
            assert torch.equal(leaves, (leaves / unit).round() * unit)
        assert torch.equal(kernels().linear(weight, cuts=cuts)(x), tree_sum(leaves.unbind()))

        def rank(comm: Communicator, weight: Quantized = weight, x: Tensor = x, cuts: tuple[int, ...] = cuts) -> Tensor:
            own = cuts[2 * comm.rank : 2 * comm.rank + 3]
            held = columns_of(weight, own[0], own[-1])
            return kernels().linear_leaves(held, tuple(c - own[0] for c in own), comm)(x[:, own[0] : own[-1]])

        if not isinstance(weight, W8A16) or kernels is NativeKernels:
            assert torch.equal(torch.cat(run_ranks(2, rank)), leaves)


@every_kind
def test_parts_that_differ(kernels: Any) -> None:
    """Each with its own norm: float parts keep the original one."""
    for case in cases(5, 20):
        tokens, _, columns = case.shape()
        parts = [case.any(case.random.randint(1, 40), columns) for _ in range(3)]
        parts[case.random.randrange(3)] = Float(case.normal(9, columns).to(case.dtype), case.normal(9).to(case.dtype))
        weights, biases = case.normal(2, columns).to(case.dtype), case.normal(columns).to(case.dtype)
        norm = Norm(weights[0], 1e-6, anti=Norm(weights[1], 1e-6, biases))
        x = case.x(tokens, columns).contiguous()
        got = kernels().linear(Packed(tuple(parts)), norm=norm)(x)
        plain = Norm(weights[0], 1e-6)
        expected = [
            kernels().linear(part.weight, part.bias, norm=plain)(x)
            if isinstance(part, Float)
            else kernels().linear(part)(kernels().rms_norm(norm.anti)(x))
            for part in parts
        ]
        assert torch.equal(got, torch.cat(expected, dim=1))


@every_kind
def test_norm_with_a_bias(kernels: Any) -> None:
    for case in cases(6, 20):
        tokens, _, columns = case.shape()
        x, weight, bias = case.x(tokens, columns).contiguous(), case.normal(columns), case.normal(columns)
        norm = Norm(weight.to(case.dtype), 1e-6, bias.to(case.dtype))
        got = kernels().rms_norm(norm)(x)
        plain = kernels().rms_norm(Norm(torch.ones_like(norm.weight), 1e-6))(x).double()
        assert_close(got, plain * norm.weight.double() + norm.bias.double(), plain.abs() * norm.weight.double().abs(), case.dtype)
        float_weight = case.normal(20, columns).to(case.dtype)
        assert torch.equal(kernels().linear(float_weight, norm=norm)(x), kernels().linear(float_weight)(got))


@every_kind
def test_gated(kernels: Any) -> None:
    for case in cases(7, 30):
        tokens, width, columns = case.shape()
        x = case.x(tokens, columns, 0.2)
        halves = [case.any(width, columns) for _ in range(2)]
        weight = Packed(tuple(halves)) if case.random.random() < 0.3 else case.any(2 * width, columns)
        both = kernels().linear(weight)(x)
        gate, up = both.double().chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
        got = kernels().gated(weight)(x)
        assert got.dtype == x.dtype
        close = (got.double() - expected).abs() <= 3 * ROUNDING[case.dtype] * expected.abs() + 1e-7 * (1 + up.abs())
        assert (close | (expected.abs() > 60000)).all()


def test_native_integers_are_those_of_torch(isa: str, threads: int) -> None:
    for case in cases(11, 60):
        tokens, rows, columns = case.shape()
        x, weight = case.x(tokens, columns), case.random.choice([case.w8a8, case.dynamic])(rows, columns)
        if isinstance(weight, W8A8Dynamic):
            weight = replace(weight, bias=None)
        assert torch.equal(NativeKernels().linear(weight)(x), TorchKernels().linear(weight)(x))
        assert torch.equal(NativeKernels().head(weight).logits(x), TorchKernels().head(weight).logits(x))
        got, expected = (k().linear(weight, across=loopback(1)[0])(x) for k in KERNELS.values())
        assert torch.equal(got.total, expected.total)
        assert torch.equal(got.scale.expand(tokens, rows), expected.scale.expand(tokens, rows))


def test_native_floats(isa: str, threads: int) -> None:
    for case in cases(12, 60):
        tokens, rows, columns = case.shape()
        x, weight = case.x(tokens, columns), case.random.choice([case.w8a16, case.dynamic])(rows, columns)
        assert_close(NativeKernels().linear(weight)(x), *exact(weight, x), case.dtype)
        assert_close(NativeKernels().head(weight).logits(x), *exact(weight, x), torch.float32)


def test_long_rows(isa: str) -> None:
    """Of several pieces; and what is added up does not depend on how many tokens there are."""
    for case in cases(13, 24):
        rows, columns = case.random.randint(1, 70), case.random.choice([1023, 1024, 1025, 2048, 2500, 4864])
        x, weight = case.x(300, columns), case.any(rows, columns)
        op = NativeKernels().linear(weight)
        whole = op(x)
        assert_close(whole, *exact(weight, x), case.dtype)
        for start, stop in ((0, 1), (7, 9), (20, 23), (1, 18), (40, 75), (299, 300)):
            assert torch.equal(op(x[start:stop]), whole[start:stop]), (case.dtype, weight, start, stop)


def test_the_largest_sums(isa: str) -> None:
    """Inputs that are cut off at both ends times weights at both ends; two products make 32768, and pairs of pairs more."""
    for dtype in DTYPES:
        for x_end, w_end in ((-1e4, -128), (1e4, -128), (-1e4, 127), (1e4, 127)):
            w = torch.full((35, 5001), w_end, dtype=torch.int8)
            x = torch.full((6, 5001), x_end).to(dtype)
            for tokens in (1, 2, 6):
                total = max(-128, min(127, x_end)) * w_end * 5001
                weight = W8A8(w, 0.5, 3.0, torch.arange(35, dtype=torch.int32), torch.ones(35))
                got = NativeKernels().linear(weight, across=loopback(1)[0])(x[:tokens]).total
                assert torch.equal(got, (total + torch.arange(35)).int().expand(tokens, -1))


def test_rounding_of_inputs(isa: str) -> None:
    """Half to even, after the offset, and cut off after that; each column by itself."""
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.5, -129.0, 300.0, -300.0, 0.49999997, -0.0, 1e30, -1e30])
    weight = torch.eye(len(x), dtype=torch.int8)
    for offset in (0.0, 1.0, -7.0, 120.0):
        w8a8 = W8A8(weight, 1.0, offset, torch.zeros(len(x), dtype=torch.int32), torch.ones(len(x)))
        expected = (x.double() + offset).float().round().clamp(-128, 127)
        for kernels in KERNELS.values():
            assert torch.equal(kernels().linear(w8a8)(x[None])[0], expected)


def test_nothing_else_is_written_or_read(isa: str, threads: int) -> None:
    """Outputs in memory that is poisoned before, and whose surroundings stay so."""
    for case in cases(14, 30):
        tokens, rows, columns = case.shape()
        x, weight = case.x(tokens, columns), case.any(rows, columns)
        handle = Handle(weight)
        for form, dtype in enumerate((case.dtype, torch.float32, torch.int32)[: 2 if isinstance(weight, W8A16) else 3]):
            around = torch.full((tokens + 2, rows + 40), 77, dtype=dtype)
            out = around[1:-1, 20 : 20 + rows]
            out.fill_(float("nan") if dtype.is_floating_point else 1 << 30)
            handle.run(x, out, form)
            assert out.double().isfinite().all() or case.dtype == torch.float16
            if form < 2:
                assert torch.equal(out, (NativeKernels().linear(weight) if form == 0 else NativeKernels().head(weight).logits)(x))
            out.fill_(77)
            assert (around == 77).all()


def test_a_norm_before(isa: str, threads: int) -> None:
    for case in cases(15, 40):
        tokens, rows, columns = case.shape()
        x, weight = case.x(tokens, columns), case.any(rows, columns)
        bias = case.normal(columns).to(case.dtype) if case.random.random() < 0.5 else None
        norm = Norm(case.normal(columns).to(case.dtype), 1e-6, bias)
        after = NativeKernels().rms_norm(norm)(x.contiguous())
        assert torch.equal(NativeKernels().linear(weight, norm=norm)(x), NativeKernels().linear(weight)(after))
        if rows % 2 == 0:
            assert torch.equal(NativeKernels().gated(weight, norm=norm)(x), NativeKernels().gated(weight)(after))


@every_kind
def test_the_best_of_a_head(kernels: Any) -> None:
    for case in cases(16, 20):
        tokens, rows, columns = case.shape()
        x, weight = case.x(tokens, columns), case.any(rows, columns)
        head = kernels().head(weight)
        allowed = case.random.randint(1, rows)
        count = case.random.randint(1, allowed)
        values, picked = head.best(x, count, allowed)
        expected = top(head.logits(x)[:, :allowed], count)
        assert torch.equal(values, expected[0])
        assert torch.equal(picked, expected[1])


@every_kind
def test_nothing_at_all(kernels: Any) -> None:
    case = Case(17)
    for tokens, rows, columns in ((0, 3, 4), (2, 0, 4), (3, 5, 0), (300, 3, 0)):
        for make in (case.w8a8, case.dynamic, case.w8a16):
            x, weight = torch.randn(tokens, columns, dtype=torch.float32).to(case.dtype), make(rows, columns)
            y, _ = exact(weight, x) if columns else (torch.zeros(tokens, rows).double(), None)
            if not columns and isinstance(weight, W8A8):
                y = (weight.quant_bias.double() * weight.deq_scale.double()).expand(tokens, -1)
            elif not columns and weight.bias is not None:
                y = weight.bias.double().expand(tokens, -1)
            assert_close(kernels().linear(weight)(x), y, torch.zeros(()), case.dtype)


def experts_of(case: Case, hidden: int, width: int) -> dict[int, Expert]:
    def part(rows: int, columns: int) -> Any:
        kind = case.random.random()
        if kind < 0.2:
            return case.normal(rows, columns, scale=0.3).to(case.dtype)
        weight = case.any(rows, columns)
        scale = {"deq_scale" if isinstance(weight, W8A8) else "scale" if isinstance(weight, W8A16) else "weight_scale": 0.02}
        return replace(weight, **{name: getattr(weight, name) * factor for name, factor in scale.items()})

    return {e: Expert(part(2 * width, hidden), part(hidden, width)) for e in sorted(case.random.sample(range(9), 5))}


def test_experts(isa: str) -> None:
    """Some in floats; by leaves too, whose sums do not depend on how many there are on a rank."""
    for case in cases(18, 12):
        tokens, hidden, width = case.random.choice([1, 3, 33]), case.random.randint(3, 90), case.random.randint(3, 60)
        held, choices = experts_of(case, hidden, width), case.random.randint(1, 4)
        x, weights = case.x(tokens, hidden, 0.2), torch.rand(tokens, choices, generator=case.generator).to(case.dtype)
        chosen = torch.stack([torch.randperm(9, generator=case.generator)[:choices] for _ in range(tokens)])
        partial = case.normal(tokens, hidden).to(case.dtype)
        got = NativeKernels().experts(held)(x, weights, chosen, partial.clone())
        expected = TorchKernels().experts(held)(x, weights, chosen, partial.clone())
        assert got.dtype == case.dtype
        assert (got.double() - expected.double()).abs().max() <= (8 * ROUNDING[case.dtype] + 1e-5) * expected.double().abs().max()
        leaves, parts = (range(3), range(3, 5), range(5, 5), range(5, 9)), case.normal(4, tokens, hidden)
        whole = NativeKernels().experts(held, leaves)(x, weights, chosen, parts.clone())
        each = [
            NativeKernels().experts({e: held[e] for e in leaf if e in held})(x, weights, chosen, part.clone())
            for leaf, part in zip(leaves, parts, strict=True)
        ]
        assert (whole - tree_sum(each)).abs().max() <= 1e-5 * whole.abs().max()
        halves = [NativeKernels().experts(held, leaves[i : i + 2])(x, weights, chosen, parts[i : i + 2].clone()) for i in (0, 2)]
        assert torch.equal(whole, tree_sum(halves))

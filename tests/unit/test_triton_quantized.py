"""Triton's kernels of quantized weights: against the formulas in float64, integers against torch's bit for bit.

Shapes and strides are random and mostly odd; what lies around weights, inputs and outputs is poisoned. On a CUDA device, larger
shapes join them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_helper import DEVICE

from collectives.communicator import Communicator
from collectives.loopback import loopback
from collectives.tree import tree_sum
from qtp.kernels import triton_quantized
from qtp.kernels.interface import Deferred
from qtp.kernels.torch_kernels import TorchKernels, top
from qtp.kernels.torch_quantized import quantize, to_fp8
from qtp.kernels.triton import quantized
from qtp.kernels.triton.quantized import FP8_LEVELS, GATED, INT8_LEVELS, INTEGER, RUN
from qtp.weights.quantized import W8A8, W8A8FP8, W8A16, Packed, Quantized, Unscaled, W8A8Dynamic

CUDA = DEVICE.type == "cuda"
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
TOKENS = (1, 1, 2, 3, 7, 17)
KINDS = ("w8a8", "dynamic", "w8a16", "fp8")
TORCH = TorchKernels()

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter, in halves and exp


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the interpreter milliseconds."""
    if not CUDA:
        monkeypatch.setattr(quantized, "_one", lambda outputs, gated: (16, 32))


class Case:
    """A source of weights and inputs, of one dtype."""

    def __init__(self, seed: int) -> None:
        self.random, self.generator = Random(seed), torch.Generator().manual_seed(seed)
        self.dtype = DTYPES[seed % 3]

    def shape(self) -> tuple[int, int, int]:
        """Tokens, outputs, columns; without a device, small enough for the interpreter."""
        random = self.random
        if CUDA and random.random() < 0.5:
            return random.choice((1, 2, 16, 33, 64, 100, 400)), random.choice((896, 1000, 3584)), random.choice((896, 1111, 4864))
        return random.choice(TOKENS), random.choice((1, 8, 21, 40, 70)), random.choice((1, 40, 64, 100, 256, 391))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self.generator)).to(DEVICE)

    def x(self, tokens: int, columns: int, scale: float = 1.0) -> Tensor:
        """Rows that lie apart, with NaN between them; some elements are far beyond what 8 bits hold."""
        apart = torch.full((tokens + 2, columns + 7), float("nan"), dtype=self.dtype, device=DEVICE)
        x = apart[1:-1, 3 : 3 + columns] if self.random.random() < 0.5 else apart[1:-1, :columns]
        x.copy_(self.normal(tokens, columns, scale=scale))
        return x.masked_fill_((torch.rand(tokens, columns, generator=self.generator) < 0.01).to(DEVICE), 60.0 * scale)

    def int8(self, rows: int, columns: int) -> Tensor:
        values = torch.randint(-128, 128, (rows, columns), generator=self.generator, dtype=torch.int8)
        return self._apart(values, -128)

    def _apart(self, values: Tensor, poison: float) -> Tensor:
        rows, columns = values.shape
        apart = torch.full((rows + 2, columns + 37), poison).to(values.dtype).to(DEVICE)
        start = self.random.choice((0, 5))
        w = apart[1:-1, start : start + columns]
        w.copy_(values)
        return w if self.random.random() < 0.7 else w.contiguous()

    def positive(self, *shape: int) -> Tensor:
        return (0.01 * (0.1 + torch.rand(shape, generator=self.generator))).to(DEVICE)

    def bias(self, rows: int) -> Tensor | None:
        return self.normal(rows).to(self.dtype) if self.random.random() < 0.6 else None

    def w8a8(self, rows: int, columns: int) -> W8A8:
        quant_bias = torch.randint(-(10**6), 10**6, (rows,), generator=self.generator, dtype=torch.int32).to(DEVICE)
        offset = float(self.random.randint(-120, 120))
        return W8A8(self.int8(rows, columns), self.random.uniform(0.01, 0.1), offset, quant_bias, self.positive(rows))

    def dynamic(self, rows: int, columns: int) -> W8A8Dynamic:
        return W8A8Dynamic(self.int8(rows, columns), self.positive(rows), self.bias(rows))

    def fp8(self, rows: int, columns: int) -> W8A8FP8:
        values = torch.randn(rows, columns, generator=self.generator).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
        return W8A8FP8(self._apart(values, float("nan")), self.positive(rows), self.bias(rows))

    def w8a16(self, rows: int, columns: int) -> W8A16:
        group = self.random.choice([0, 0, 4, 24, 32, 64, 128])
        phase = self.random.randrange(group) if group and self.random.random() < 0.5 else 0
        groups = -(-(phase + columns) // group) if group else 1
        symmetric = self.random.random() < 0.3
        offset = torch.zeros(rows, groups, device=DEVICE) if symmetric else self.normal(rows, groups, scale=40.0).round()
        return W8A16(self.int8(rows, columns), self.positive(rows, groups), offset, self.bias(rows), group, phase)

    def any(self, rows: int, columns: int, kinds: tuple[str, ...] = KINDS) -> Quantized:
        made: Quantized = getattr(self, self.random.choice(kinds))(rows, columns)
        return made


def cases(seed: int, count: int) -> Iterator[Case]:
    return (Case(seed * 1000 + i) for i in range(3 * count if CUDA else count))


def exact_input(weight: W8A8 | W8A8Dynamic | W8A8FP8, x: Tensor, most: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x_q, and the scale of each token or one for all: divided in float32, as it is defined, all else in Python's words."""
    if isinstance(weight, W8A8):
        scale = torch.tensor(weight.input_scale, dtype=torch.float32).view(1, 1)
        return torch.round(x.cpu().float() / scale + weight.input_offset).clamp(-128, 127).double(), scale.double()
    most = x.cpu().float().abs().amax(dim=1, keepdim=True) if most is None else most
    scale = most / torch.tensor(448.0 if isinstance(weight, W8A8FP8) else 127.0)
    scale = torch.where(scale == 0, 1.0, scale)
    x_q = x.cpu().float() / scale
    if isinstance(weight, W8A8FP8):
        return x_q.clamp(-448, 448).to(torch.float8_e4m3fn).double(), scale.double()
    return torch.round(x_q).clamp(-128, 127).double(), scale.double()


def exact(weight: Quantized, x: Tensor) -> tuple[Tensor, Tensor]:
    """y in float64 on the CPU, and the sum of the magnitudes of what was added up."""
    w = weight.weight.cpu().double()
    if isinstance(weight, W8A16):
        group = [(weight.phase + d) // weight.group if weight.group else 0 for d in range(weight.shape[1])]
        scale, offset = weight.scale.cpu().double()[:, group], weight.offset.cpu().double()[:, group]
        y, size = x.cpu().double() @ ((w - offset) * scale).T, x.cpu().double().abs() @ ((w.abs() + offset.abs()) * scale).T
    else:
        x_q, s_x = exact_input(weight, x)
        total = x_q @ w.T
        if isinstance(weight, W8A8):
            return (total + weight.quant_bias.cpu()) * weight.deq_scale.cpu().double(), torch.zeros(())
        unit = s_x * weight.weight_scale.cpu().double()
        y, size = total * unit, x_q.abs() @ w.abs().T * unit
    return y + (0.0 if weight.bias is None else weight.bias.cpu().double()), size


def assert_close(got: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """size: as of `exact`; float16 ends at 65504."""
    assert got.shape == expected.shape
    got = got.cpu().double()
    close = (got - expected).abs() <= ROUNDING[dtype] * expected.abs() + 2e-6 * size + 1e-7
    beyond = (expected.abs() > 65000) & (got.abs() > 65000)
    assert (close | beyond if dtype == torch.float16 else close).all(), (got - expected).abs().max()


def linear(weight: Any, **more: Any) -> Callable[[Tensor], Any]:
    return triton_quantized.linear(TORCH, weight, **more)


def run_ranks(size: int, rank: Callable[[Communicator], Tensor]) -> list[Tensor]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, loopback(size, timeout=60.0)))


def test_inputs_are_quantized_as_by_torch() -> None:
    """Each in its own row of a tensor with NaN around, and where halves are rounded to even."""
    halves = torch.tensor(
        [[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.5, -129.0, 300.0, -300.0, 0.49999997, -0.0, 1e30, -1e30]]
    )
    for offset in (0.0, 1.0, -7.0, 120.0):
        got, _ = quantized.quantized(halves.to(DEVICE), 0.0, torch.int8, 1.0, offset)
        assert torch.equal(got.cpu(), (halves.double() + offset).float().round().clamp(-128, 127).to(torch.int8))
    for case in cases(1, 4):
        tokens, _, columns = case.shape()
        x = case.x(tokens, columns)
        x[0] = 0.0
        scale = torch.tensor(case.random.uniform(0.001, 0.1), dtype=torch.float32, device=DEVICE)
        got, none = quantized.quantized(x, 0.0, torch.int8, float(scale), 3.0)
        assert none is None
        assert torch.equal(got, quantize(x, scale, 3.0))
        maxima = quantized.token_maxima(x)
        assert torch.equal(maxima, x.abs().amax(dim=1).float())
        for given in (None, 2 * maxima):
            most = maxima if given is None else given
            got, scales = quantized.quantized(x, INT8_LEVELS, torch.int8, maxima=given)
            expected = torch.where(most > 0, most / torch.full_like(most, 127), 1.0)
            assert torch.equal(scales, expected)
            assert torch.equal(got, quantize(x, expected[:, None]))
            expected = torch.where(most > 0, most / torch.full_like(most, 448), 1.0)
            for dtype in (torch.float8_e4m3fn, torch.float16):
                got, scales = quantized.quantized(x, FP8_LEVELS, dtype, maxima=given)
                assert torch.equal(scales, expected)
                assert torch.equal(got.float(), to_fp8(x, expected[:, None]).float())


@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_what_is_defined(kind: str) -> None:
    for case in cases(2 + KINDS.index(kind), 8):
        tokens, rows, columns = case.shape()
        x, weight = case.x(tokens, columns), case.any(rows, columns, (kind,))
        got, logits = linear(weight)(x), triton_quantized.QuantizedHead(TORCH, weight).logits(x)
        assert got.dtype == x.dtype
        assert_close(got, *exact(weight, x), case.dtype)
        assert logits.dtype == torch.float32
        assert_close(logits, *exact(weight, x), torch.float32)
        if kind in ("w8a8", "dynamic"):
            exactly = weight if kind == "w8a8" else replace(weight, bias=None)
            assert torch.equal(linear(exactly)(x), TORCH.linear(exactly)(x))


@pytest.mark.parametrize("kind", KINDS)
def test_all_token_counts(kind: str) -> None:
    """The roads for one, some and many tokens, whole tiles and not, with a group of every size."""
    case = Case(10 + KINDS.index(kind))
    for tokens in (1, 2, 33, 66):
        x, weight = case.x(tokens, 150), case.any(72, 150, (kind,))
        assert_close(linear(weight)(x), *exact(weight, x), case.dtype)
    if kind == "w8a16":
        for group, phase in ((16, 0), (16, 5), (50, 0), (50, 49), (128, 127), (256, 0), (256, 100), (512, 300)):
            groups = -(-(phase + 300) // group)
            offset = case.normal(9, groups, scale=40.0).round()
            weight = W8A16(case.int8(9, 300), case.positive(9, groups), offset, None, group, phase)
            for tokens in (1, 3):
                x = case.x(tokens, 300)
                assert_close(linear(weight)(x), *exact(weight, x), case.dtype)


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_columns_gives_the_bias(kind: str, tokens: int) -> None:
    """Where groups of columns are fewer than ranks; its scales, by group, are then none too."""
    case = Case(40 + KINDS.index(kind))
    weight = case.any(72, 0, (kind,))
    if isinstance(weight, W8A16):
        nothing = torch.empty(72, 0, device=DEVICE)
        weight = replace(weight, scale=nothing, offset=nothing, group=64, phase=0)
    if isinstance(weight, W8A8):
        bias: Tensor | None = weight.quant_bias * weight.deq_scale
    else:
        assert isinstance(weight, W8A8Dynamic | W8A8FP8 | W8A16)
        bias = weight.bias
    y = linear(weight)(case.x(tokens, 0))
    expected = torch.zeros(72, device=DEVICE) if bias is None else bias
    assert torch.equal(y, expected.to(y.dtype).expand(tokens, 72))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_is_written_or_read(kind: str) -> None:
    """Outputs in memory that is poisoned before, and whose surroundings stay so; what programs share is as it was afterwards."""
    for case in cases(20 + KINDS.index(kind), 3):
        tokens, rows, columns = case.shape()
        product = triton_quantized._Product(case.any(2 * rows, columns, (kind,)))
        x = case.x(tokens, columns, 0.2)
        for form in (RUN, GATED, *((INTEGER,) if kind in ("w8a8", "dynamic") else ())):
            outputs, dtype = rows if form == GATED else 2 * rows, torch.int32 if form == INTEGER else torch.float32
            around = torch.full((tokens + 2, outputs + 40), 77, dtype=dtype, device=DEVICE)
            out = around[1:-1, 20 : 20 + outputs]
            out.fill_(1 << 30 if form == INTEGER else float("nan"))
            product(x, out, form)
            assert out.double().isfinite().all()
            assert (out != 1 << 30).all()
            out.fill_(77)
            assert (around == 77).all()
        assert not product._arrived.any()


def test_sums_of_several_programs() -> None:
    """Long rows of few outputs: each output's columns are shared out, and their sums put together in one order."""
    for seed, kind in enumerate(KINDS):
        case = Case(30 + seed)
        for tokens, rows, columns in ((2, 10, 1500), (3, 70, 600)):
            x, weight = case.x(tokens, columns), case.any(2 * rows, columns, (kind,))
            assert quantized._splits(-(-2 * rows // 64), columns // 256) > 1
            op, gated = linear(weight), triton_quantized.gated(TORCH, weight)
            once = op(x)
            assert_close(once, *exact(weight, x), case.dtype)
            y = gated(x)
            assert torch.equal(once, op(x))
            assert torch.equal(y, gated(x))
            gate, up = exact(weight, x)[0].chunk(2, dim=1)
            expected = torch.nn.functional.silu(gate) * up
            finite = expected.abs() < 60000
            assert ((y.cpu().double() - expected).abs()[finite] <= (0.01 * expected.abs() + 0.1)[finite]).all()


def test_the_largest_sums() -> None:
    for x_end, w_end in ((-1e4, -128), (1e4, -128), (-1e4, 127), (1e4, 127)):
        w = torch.full((5, 5001), w_end, dtype=torch.int8, device=DEVICE)
        weight = W8A8(w, 0.5, 3.0, torch.arange(5, dtype=torch.int32, device=DEVICE), torch.ones(5, device=DEVICE))
        for tokens in (1, 2):
            total = max(-128, min(127, x_end)) * w_end * 5001
            x = torch.full((tokens, 5001), x_end, device=DEVICE)
            got = linear(weight, across=loopback(1)[0])(x).total
            assert torch.equal(got.cpu(), (total + torch.arange(5)).int().expand(tokens, -1))


def columns_of(weight: Any, start: int, stop: int) -> Any:
    """What the rank of these columns holds."""
    w = weight.weight[:, start:stop]
    if isinstance(weight, W8A8):
        there = start == 0 < stop
        return replace(weight, weight=w, quant_bias=weight.quant_bias if there else torch.zeros_like(weight.quant_bias))
    return replace(weight, weight=w, bias=None)


@pytest.mark.parametrize("kind", ["w8a8", "dynamic", "fp8"])
def test_a_sum_over_ranks(kind: str) -> None:
    """Integers have the same bits at every world size; tokens have the scales that they have at one."""
    for case in cases(40 + KINDS.index(kind), 3):
        tokens, rows, columns = case.shape()
        x, weight = case.x(tokens, columns), case.any(rows, columns, (kind,))
        weight = weight if isinstance(weight, W8A8) else replace(weight, bias=None)
        cut = case.random.randint(0, columns)
        cuts = (0, cut, columns)

        def rank(comm: Communicator, weight: Any = weight, x: Tensor = x, cuts: tuple[int, ...] = cuts) -> Any:
            start, stop = cuts[comm.rank : comm.rank + 2]
            return linear(columns_of(weight, start, stop), across=comm)(x[:, start:stop])

        first, second = run_ranks(2, rank)
        whole = linear(weight)(x)
        if kind == "fp8":
            y, size = exact(weight, x)
            assert_close(first.float() + second.float(), y, size + (first.abs() + second.abs()).cpu().double() * 1e4, case.dtype)
            continue
        expected = TORCH.linear(weight, across=loopback(1)[0])(x)
        for part in (first, second):
            assert isinstance(part, Unscaled)
            assert part.total.dtype == torch.int32
            assert part.dtype == case.dtype
            assert torch.equal(part.scale, expected.scale)
        assert torch.equal(first.total + second.total, expected.total)
        assert torch.equal(first.scaled(first.total + second.total), whole)


def test_leaves() -> None:
    """Their sum is y; those of integers are torch's bit for bit."""
    for case in cases(50, 6):
        tokens, rows, columns = case.shape()
        x, weight = case.x(tokens, columns), case.any(rows, columns)
        weight = weight if isinstance(weight, W8A8) else replace(weight, bias=None)
        cuts = (0, *sorted(case.random.randint(0, columns) for _ in range(2)), columns)
        got = triton_quantized.linear_leaves(TORCH, weight, cuts)(x)
        assert got.shape == (3, tokens, rows)
        assert got.dtype == torch.float32
        y, size = exact(weight, x)
        assert_close(got.double().sum(dim=0), y, size + got.cpu().double().abs().sum(dim=0), torch.float32)
        if isinstance(weight, W8A8 | W8A8Dynamic):
            assert torch.equal(got, TORCH.linear_leaves(weight, cuts)(x))
        assert torch.equal(linear(weight, cuts=cuts)(x), tree_sum(got.unbind()))


@pytest.mark.parametrize("kind", KINDS)
def test_joining_the_residual_stream(kind: str) -> None:
    """y is added in the place of what is there, by each road, with the bits of y that is rounded and then added: so it is over
    several ranks."""
    for seed, tokens in enumerate((1, 3, 33, 66)):
        case = Case(100 + 10 * KINDS.index(kind) + seed)
        x, weight = case.x(tokens, 160), case.any(80, 160, (kind,))
        residual = case.normal(tokens, 80).to(case.dtype)
        y, size = exact(weight, x)
        expected, sum_of_two = y + residual.cpu().double(), residual + linear(weight)(x)
        deferred = triton_quantized.joining(weight)(x)
        assert isinstance(deferred, Deferred)
        got = deferred.add_to(residual)
        assert got is residual
        assert torch.equal(got, sum_of_two)
        assert_close(got, expected, size + y.abs() * ROUNDING[case.dtype] / 2e-6, case.dtype)


@pytest.mark.parametrize("kind", ["w8a8", "dynamic"])
def test_one_token_of_whole_words_and_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of whole words go to a kernel of their own, where several blocks are on their way or one."""
    case = Case(140 + KINDS.index(kind))
    for columns, phase, whole in ((152, 0, True), (1040, 8, True), (151, 0, False), (152, 2, False), (2, 0, False)):
        data, x = case.int8(20, columns), case.x(1, columns)
        width = columns + phase + (-columns - phase) % 4 + (4 if whole else 0)
        apart = torch.full((20, width), -128, dtype=torch.int8, device=DEVICE)
        w = apart[:, phase : phase + columns]
        w.copy_(data)
        weight = replace(case.any(20, columns, (kind,)), weight=w)
        product = triton_quantized._Product(weight)
        assert (product._words is not None) is whole
        for blocks in ((16, 32), (2, 512)):
            monkeypatch.setattr(quantized, "_one", lambda outputs, gated, blocks=blocks: blocks)
            for form in (RUN, GATED, INTEGER):
                outputs = 10 if form == GATED else 20
                out = torch.empty(1, outputs, dtype=torch.int32 if form == INTEGER else torch.float32, device=DEVICE)
                product(x, out, form)
                y = exact(weight, x)[0]
                if form == RUN:
                    assert_close(out, y, exact(weight, x)[1], torch.float32)
                elif form == GATED:
                    up = y[:, 10:]
                    expected = torch.nn.functional.silu(y[:, :10]) * up
                    assert ((out.cpu().double() - expected).abs() <= 1e-5 * expected.abs() + 1e-5 * (1 + up.abs())).all()
                else:
                    total = exact_input(weight, x)[0] @ w.cpu().double().T
                    quant_bias = weight.quant_bias.cpu() if isinstance(weight, W8A8) else 0
                    assert torch.equal(out.cpu().double(), total + quant_bias)


@pytest.mark.parametrize("kind", [*KINDS, "parts"])
def test_gated(kind: str) -> None:
    for case in cases(70 + (*KINDS, "parts").index(kind), 3):
        tokens, width, columns = case.shape()
        x = case.x(tokens, columns, 0.05)
        weight: Any = (
            Packed((case.any(width, columns), case.any(width, columns)))
            if kind == "parts"
            else case.any(2 * width, columns, (kind,))
        )
        both = torch.cat([exact(part, x)[0] for part in (weight.parts if kind == "parts" else [weight])], dim=1)
        gate, up = both.chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
        got = triton_quantized.gated(TORCH, weight)(x)
        assert got.dtype == x.dtype
        error = (got.cpu().double() - expected).abs()
        bound = (4 * ROUNDING[case.dtype] + 1e-4) * expected.abs() + 1e-4 * (1 + up.abs())
        if kind == "parts":
            bound += 3 * ROUNDING[case.dtype] * gate.abs() * up.abs()
        assert ((error <= bound) | (expected.abs() > 60000)).all()


def test_the_best_of_a_head() -> None:
    for case in cases(80, 5):
        tokens, rows, columns = case.shape()
        x, weight = case.x(tokens, columns), case.any(rows, columns)
        head = triton_quantized.QuantizedHead(TORCH, weight)
        allowed = case.random.randint(1, rows)
        count = case.random.randint(1, min(allowed, 64))
        values, picked = head.best(x, count, allowed)
        expected = top(head.logits(x)[:, :allowed], count)
        assert torch.equal(values, expected[0])
        assert torch.equal(picked, expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_at_all(kind: str) -> None:
    case = Case(90)
    for tokens, rows, columns in ((0, 3, 4), (2, 0, 4), (1, 0, 4), (1, 5, 0), (3, 5, 0), (70, 3, 0), (70, 8, 8)):
        x, weight = torch.randn(tokens, columns).to(case.dtype).to(DEVICE), case.any(rows, columns, (kind,))
        got = linear(weight)(x)
        y = exact(weight, x)[0] if columns else torch.zeros(tokens, rows).double()
        if not columns and isinstance(weight, W8A8):
            y = (weight.quant_bias.double() * weight.deq_scale.double()).cpu().expand(tokens, -1)
        elif not columns and weight.bias is not None:
            y = weight.bias.cpu().double().expand(tokens, -1)
        assert_close(got, y, torch.ones(()), case.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_device_is_not_waited_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device in a graph, which fails where it would be; elsewhere what would wait for it is not called."""
    monkeypatch.setattr(triton_quantized, "FEW", 16)
    case = Case(100)
    weight = case.any(24, 48, (kind,))
    op, gated, head = linear(weight), triton_quantized.gated(TORCH, weight), triton_quantized.QuantizedHead(TORCH, weight)
    for tokens in (1, 3, 18):
        x = case.x(tokens, 48)
        expected = op(x), gated(x), *head.best(x, 1, 20), *head.best(x, 5, 20)
        if CUDA:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = op(x), gated(x), *head.best(x, 1, 20), *head.best(x, 5, 20)
            graph.replay()
        else:
            with monkeypatch.context() as patch:
                for name in ("item", "tolist", "nonzero", "cpu", "__bool__", "__int__", "__float__", "__index__"):
                    patch.setattr(Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} waits for the device"))
                got = op(x), gated(x), *head.best(x, 1, 20), *head.best(x, 5, 20)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)

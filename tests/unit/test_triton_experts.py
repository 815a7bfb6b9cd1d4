"""The grouped expert product and routing in Triton, against float64, each token by itself over all experts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_helper import DEVICE, poison

from qtp.kernels.interface import Expert
from qtp.kernels.torch_kernels import TorchKernels
from qtp.kernels.triton import experts as grouped
from qtp.kernels.triton import routing
from qtp.weights.quantized import W8A8, W8A8FP8, W8A16, Packed, W8A8Dynamic, Weight

ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest output
KINDS = ("float", "w8a16", "w8a16 without offsets", "w8a8_dynamic", "w8a8", "w8a8_fp8")
HELD = (1, 2, 5, 6, 9)  # of 11; what a rank may hold
EXPERTS = 11


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poison():
        yield


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def integers(*shape: int, seed: int, low: int = -128, high: int = 128, dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def apart(x: Tensor, gap: int) -> Tensor:
    """x in the middle of poison, `gap` elements between its rows."""
    rows, columns = x.shape
    around = torch.empty(rows + 2, columns + gap, dtype=x.dtype, device=x.device)
    inside = around[1:-1, gap // 2 : gap // 2 + columns]
    return inside.copy_(x)


def around(x: Tensor) -> Tensor:
    """What `apart` laid x into."""
    base = x._base
    assert base is not None
    return base


def a_weight(kind: str, rows: int, columns: int, dtype: torch.dtype, seed: int, gap: int = 16) -> Weight:
    if kind == "float":
        return apart(random(rows, columns, seed=seed, dtype=torch.float32).mul_(columns**-0.5).to(dtype), gap)
    if kind == "w8a8_fp8":
        floats = random(rows, columns, seed=seed).mul_(100).clamp_(-448, 448)
        fp8 = apart(floats.to(torch.float8_e4m3fn), gap)
        return W8A8FP8(fp8, (random(rows, seed=seed + 1).abs() + 0.2) / (100 * columns**0.5), None)
    weight = apart(integers(rows, columns, seed=seed), gap)
    scale = (random(rows, seed=seed + 1).abs() + 0.2) / (60 * columns**0.5)
    if kind == "w8a8":
        bias = integers(rows, seed=seed + 2, low=-3000, high=3000, dtype=torch.int32)
        return W8A8(weight, 0.02 + 0.001 * (seed % 7), float(seed % 5 - 2), bias, scale * 0.02)
    if kind == "w8a8_dynamic":
        return W8A8Dynamic(weight, scale, None)
    offset = random(rows, 1, seed=seed + 2).mul_(9).round_() if kind == "w8a16" else torch.zeros(rows, 1, device=DEVICE)
    return W8A16(weight, scale[:, None].contiguous(), offset, None, 0, 0)


def some_experts(
    kind: str, hidden: int, columns: int, dtype: torch.dtype, held: tuple[int, ...] = HELD, gap: int = 16, down: str | None = None
) -> dict[int, Expert]:
    return {
        e: Expert(
            a_weight(kind, 2 * columns, hidden, dtype, 100 * e + 1, gap),
            a_weight(down or kind, hidden, columns, dtype, 100 * e + 51, gap),
        )
        for e in held
    }


def levels(x: Tensor, scale: Tensor, offset: float = 0.0) -> Tensor:
    return (x.float() / scale + offset).round().clamp(-128, 127).double()


def product(weight: Weight, x: Tensor) -> Tensor:
    """y float64 of one token x."""
    match weight:
        case W8A8():
            x_q = levels(x, torch.tensor(weight.input_scale, device=x.device), weight.input_offset)
            return (weight.weight.double() @ x_q + weight.quant_bias.double()) * weight.deq_scale.double()
        case W8A8Dynamic():
            most = x.float().abs().max()
            s_x = most / torch.tensor(127.0, device=x.device) if most > 0 else torch.ones((), device=x.device)
            return weight.weight.double() @ levels(x, s_x) * s_x.double() * weight.weight_scale.double()
        case W8A8FP8():
            most = x.float().abs().max()
            s_x = most / torch.tensor(448.0, device=x.device) if most > 0 else torch.ones((), device=x.device)
            x_q = (x.float() / s_x).clamp(-448, 448).to(torch.float8_e4m3fn).double()
            return weight.weight.double() @ x_q * s_x.double() * weight.weight_scale.double()
        case W8A16():
            return (weight.weight.double() - weight.offset.double()) * weight.scale.double() @ x.double()
    assert isinstance(weight, Tensor)
    return weight.double() @ x.double()


def expected(experts: dict[int, Expert], x: Tensor, weights: Tensor, chosen: Tensor, partial: Tensor) -> Tensor:
    """float64, but for h, which is rounded as it should be."""
    out = partial.double().clone()
    for t in range(len(x)):
        for e, expert in experts.items():
            share = weights[t].double()[chosen[t] == e].sum()
            if share:
                gate, up = product(expert.gate_up, x[t]).chunk(2)
                out[t] += share * product(expert.down, (gate * torch.sigmoid(gate) * up).to(x.dtype))
    return out


@dataclass(frozen=True, slots=True)
class Case:
    tokens: int
    top_k: int = 2
    hidden: int = 24
    columns: int = 16
    held: tuple[int, ...] = HELD
    gap: int = 16
    total: int = EXPERTS


def inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = apart(random(case.tokens, case.hidden, seed=seed + 1, dtype=dtype), 16)
    scores = random(case.tokens, case.total, seed=seed + 2)
    scores[:1, case.held[0]] += 2  # at least one pair is of a held expert
    weights, chosen = scores.softmax(dim=1).topk(case.top_k, dim=1)
    return x, weights.to(dtype), chosen, apart(random(case.tokens, case.hidden, seed=seed + 3, dtype=dtype), 8)


def check(experts: dict[int, Expert], call: Callable[..., Tensor], tensors: tuple[Tensor, ...], error: float) -> None:
    partial = tensors[-1]
    wanted = expected(experts, *tensors)
    assert not torch.equal(wanted, partial.double()), "no held expert was chosen"
    outside = torch.ones_like(around(partial), dtype=torch.bool)
    outside[1:-1, 4 : 4 + partial.shape[1]] = False
    result = call(*tensors)
    assert result.data_ptr() == partial.data_ptr()
    assert result.dtype == partial.dtype
    worst = (result.double() - wanted).abs().max() / wanted.abs().max()
    assert worst <= error, f"{worst:.2e}"  # and no NaN
    assert around(partial)[outside].isnan().all()


@pytest.mark.parametrize("tokens", [1, grouped.FEW, grouped.FEW + 1, 21])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_floats(tokens: int, dtype: torch.dtype) -> None:
    case = Case(tokens)
    experts = some_experts("float", case.hidden, case.columns, dtype)
    check(experts, grouped.GroupedExperts(experts, DEVICE), inputs(case, dtype), ERROR[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("tokens", [2, 9])
def test_integers(tokens: int, kind: str, dtype: torch.dtype) -> None:
    """A level of h may differ where a sum in another order is rounded to another number."""
    case = Case(tokens)
    experts = some_experts(kind.split()[0] if kind != KINDS[2] else kind, case.hidden, case.columns, dtype)
    check(
        experts,
        grouped.GroupedExperts(experts, DEVICE),
        inputs(case, dtype),
        max(ERROR[dtype], 5e-5 if "w8a16" in kind else 4e-3),
    )


@pytest.mark.parametrize("tokens", [2, 7])
@pytest.mark.parametrize(("gate_up", "down"), [("w8a8", "w8a8_dynamic"), ("w8a8_dynamic", "float"), ("float", "w8a8")])
def test_a_down_of_another_kind(gate_up: str, down: str, tokens: int) -> None:
    experts = some_experts(gate_up, 24, 16, torch.bfloat16, down=down)
    check(experts, grouped.GroupedExperts(experts, DEVICE), inputs(Case(tokens), torch.bfloat16), ERROR[torch.bfloat16])


ODD = (
    Case(2, top_k=1, hidden=19, columns=7, gap=3),  # rows that are not aligned
    Case(7, top_k=1, hidden=19, columns=7, gap=3),
    Case(1, top_k=2, hidden=258, columns=514, held=(0,), total=4),  # longer than what is loaded at a time
    Case(8, top_k=2, hidden=260, columns=70, held=(0, 3), total=4),
    Case(9, top_k=5, held=(4,), total=5),
    Case(6, top_k=4, held=tuple(range(17)), total=17),
)


@pytest.mark.parametrize("case", ODD, ids=str)
def test_odd_shapes(case: Case) -> None:
    experts = some_experts("float", case.hidden, case.columns, torch.float32, case.held, case.gap)
    check(experts, grouped.GroupedExperts(experts, DEVICE), inputs(case, torch.float32), 4e-6)


@pytest.mark.parametrize(
    ("tokens", "kind"),
    [(12, "w8a8_dynamic"), (40, "w8a8"), (150, "w8a16"), *((n, kind) for n in (12, 40, 150) for kind in ("float", "w8a8_fp8"))],
)
def test_every_tile(tokens: int, kind: str) -> None:
    case = Case(tokens, top_k=2, hidden=136, columns=72, held=(0, 2), total=3)
    experts = some_experts(kind, case.hidden, case.columns, torch.bfloat16, case.held)
    check(experts, grouped.GroupedExperts(experts, DEVICE), inputs(case, torch.bfloat16), ERROR[torch.bfloat16])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, 8])
def test_tokens_none_of_whose_experts_is_held(tokens: int, kind: str) -> None:
    case = Case(tokens, top_k=2)
    experts = some_experts(kind, case.hidden, case.columns, torch.bfloat16, held=(4, 7))
    x, weights, chosen, partial = inputs(case, torch.bfloat16)
    chosen[:] = torch.tensor([[2, 10]])
    chosen[-1] = torch.tensor([7, 5])
    before = partial.clone()
    check(experts, grouped.GroupedExperts(experts, DEVICE), (x, weights, chosen, partial), ERROR[torch.bfloat16])
    assert torch.equal(partial[:-1], before[:-1])
    assert not torch.equal(partial[-1], before[-1])


@pytest.mark.parametrize("tokens", [2, 40])
def test_all_tokens_choose_one_expert(tokens: int) -> None:
    """40 fill more than one block of pairs."""
    case = Case(tokens, top_k=1)
    experts = some_experts("float", case.hidden, case.columns, torch.float16)
    x, weights, chosen, partial = inputs(case, torch.float16)
    chosen[:] = HELD[2]
    check(experts, grouped.GroupedExperts(experts, DEVICE), (x, weights, chosen, partial), ERROR[torch.float16])


@pytest.mark.parametrize("kind", ["float", "w8a8_dynamic", "w8a8_fp8"])
@pytest.mark.parametrize("tokens", [3, 8])
def test_zeros_and_a_float32_partial(tokens: int, kind: str) -> None:
    case = Case(tokens)
    experts = some_experts(kind, case.hidden, case.columns, torch.bfloat16)
    x, weights, chosen, partial = inputs(case, torch.bfloat16)
    x[0] = 0
    check(experts, grouped.GroupedExperts(experts, DEVICE), (x, weights, chosen, apart(partial.float(), 8)), 4e-3)


@pytest.mark.parametrize("kind", ["float", "w8a8", "w8a8_dynamic", "w8a16", "w8a8_fp8"])
@pytest.mark.parametrize("tokens", [2, 8])
def test_as_torch_does(tokens: int, kind: str) -> None:
    case = Case(tokens)
    experts = some_experts(kind, case.hidden, case.columns, torch.float32)
    x, weights, chosen, partial = inputs(case, torch.float32)
    wanted = TorchKernels().experts(experts)(x, weights, chosen, partial.clone())
    torch.testing.assert_close(grouped.GroupedExperts(experts, DEVICE)(x, weights, chosen, partial), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("tokens", "kind"), [(2, "w8a8"), (23, "float"), (23, "w8a8"), (23, "w8a8_dynamic")])
def test_many_tokens_go_piece_by_piece(tokens: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_PAIRS", 21)  # 10 tokens
    case = Case(tokens)
    experts = some_experts(kind, case.hidden, case.columns, torch.bfloat16)
    check(experts, grouped.GroupedExperts(experts, DEVICE), inputs(case, torch.bfloat16), ERROR[torch.bfloat16])


def test_nothing_to_do() -> None:
    experts = some_experts("float", 24, 16, torch.bfloat16)
    none = inputs(Case(0), torch.bfloat16)
    assert grouped.GroupedExperts(experts, DEVICE)(*none) is none[-1]
    some = inputs(Case(3), torch.bfloat16)
    before = some[-1].clone()
    assert grouped.takes({})
    assert torch.equal(grouped.GroupedExperts({}, DEVICE)(*some), before)


class _NoLooking(TorchDispatchMode):
    """Refuses whatever makes the host wait for numbers of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags), func
        return func(*args, **(kwargs or {}))


def replayed(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call`, on a CUDA device as a graph that holds it."""
    if DEVICE.type == "cpu":
        return call
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@pytest.mark.parametrize(("tokens", "kind"), [(2, "float"), (8, "float"), (2, "w8a8_dynamic"), (8, "w8a8"), (8, "w8a8_fp8")])
def test_a_graph_holds_it(tokens: int, kind: str) -> None:
    """The host never looks at where tokens go: the same launches do for any routing, and add in the same order each time."""
    case = Case(tokens)
    experts = some_experts(kind, case.hidden, case.columns, torch.bfloat16)
    call = grouped.GroupedExperts(experts, DEVICE)
    place = inputs(case, torch.bfloat16)
    with _NoLooking():
        call(*place)
    replay = replayed(lambda: call(*place))
    results = []
    for seed in (10, 20, 20):
        for mine, other in zip(place, inputs(case, torch.bfloat16, seed), strict=True):
            mine.copy_(other)
        wanted = expected(experts, *place)
        replay()
        assert (place[-1].double() - wanted).abs().max() <= ERROR[torch.bfloat16] * wanted.abs().max()
        results.append(place[-1].clone())
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1])


def test_what_it_takes() -> None:
    some = {kind: some_experts(kind, 24, 16, torch.bfloat16)[1] for kind in KINDS if kind != KINDS[2]}
    for expert in some.values():
        assert grouped.takes({0: expert, 4: expert})
    gate_up = some["float"].gate_up
    assert isinstance(gate_up, Tensor)
    others = [some["w8a8"].gate_up, some["w8a8_fp8"].gate_up, gate_up.float(), gate_up.to(torch.float8_e4m3fn)]
    for other in (*others, gate_up[:, :-1], gate_up.mT.contiguous().mT):
        assert not grouped.takes({0: Expert(other, some["float"].down), 1: some["float"]})
    dynamic, wide = some["w8a8_dynamic"].gate_up, some["w8a16"].gate_up
    assert isinstance(dynamic, W8A8Dynamic)
    assert isinstance(wide, W8A16)
    fp8 = some["w8a8_fp8"].gate_up
    assert isinstance(fp8, W8A8FP8)
    bias = torch.zeros(32, dtype=torch.bfloat16, device=DEVICE)
    groups = [torch.cat([part, part], dim=1) for part in (wide.scale, wide.offset)]
    for odd in (
        Packed((dynamic, dynamic)),
        W8A8Dynamic(dynamic.weight, dynamic.weight_scale, bias),
        W8A8FP8(fp8.weight, fp8.weight_scale, bias),
        W8A16(wide.weight, wide.scale, wide.offset, bias, 0, 0),
        W8A16(wide.weight, groups[0], groups[1], None, 12, 0),
    ):
        assert not grouped.takes({0: Expert(odd, some["float"].down)})
        assert not grouped.takes({0: Expert(some["float"].gate_up, odd)})


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(5, 60, 4), (1, 64, 8), (3, 7, 7), (4, 1, 1), (0, 8, 2)])
def test_choose(tokens: int, experts: int, top_k: int, norm_topk_prob: bool, dtype: torch.dtype) -> None:
    logits = apart(random(tokens, experts, seed=1, dtype=dtype).mul_(4), 6)
    weights, chosen = routing.choose(top_k, norm_topk_prob)(logits)
    assert (weights.dtype, chosen.dtype, weights.shape, chosen.shape) == (dtype, torch.int64, *2 * ((tokens, top_k),))
    for row, w, c in zip(logits.tolist(), weights.tolist(), chosen.tolist(), strict=True):
        order = sorted(range(experts), key=lambda e: (-row[e], e))[:top_k]
        assert c == order
        soft = torch.tensor(row, dtype=torch.float64).softmax(dim=0)[order]
        soft = soft / soft.sum() if norm_topk_prob else soft
        torch.testing.assert_close(torch.tensor(w).double(), soft, rtol=2e-6 + torch.finfo(dtype).eps / 2, atol=1e-7)


def test_choose_among_equals_and_excluded_ones() -> None:
    logits = torch.full((2, 6), float("-inf"), device=DEVICE)
    logits[0, 3:5] = 2.0
    logits[1] = 1.0
    weights, chosen = routing.choose(4, True)(logits)
    assert chosen.tolist() == [[3, 4, 0, 1], [0, 1, 2, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4], device=DEVICE))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("leaves", [0, 3])
def test_scale(leaves: int, dtype: torch.dtype) -> None:
    gate = apart(random(5, 1, seed=2, dtype=dtype).mul_(3), 4)
    x = apart(random(max(1, leaves) * 5, 70, seed=3, dtype=dtype), 10)
    outside = around(x).isnan()
    shaped = x.view(leaves, 5, 70) if leaves else x
    wanted = torch.sigmoid(gate.double()) * shaped.double()
    torch.testing.assert_close(routing.scale(gate, shaped).double(), wanted, rtol=1e-6 + torch.finfo(dtype).eps / 2, atol=1e-6)
    assert torch.equal(around(x).isnan(), outside)
    assert routing.scale(gate[:0], x[:0]).shape == (0, 70)


LARGE = () if DEVICE.type == "cpu" else ((1, "bfloat16"), (4, "bfloat16"), (8, "bfloat16"), (300, "float16"), (2048, "bfloat16"))


@pytest.mark.parametrize(("tokens", "dtype"), LARGE or [(5, "bfloat16")])
@pytest.mark.parametrize("kind", ["float", "w8a16", "w8a8_dynamic", "w8a8", "w8a8_fp8"])
def test_true_shapes(tokens: int, dtype: str, kind: str) -> None:
    """On a CUDA device those of Qwen2-57B-A14B, on a CPU a 64th of them; against torch in float32 or in integers."""
    hidden, columns, total, top_k = (56, 40, 8, 2) if DEVICE.type == "cpu" else (3584, 2560, 64, 8)
    case = Case(tokens, top_k, hidden, columns, tuple(range(1, total)), 0, total)
    run = getattr(torch, dtype)
    experts = some_experts(kind, hidden, columns, run, case.held, 0)
    x, weights, chosen, partial = inputs(case, run)
    wide = {e: Expert(e_.gate_up.float(), e_.down.float()) for e, e_ in experts.items()} if kind == "float" else experts  # type: ignore[union-attr]
    wanted = TorchKernels().experts(wide)(x.float(), weights.float(), chosen, partial.float())
    result = grouped.GroupedExperts(experts, DEVICE)(x, weights, chosen, partial)
    assert (result.float() - wanted).abs().max() <= ERROR[torch.bfloat16] * wanted.abs().max()

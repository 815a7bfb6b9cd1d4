"""The last linear layer in Triton: logits against float64, its best against them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_helper import DEVICE

from qtp.kernels.torch_kernels import top as torch_top
from qtp.kernels.triton import vocabulary
from qtp.kernels.triton.vocabulary import VocabularyHead, top

CUDA = DEVICE.type == "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 77, 100), (1, 16, 1), (2, 130, 64), (5, 65, 130), (17, 1, 33), (129, 9, 16)]  # tokens, rows, columns
if CUDA:
    SHAPES += [(1, 152064, 896), (3, 151936, 3584), (64, 32001, 2048), (300, 5000, 999)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def apart(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows that lie apart, with NaN between them."""
    rows, columns = values.shape
    around = torch.full((rows + 2, columns + 8), float("nan"), dtype=dtype, device=DEVICE)
    inside = around[1:-1, :columns]
    inside.copy_(values)
    return inside


def best_of(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """In Python's words: the largest first, the lower column first among equals."""
    rows = [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:count] for row in logits.tolist()]
    columns = torch.tensor(rows, dtype=torch.int64)
    return logits.cpu().gather(1, columns), columns


@every_dtype
@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
def test_logits_and_their_best(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    x, weight = apart(normal(tokens, columns), dtype), apart(normal(rows, columns, seed=1), dtype)
    head = VocabularyHead(weight)
    logits = head.logits(x)
    assert logits.dtype == torch.float32
    expected, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert ((logits.double() - expected).abs() <= 1e-6 * size).all()
    for allowed in sorted({1, rows // 2 + 1, rows} if tokens < 100 else {rows}):
        for count in sorted({1, min(3, allowed), min(64, allowed)}):
            values, picked = head.best(x, count, allowed)
            assert values.dtype == torch.float32
            assert picked.dtype == torch.int64
            assert values.shape == picked.shape == (tokens, count)
            wanted = torch_top(logits[:, :allowed], count)
            assert torch.equal(picked, wanted[1])
            assert torch.equal(values, wanted[0])


def test_sums_are_not_rounded_to_halves() -> None:
    """256 and 1 are, and 257 is not, a bfloat16: logits that differ by less than it can hold are told apart."""
    x = torch.tensor([[256.0, 1.0]] * 2, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.5]], dtype=torch.bfloat16, device=DEVICE)
    for tokens in (1, 2):
        head = VocabularyHead(weight)
        assert head.logits(x[:tokens]).tolist() == [[256.0, 257.0, 256.5]] * tokens
        assert head.best(x[:tokens], 1, 3)[1].tolist() == [[1]] * tokens
        assert head.best(x[:tokens], 2, 3)[0].tolist() == [[257.0, 256.5]] * tokens


@pytest.mark.parametrize("tokens", [1, 3])
def test_equals_come_by_their_columns(tokens: int) -> None:
    """Within a program and across programs; zeros of both signs are equal."""
    weight = torch.zeros(200, 16, dtype=torch.bfloat16, device=DEVICE)
    x = torch.ones(tokens, 16, dtype=torch.bfloat16, device=DEVICE)
    head = VocabularyHead(weight)
    assert head.best(x, 1, 200)[1].tolist() == [[0]] * tokens
    assert head.best(x, 5, 200)[1].tolist() == [[0, 1, 2, 3, 4]] * tokens
    weight[[70, 75, 140, 199]] = 1.0
    assert head.best(x, 1, 200)[1].tolist() == [[70]] * tokens
    assert head.best(x, 6, 200)[1].tolist() == [[70, 75, 140, 199, 0, 1]] * tokens
    assert head.best(x, 1, 70)[1].tolist() == [[0]] * tokens
    weight[:] = -1.0
    weight[150] = -0.5
    for count, expected in ((1, [150]), (3, [150, 0, 1])):
        values, picked = head.best(x, count, 200)
        assert picked.tolist() == [expected] * tokens
        assert values[:, 0].tolist() == [-8.0] * tokens
    signs = VocabularyHead(torch.tensor([[-1.0], [1.0], [-1.0]], dtype=torch.float32, device=DEVICE))
    zeros = torch.zeros(tokens, 1, device=DEVICE)
    for count in (1, 3):
        assert signs.best(zeros, count, 3)[1].tolist() == [list(range(count))] * tokens


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_not_a_number_is_seen(tokens: int) -> None:
    """It comes before all else, infinity included, as torch's max has it; where it is not allowed it is not seen."""
    weight = torch.ones(150, 16, device=DEVICE)
    weight[20], weight[30] = float("inf"), float("-inf")
    x = torch.ones(tokens, 16, device=DEVICE)
    head = VocabularyHead(weight)
    assert head.best(x, 1, 150)[1].tolist() == [[20]] * tokens
    assert head.best(x, 150, 150)[1][:, -1].tolist() == [30] * tokens
    weight[[90, 140]] = float("nan")
    for count in (1, 2, 4):
        values, picked = head.best(x, count, 150)
        assert picked.tolist() == [[90, 140, 20, 0][:count]] * tokens
        assert values[:, :2].isnan().all()
        values, picked = head.best(x, count, 90)
        assert picked.tolist() == [[20, 0, 1, 2][:count]] * tokens
        assert not values.isnan().any()
    infinite = VocabularyHead(torch.full((70, 1), float("-inf"), device=DEVICE))
    assert infinite.best(torch.ones(tokens, 1, device=DEVICE), 1, 70)[1].tolist() == [[0]] * tokens


def test_many_blocks_are_merged_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest column among equals that are 16 blocks apart, be it of the blocks for one token or for two."""
    monkeypatch.setattr(vocabulary, "_MERGED", 16)
    weight = normal(1500, 8).round_()
    weight[[45, 45 + 16 * 16, 45 + 16 * 64]] = 9.0
    x = torch.ones(2, 8, device=DEVICE)
    for tokens in (1, 2):
        values, picked = VocabularyHead(weight).best(x[:tokens], 1, 1500)
        wanted = best_of(weight.sum(dim=1)[None].expand(tokens, -1), 1)
        assert torch.equal(values.cpu(), wanted[0])
        assert torch.equal(picked.cpu(), wanted[1])


def test_no_logits_are_written_for_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = VocabularyHead(normal(640, 16)), normal(2, 16, seed=1)
    made: list[int] = []
    new_empty = Tensor.new_empty

    def counted(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = new_empty(self, *args, **kwargs)
        made.append(out.numel())
        return out

    monkeypatch.setattr(Tensor, "new_empty", counted)
    head.best(x, 1, 640)
    assert 0 < sum(made) < 640


def test_top_is_stable() -> None:
    for seed, (rows, columns) in enumerate([(1, 1), (3, 9), (4, 200)]):
        scores = (3 * normal(rows, columns, seed=seed)).round_()
        for count in sorted({1, columns // 2 + 1, columns}):
            values, picked = top(scores, count)
            wanted = best_of(scores, count)
            assert torch.equal(values.cpu(), wanted[0])
            assert torch.equal(picked.cpu(), wanted[1])


def test_no_tokens() -> None:
    head, x = VocabularyHead(normal(5, 4)), normal(0, 4)
    assert head.logits(x).shape == (0, 5)
    assert [t.shape for t in head.best(x, 1, 5)] == [(0, 1)] * 2
    assert [t.shape for t in head.best(x, 3, 5)] == [(0, 3)] * 2
    assert VocabularyHead(normal(0, 4)).logits(normal(2, 4)).shape == (2, 0)


def test_the_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device in a graph, which fails where it would be; elsewhere what would wait for it is not called."""
    head = VocabularyHead(torch.ones(30, 16, device=DEVICE))
    for tokens in (1, 2):
        x = torch.ones(tokens, 16, device=DEVICE)
        expected = head.logits(x), *head.best(x, 1, 30), *head.best(x, 5, 30), *top(head.logits(x), 5)
        if CUDA:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = head.logits(x), *head.best(x, 1, 30), *head.best(x, 5, 30), *top(head.logits(x), 5)
            graph.replay()
        else:
            with monkeypatch.context() as patch:
                for name in ("item", "tolist", "nonzero", "cpu", "__bool__", "__int__", "__float__", "__index__"):
                    patch.setattr(Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} waits for the device"))
                got = head.logits(x), *head.best(x, 1, 30), *head.best(x, 5, 30), *top(head.logits(x), 5)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)

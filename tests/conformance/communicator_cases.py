"""What every communicator must do, as functions that each rank of any backend runs.

Inputs follow from the rank by a formula, so that every rank computes what it must get from all ranks' inputs by itself.
Values are never zero and their sums are exact in float32, so results are compared bit for bit; in half precision the sums
need rounding, so that adding in half precision shows.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from collectives.checked import Checked
from collectives.communicator import CollectiveError, Communicator
from collectives.staged import Staged
from collectives.traced import Call, Traced

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int8)
SHAPES: tuple[tuple[int, ...], ...] = ((0,), (1,), (7,), (70001,), (3, 5), (0, 4), (2, 3, 4))
_MANTISSA = {torch.float32: 12, torch.bfloat16: 8, torch.float16: 11}
_SENTINEL = 93
LARGE = 10000  # elements; above it not every variation is tried


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> Tensor:
    """Rank's input: no zeros, both signs, different on each rank."""
    return _values(rank, shape, dtype, salt).clone()


@cache
def _values(rank: int, shape: tuple[int, ...], dtype: torch.dtype, salt: int) -> Tensor:
    k = torch.arange(prod(shape), dtype=torch.int64)
    hashed = k * 0x9E3779B1 + (rank + 31 * salt) * 0x85EBCA6B + 12345
    sign = 1 - 2 * ((k + rank) % 2)
    if dtype in _MANTISSA:
        whole = (hashed % (2 ** _MANTISSA[dtype] - 1) + 1) * sign
        return (whole.double() * 2.0 ** ((k + 2 * rank) % 5 - 6).double()).to(dtype).reshape(shape)
    if dtype == torch.int64:  # more bits than a double has
        return (((hashed % 2**48) * 2**12 + 2 * (k % 512) + 1) * sign).reshape(shape)
    return ((hashed % (31 if dtype == torch.int8 else 2**28) + 1) * sign).to(dtype).reshape(shape)


def added(tensors: Sequence[Tensor]) -> Tensor:
    """The sum, rounded once to the dtype of the tensors."""
    dtype = tensors[0].dtype
    wide = torch.stack([t.to(torch.float64 if dtype.is_floating_point else torch.int64) for t in tensors])
    return wide.sum(0).to(dtype)


def strided(x: Tensor) -> tuple[Tensor, Tensor]:
    """(a view with gaps that equals x, all of its memory, which holds the sentinel in the gaps)."""
    memory = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), _SENTINEL, dtype=x.dtype)
    view = memory[..., 1::2]
    view.copy_(x)
    return view, memory


def same(found: Tensor, expected: Tensor, *where: object) -> None:
    assert found.dtype == expected.dtype, (*where, found.dtype, expected.dtype)
    assert tuple(found.shape) == tuple(expected.shape), (*where, found.shape, expected.shape)
    assert torch.equal(found, expected), (*where, found.flatten()[:8], expected.flatten()[:8])


def all_reduce(comm: Communicator, shared: Path) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            expected = added([values(r, shape, dtype) for r in range(comm.size)])
            x = values(comm.rank, shape, dtype)
            assert comm.all_reduce(x) is x
            same(x, expected, dtype, shape)
            if prod(shape) > LARGE:
                continue
            view, memory = strided(values(comm.rank, shape, dtype))
            assert comm.all_reduce(view) is view
            same(view, expected, "strided", dtype, shape)
            assert bool((memory[..., 0::2] == _SENTINEL).all()), "a reduce wrote between the elements of a strided tensor"


def all_reduce_gives_all_ranks_the_same_bits(comm: Communicator, shared: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(4099, generator=torch.Generator().manual_seed(71 + r)).to(dtype) for r in range(comm.size)]
        x = comm.all_reduce(inputs[comm.rank].clone())
        rows = comm.all_gather(x[None])
        same(rows, x.expand(comm.size, -1), dtype)
        assert torch.allclose(x.double(), torch.stack(inputs).double().sum(0), rtol=1e-2, atol=2e-2)


def halves_are_rounded_once(comm: Communicator, shared: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        inputs = [values(r, (1001,), dtype, salt=5) for r in range(comm.size)]
        chained = inputs[0]
        for x in inputs[1:]:
            chained = chained + x
        assert comm.size < 3 or not torch.equal(chained, added(inputs)), "these inputs cannot tell one rounding from many"
        same(comm.all_reduce(inputs[comm.rank].clone()), added(inputs), dtype)
        inputs = [values(r, (comm.size * 251,), dtype, salt=6) for r in range(comm.size)]
        same(comm.reduce_scatter(inputs[comm.rank]), added(inputs).chunk(comm.size)[comm.rank], dtype)


def all_gather(comm: Communicator, shared: Path) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            for dim in {0, len(shape) - 1, -1} if prod(shape) < LARGE else {0}:
                expected = torch.cat([values(r, shape, dtype) for r in range(comm.size)], dim)
                x = values(comm.rank, shape, dtype)
                same(comm.all_gather(x, dim), expected, dtype, shape, dim)
                same(x, values(comm.rank, shape, dtype), "the input")
                same(comm.all_gather(strided(x)[0], dim), expected, "strided", dtype, shape, dim)
                if len(shape) == 2:
                    same(comm.all_gather(x.t().contiguous().t(), dim), expected, "transposed", dtype, shape, dim)


def all_gather_of_uneven_sizes(comm: Communicator, shared: Path) -> None:
    for dtype in DTYPES:
        for pattern in ((3, 0, 5, 1), (0, 4, 4, 2), (0, 0, 0, 0), (2, 2, 2, 2), (70001, 3, 1, 69999)):
            sizes = pattern[: comm.size]
            for dim in (0, 1):
                if max(sizes) > 100 and (dim == 1 or dtype not in (torch.bfloat16, torch.int64)):
                    continue
                shapes = [(n, 2) if dim == 0 else (2, n) for n in sizes]
                expected = torch.cat([values(r, shapes[r], dtype) for r in range(comm.size)], dim)
                x = values(comm.rank, shapes[comm.rank], dtype)
                same(comm.all_gather(x, dim, sizes), expected, dtype, sizes, dim)
                same(comm.all_gather(strided(x)[0], dim, list(sizes)), expected, "strided", dtype, sizes, dim)


def reduce_scatter(comm: Communicator, shared: Path) -> None:
    n = comm.size
    for dtype in DTYPES:
        for shape, dim in (((0,), 0), ((n,), 0), ((5 * n,), 0), ((17501 * n,), 0), ((3 * n, 5), 0), ((5, 3 * n), 1), ((0, n), 1)):
            expected = added([values(r, shape, dtype) for r in range(n)]).chunk(n, dim) if prod(shape) else None
            part = tuple(length // n if d == dim else length for d, length in enumerate(shape))
            mine = expected[comm.rank] if expected is not None else torch.empty(part, dtype=dtype)
            x = values(comm.rank, shape, dtype)
            same(comm.reduce_scatter(x, dim), mine, dtype, shape, dim)
            same(x, values(comm.rank, shape, dtype), "the input")
            same(comm.reduce_scatter(strided(x)[0], dim), mine, "strided", dtype, shape, dim)


def broadcast(comm: Communicator, shared: Path) -> None:
    for src in range(comm.size):
        for dtype in DTYPES:
            for shape in SHAPES:
                x = values(comm.rank, shape, dtype, salt=src)
                assert comm.broadcast(x, src) is x
                same(x, values(src, shape, dtype, salt=src), dtype, shape, src)
            view, memory = strided(values(comm.rank, (3, 5), dtype))
            assert comm.broadcast(view, src=src) is view
            same(view, values(src, (3, 5), dtype), "strided", dtype, src)
            assert bool((memory[..., 0::2] == _SENTINEL).all())


def all_to_all(comm: Communicator, shared: Path) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            if prod(shape) > LARGE and dtype not in (torch.bfloat16, torch.int64):
                continue
            for make in (lambda x: x, lambda x: strided(x)[0]):
                sent = [make(values(comm.rank, shape, dtype, salt=to + 1)) for to in range(comm.size)]
                got = comm.all_to_all(sent)
                assert isinstance(got, list)
                assert len(got) == comm.size
                for source, x in enumerate(got):
                    same(x, values(source, shape, dtype, salt=comm.rank + 1), dtype, shape, source)


def barrier(comm: Communicator, shared: Path) -> None:
    """Nobody leaves before everybody came: each rank leaves a file before, and finds all of them after."""
    for turn in range(5):
        (shared / f"came-{turn}-{comm.rank}").touch()
        comm.barrier()
        assert {p.name for p in shared.glob(f"came-{turn}-*")} == {f"came-{turn}-{r}" for r in range(comm.size)}


def split(comm: Communicator, shared: Path) -> None:
    n = comm.size
    groups = [list(range(n)), list(range(0, n, 2)), list(range(1, n, 2)), [n - 1], list(range(n // 2 + 1)), list(range(n))]
    children = [(ranks, comm.split(ranks)) for ranks in groups if ranks]
    for ranks, child in children:
        assert (child is not None) == (comm.rank in ranks)
    for ranks, child in reversed(children):
        if child is None:
            continue
        assert (child.rank, child.size, child.device) == (ranks.index(comm.rank), len(ranks), comm.device)
        same(child.all_reduce(values(comm.rank, (9,), torch.bfloat16)), added([values(r, (9,), torch.bfloat16) for r in ranks]))
        expected = torch.cat([values(r, (2, 2), torch.int32) for r in ranks], 1)
        same(child.all_gather(values(comm.rank, (2, 2), torch.int32), 1), expected)
        same(child.broadcast(values(comm.rank, (3,), torch.int8), child.size - 1), values(ranks[-1], (3,), torch.int8))
        child.barrier()
    whole = children[0][1]
    assert whole is not None
    nested = whole.split([0])
    assert (nested is None) == (comm.rank != 0)
    if nested is not None:
        same(nested.all_reduce(values(3, (4,), torch.float32)), values(3, (4,), torch.float32))
    same(comm.all_reduce(values(comm.rank, (5,), torch.int32)), added([values(r, (5,), torch.int32) for r in range(n)]))


def refusals(comm: Communicator, shared: Path) -> None:
    """A ValueError on every rank that names the operation and the value; the communicator stays in order."""
    n, x = comm.size, values(comm.rank, (4, 3), torch.float32)
    with pytest.raises(ValueError, match=r"all_gather.*sizes"):
        comm.all_gather(x, 0, [4] * (n + 1))
    with pytest.raises(ValueError, match=r"all_gather.*sizes"):
        comm.all_gather(x, 1, [4] * n)
    if n > 1:
        with pytest.raises(ValueError, match=rf"reduce_scatter.*\({n + 1}, 2\).*{n}"):
            comm.reduce_scatter(values(comm.rank, (n + 1, 2), torch.float32))
        with pytest.raises(ValueError, match=r"split.*\[1, 0\]"):
            comm.split([1, 0])
    for src in (-1, n, n + 7):
        with pytest.raises(ValueError, match=f"broadcast.*{src}"):
            comm.broadcast(x.clone(), src)
    for parts in ([], [x] * (n + 1)):
        with pytest.raises(ValueError, match="all_to_all"):
            comm.all_to_all(parts)
    for ranks in ([], [0, 0], [-1], [n], [0, n + 100]):
        with pytest.raises(ValueError, match="split"):
            comm.split(ranks)
    same(comm.all_reduce(x), added([values(r, (4, 3), torch.float32) for r in range(n)]))


def other_dtypes(comm: Communicator, shared: Path) -> None:
    """Right, or refused with a ValueError on every rank; never a wrong number."""
    for dtype in (torch.float64, torch.int16, torch.uint8):
        raw = [(torch.arange(11) * 3 + 5 * r + 1).to(dtype) for r in range(comm.size)]
        try:
            found = comm.all_reduce(raw[comm.rank].clone())
        except ValueError:
            continue
        same(found, torch.stack(raw).sum(0).to(dtype), dtype)


def a_long_mixed_sequence(comm: Communicator, shared: Path) -> None:
    """The same random calls on every rank, without a pause between them."""
    random = torch.Generator().manual_seed(2024)
    for turn in range(120):
        op, length = (int(torch.randint(high, (), generator=random)) for high in (5, 9))
        mine = values(comm.rank, (length,), torch.bfloat16, salt=turn)
        all_of_them = [values(r, (length,), torch.bfloat16, salt=turn) for r in range(comm.size)]
        if op == 0:
            same(comm.all_reduce(mine), added(all_of_them), turn)
        elif op == 1:
            same(comm.all_gather(mine), torch.cat(all_of_them), turn)
        elif op == 2:
            same(comm.broadcast(mine, turn % comm.size), all_of_them[turn % comm.size], turn)
        elif op == 3:
            comm.barrier()
        else:
            same(torch.stack(comm.all_to_all([mine] * comm.size)), torch.stack(all_of_them), turn)


def traced_counts_calls_and_bytes(comm: Communicator, shared: Path) -> None:
    traced, n = Traced(comm), comm.size
    traced.all_reduce(values(comm.rank, (3, 5), torch.bfloat16))
    traced.all_gather(values(comm.rank, (7,), torch.int64), 0, [7] * n)
    traced.reduce_scatter(values(comm.rank, (2 * n,), torch.float32))
    traced.broadcast(values(comm.rank, (9,), torch.int8), n - 1)
    traced.all_to_all([values(comm.rank, (3,), torch.float16)] * n)
    traced.barrier()
    child = traced.split(range(n))
    assert child is not None
    child.all_reduce(values(comm.rank, (1,), torch.float32))
    traced.all_reduce(values(comm.rank, (0,), torch.float32))
    assert traced.calls == [
        Call("all_reduce", 30),
        Call("all_gather", 56),
        Call("reduce_scatter", 8 * n),
        Call("broadcast", 9),
        Call("all_to_all", 6 * n),
        Call("barrier", 0),
        Call("all_reduce", 4),
        Call("all_reduce", 0),
    ]


def checked_tells_who_disagrees(comm: Communicator, shared: Path) -> None:
    """Every rank gets the error, with what rank 0 and the odd one were about to do, and nothing hangs."""
    if comm.size == 1:
        return
    checked, odd = Checked(comm), comm.rank == comm.size - 1
    last = comm.size - 1
    x = values(comm.rank, (3, 5), torch.float32)
    with pytest.raises(CollectiveError, match=rf"rank 0: all_reduce.*rank {last}: barrier"):
        _ = checked.barrier() if odd else checked.all_reduce(x)
    with pytest.raises(CollectiveError, match=rf"rank 0: all_reduce\(\[3, 5\].*rank {last}: all_reduce\(\[5, 3\]"):
        checked.all_reduce(x.t() if odd else x)
    with pytest.raises(CollectiveError, match=rf"rank 0: all_gather\(.*float32.*rank {last}: all_gather\(.*bfloat16"):
        checked.all_gather(x.bfloat16() if odd else x)
    with pytest.raises(CollectiveError, match=rf"rank 0: broadcast\(.*, 0\).*rank {last}: broadcast\(.*, 1\)"):
        checked.broadcast(x, 1 if odd else 0)
    with pytest.raises(CollectiveError, match=rf"rank 0: reduce_scatter\(.*rank {last}: reduce_scatter\("):
        checked.reduce_scatter(values(comm.rank, (comm.size, comm.size), torch.float32), 1 if odd else 0)
    with pytest.raises(CollectiveError, match=rf"rank 0: split\(.*rank {last}: split\("):
        checked.split([1] if odd else [0])
    same(checked.all_reduce(x), added([values(r, (3, 5), torch.float32) for r in range(comm.size)]))


Case = Callable[[Communicator, Path], None]
CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        all_reduce,
        all_reduce_gives_all_ranks_the_same_bits,
        halves_are_rounded_once,
        all_gather,
        all_gather_of_uneven_sizes,
        reduce_scatter,
        broadcast,
        all_to_all,
        barrier,
        split,
        refusals,
        other_dtypes,
        a_long_mixed_sequence,
        traced_counts_calls_and_bytes,
        checked_tells_who_disagrees,
    )
}
WRAPPERS: dict[str, Callable[[Communicator], Communicator]] = {
    "plain": lambda c: c,
    "traced": Traced,
    "checked": Checked,
    "staged": lambda c: Staged(c, c.device),
}
PROCESS_SIZES = {"plain": (1, 2, 3, 4), "traced": (2,), "checked": (1, 2), "tree": (2, 3, 4)}

"""What TreeReduce must do beyond the cases of every communicator: each rank of any backend runs these, on a TreeReduce."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from communicator_cases import Case
from torch import Tensor

from collectives.communicator import Communicator
from collectives.tree import tree_sum

LEAVES = 8
LENGTHS = (0, 1, 17, 4099, 65_536, 65_537, 100_003)  # 256 KiB of float32, one element more, and a prime
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
TREES: dict[int, Callable[..., Tensor]] = {
    1: lambda a: a,
    2: lambda a, b: a + b,
    3: lambda a, b, c: (a + b) + c,
    4: lambda a, b, c, d: (a + b) + (c + d),
    5: lambda a, b, c, d, e: ((a + b) + (c + d)) + e,
    6: lambda a, b, c, d, e, f: ((a + b) + (c + d)) + (e + f),
    7: lambda a, b, c, d, e, f, g: ((a + b) + (c + d)) + ((e + f) + g),
    8: lambda a, b, c, d, e, f, g, h: ((a + b) + (c + d)) + ((e + f) + (g + h)),
}


def summands(count: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Numbers of very different sizes, so that most sums depend on the order, among them zeros of both signs."""
    return list(_summands(count, length).to(dtype, copy=True).unbind())


@cache
def _summands(count: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(97 * count + length)
    x = torch.randn(count, length, generator=generator, dtype=torch.float64)
    x *= 2.0 ** torch.randint(-12, 4, (count, length), generator=generator)
    x[:, ::13] *= 0.0
    return x


def by_hand(tensors: Sequence[Tensor]) -> Tensor:
    """The sum along the tree, in the dtype of the tensors: halves in float32, rounded once."""
    dtype = tensors[0].dtype
    wide = [x.double() if dtype == torch.float64 else x.float() for x in tensors]
    return TREES[len(wide)](*wide).to(dtype)


def same_bits(found: Tensor, expected: Tensor, *where: object) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
    bits = BITS[found.dtype]
    assert torch.equal(found.contiguous().view(bits), expected.contiguous().view(bits)), (*where, found - expected)


def eight_leaves_give_the_bits_of_one_rank(comm: Communicator, shared: Path) -> None:
    """Wherever the leaves lie, for 1, 2, 4 and 8 ranks; three times, since a sum must not depend on when it is taken."""
    if LEAVES % comm.size:
        return
    own = LEAVES // comm.size
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for length in LENGTHS:
            leaves = summands(LEAVES, length, dtype)
            for _ in range(3):
                found = comm.all_reduce(tree_sum(leaves[comm.rank * own : (comm.rank + 1) * own]))
                same_bits(found, tree_sum(leaves), dtype, length)


def all_reduce_follows_the_tree(comm: Communicator, shared: Path) -> None:
    for dtype in BITS:
        for length in LENGTHS:
            inputs = summands(comm.size, length, dtype)
            x = inputs[comm.rank].clone()
            assert comm.all_reduce(x) is x
            same_bits(x, by_hand(inputs), dtype, length)
    inputs = summands(comm.size, 90_000, torch.float32)
    turned = inputs[comm.rank].clone().view(300, 300).t()
    same_bits(comm.all_reduce(turned), by_hand(inputs).view(300, 300).t(), "transposed")


def the_bits_of_an_element_do_not_depend_on_its_neighbours(comm: Communicator, shared: Path) -> None:
    for dtype in BITS:
        inputs = summands(comm.size, 150_011, dtype)
        whole = comm.all_reduce(inputs[comm.rank].clone())
        cuts = (0, 1, 3, 16_390, 16_391, 90_000, 150_011)
        same_bits(torch.cat([comm.all_reduce(inputs[comm.rank][a:b].clone()) for a, b in pairwise(cuts)]), whole, dtype)


def reduce_scatter_gives_the_parts_of_all_reduce(comm: Communicator, shared: Path) -> None:
    for dtype in BITS:
        for part in (0, 1, 5, 30_011):
            inputs = [x.view(3, comm.size * part) for x in summands(comm.size, 3 * comm.size * part, dtype)]
            expected = by_hand(inputs).narrow(1, comm.rank * part, part)
            same_bits(comm.reduce_scatter(inputs[comm.rank], 1), expected, dtype, part)


def those_split_off_follow_the_tree_of_their_ranks(comm: Communicator, shared: Path) -> None:
    ranks = list(range(comm.size))[-4:]
    child = comm.split(ranks)
    if child is not None:
        inputs = summands(len(ranks), 4099, torch.float32)
        same_bits(child.all_reduce(inputs[child.rank].clone()), by_hand(inputs))


TREE_CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        eight_leaves_give_the_bits_of_one_rank,
        all_reduce_follows_the_tree,
        the_bits_of_an_element_do_not_depend_on_its_neighbours,
        reduce_scatter_gives_the_parts_of_all_reduce,
        those_split_off_follow_the_tree_of_their_ranks,
    )
}

"""Sums along the tree: the suite and the tree's own cases over TreeReduce, as threads; for processes see test_processes.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from communicator_cases import CASES
from test_communicators import raise_first, run_threads
from tree_cases import TREE_CASES, TREES, by_hand, same_bits, summands

from collectives.communicator import Communicator
from collectives.loopback import loopback
from collectives.tree import TreeReduce, tree_sum
from collectives.wrapped import Wrapped

ALL_CASES = CASES | TREE_CASES


@pytest.mark.parametrize("count", TREES)
def test_tree_sum_adds_along_the_tree(count: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensors = summands(count, 4099, dtype)
        before = [x.clone() for x in tensors]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found = tree_sum(tensors)
        same_bits(found, by_hand([x.to(wide) for x in tensors]), dtype)
        found.fill_(93.0)
        for x, old in zip(tensors, before, strict=True):
            same_bits(x, old, "an input was changed")


def test_these_summands_tell_the_tree_from_the_order_of_the_ranks() -> None:
    for count in range(4, 9):
        tensors = summands(count, 4099, torch.float32)
        chained = tensors[0]
        for x in tensors[1:]:
            chained = chained + x
        assert int((chained != tree_sum(tensors)).sum()) > 400


def test_the_sum_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="tree_sum: needs at least one tensor"):
        tree_sum([])


@pytest.mark.parametrize("case", ALL_CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_loopback(size: int, case: str, tmp_path: Path) -> None:
    raise_first(run_threads([TreeReduce(c) for c in loopback(size, timeout=30.0)], lambda comm: ALL_CASES[case](comm, tmp_path)))


@pytest.mark.parametrize("case", TREE_CASES)
@pytest.mark.parametrize("size", [5, 6, 7, 8])
def test_loopback_of_more_ranks(size: int, case: str, tmp_path: Path) -> None:
    raise_first(run_threads([TreeReduce(c) for c in loopback(size, timeout=30.0)], lambda comm: TREE_CASES[case](comm, tmp_path)))


class _CutsOffHalves(Wrapped):
    """A backend that rounds sums of halves towards zero."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        bits = self.inner.all_reduce(x.float()).view(torch.int32)
        return x.copy_((bits & -65536).view(torch.float32))

    def _before(self, op: str, tensors: Sequence[torch.Tensor], choice: Any = None) -> None:
        pass

    def _around(self, child: Communicator) -> "_CutsOffHalves":
        return _CutsOffHalves(child)


def test_halves_of_two_ranks_are_rounded_alike_over_a_backend_that_rounds_in_its_own_way() -> None:
    inputs = summands(2, 4099, torch.bfloat16)
    expected = by_hand(inputs)

    def call(comm: Communicator) -> None:
        assert not torch.equal(comm.all_reduce(inputs[comm.rank].clone()), expected)
        same_bits(TreeReduce(comm).all_reduce(inputs[comm.rank].clone()), expected)

    raise_first(run_threads([_CutsOffHalves(c) for c in loopback(2, timeout=30.0)], call))

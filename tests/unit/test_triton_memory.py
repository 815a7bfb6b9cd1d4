"""That kernels in Triton's interpreter are watched: what they read or write beside the tensors they were given is an error."""

import pytest
import torch
import triton
import triton.language as tl
import triton_helper  # noqa: F401 - before triton
from triton.runtime.errors import InterpreterError


@triton.jit
def _move(x_ptr, y_ptr, first, count, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    inside = at < first + count
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=inside, other=0), mask=inside)


@triton.jit
def _count(x_ptr, at):
    tl.atomic_add(x_ptr + at, 1)


@pytest.mark.parametrize(("sizes", "first"), [((7, 9), 0), ((9, 7), 0), ((8, 9), -1), ((9, 8), 3)])
def test_what_lies_outside_is_told(sizes: tuple[int, int], first: int) -> None:
    x, y = (torch.zeros(n, dtype=torch.int32) for n in sizes)
    count = min(sizes) - max(first, 0)
    _move[(1,)](x, y, max(first, 0), count, BLOCK=16)
    with pytest.raises(InterpreterError, match=r"1 of 16 places are outside"):
        _move[(1,)](x, y, first, count + 1, BLOCK=16)


def test_so_are_sums_in_place() -> None:
    x = torch.zeros(4, dtype=torch.int32)
    _count[(3,)](x, 3)
    assert x.tolist() == [0, 0, 0, 3]
    with pytest.raises(InterpreterError, match="1 of 1 places are outside"):
        _count[(1,)](x, 4)

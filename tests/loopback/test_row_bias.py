"""Parallel linear layers equal the dense one: a bias of a row linear is added once, whatever the world size."""

import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from collectives.communicator import Communicator
from collectives.loopback import loopback
from qtp.kernels.native_kernels import NativeKernels
from qtp.layout.coverage import boxes, check_covered
from qtp.layout.split import Box, Even, Grid, OfRows, Split

TOKENS, IN, OUT = 3, 21, 13


def drawn(*shape: int, seed: int) -> Tensor:
    """Random and away from zero, so that a term that is lost or added twice shows."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x + 0.5 * x.sign()


def cut(x: Tensor, box: Box) -> Tensor:
    return x[tuple(slice(r.start, r.stop) for r in box)]


def shards(x: Tensor, split: Split, size: int) -> list[Tensor]:
    grid = Grid.of(size)
    check_covered(tuple(x.shape), split, grid)
    return [cut(x, box).contiguous() for box in boxes(tuple(x.shape), split, grid)]


def on_ranks(size: int, call: object) -> list[Tensor]:
    results: list[Tensor | BaseException] = [RuntimeError("hangs")] * size

    def run(comm: Communicator) -> None:
        try:
            results[comm.rank] = call(comm)  # type: ignore[operator]
        except BaseException as error:
            results[comm.rank] = error

    threads = [threading.Thread(target=run, args=(comm,), daemon=True) for comm in loopback(size, timeout=30.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("inputs", [IN, 5])
def test_row_linear(size: int, inputs: int) -> None:
    x, weight, bias = drawn(TOKENS, inputs, seed=1), drawn(OUT, inputs, seed=2), drawn(OUT, seed=3)
    xs, weights = shards(x, Even(1), size), shards(weight, Even(1), size)
    biases = shards(bias, OfRows(Even(1), (OUT, inputs), once=True), size)

    def rank(comm: Communicator) -> Tensor:
        own = biases[comm.rank]
        return comm.all_reduce(NativeKernels().linear(weights[comm.rank], own if own.numel() else None)(xs[comm.rank]))

    for found in on_ranks(size, rank):
        torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", range(1, 9))
def test_column_linear(size: int) -> None:
    x, weight, bias = drawn(TOKENS, IN, seed=4), drawn(OUT, IN, seed=5), drawn(OUT, seed=6)
    weights, biases = shards(weight, Even(0), size), shards(bias, Even(0), size)
    sizes = [len(w) for w in weights]

    def rank(comm: Communicator) -> Tensor:
        return comm.all_gather(NativeKernels().linear(weights[comm.rank], biases[comm.rank])(x), 1, sizes)

    for found in on_ranks(size, rank):
        torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", range(1, 9))
def test_column_then_row_linear_reduces_once(size: int) -> None:
    """The two halves of an MLP: what the first gives a rank is what the second takes there."""
    x, up, down = drawn(TOKENS, 7, seed=7), drawn(IN, 7, seed=8) / 4, drawn(OUT, IN, seed=9) / 4
    up_bias, down_bias = drawn(IN, seed=10), drawn(OUT, seed=11)
    ups, up_biases = shards(up, Even(0), size), shards(up_bias, Even(0), size)
    downs, down_biases = shards(down, Even(1), size), shards(down_bias, OfRows(Even(1), (OUT, IN), once=True), size)

    def rank(comm: Communicator) -> Tensor:
        middle = F.silu(NativeKernels().linear(ups[comm.rank], up_biases[comm.rank])(x))
        own = down_biases[comm.rank]
        return comm.all_reduce(NativeKernels().linear(downs[comm.rank], own if own.numel() else None)(middle))

    expected = F.linear(F.silu(F.linear(x, up, up_bias)), down, down_bias)
    for found in on_ranks(size, rank):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

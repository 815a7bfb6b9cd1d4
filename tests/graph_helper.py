"""CUDA graphs for tests: the real ones on a card, and a stand-in on the CPU that holds to their rules.

The stand-in notes what torch's operations and kernels in Triton's interpreter work on while its thread captures. A replay does
the same to the same memory: numbers that the host had then stay as they were. What waits for the device cannot be captured.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton_helper import DEVICE, interpreter

from collectives.wrapped import Wrapped

_launch = interpreter.GridExecutor.__call__
_here = threading.local()  # graph: the StandIn that this thread captures


class StandIn:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []
        self.made: list[Tensor] = []
        self.replays = 0

    @contextmanager
    def capture(self) -> Iterator[None]:
        _here.graph = self
        try:
            with _Noting(self):
                yield
        finally:
            _here.graph = None

    def reset(self) -> None:
        self.steps, self.made = [], []

    def replay(self) -> None:
        """What the graph itself makes is poisoned first: memory of a graph holds nothing from one replay to the next."""
        self.replays += 1
        for x in self.made:
            if x.numel():
                x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max if x.dtype != torch.bool else True)
        for step in self.steps:
            step()


def _noted(executor: Any, *args: Any, **kwargs: Any) -> None:
    graph = getattr(_here, "graph", None)
    if graph is not None:
        graph.steps.append(lambda: _launch(executor, *args, **kwargs))
    with _disable_current_modes():
        _launch(executor, *args, **kwargs)


interpreter.GridExecutor.__call__ = _noted


class InGraphs(Wrapped):
    """A communicator of threads whose sums, and gathers of equal shapes, can be part of a stand-in: up to `limit` bytes."""

    def __init__(self, inner: Any, limit: int = 1 << 30) -> None:
        super().__init__(inner)
        self.limit = limit

    def captures(self, nbytes: int) -> bool:
        return nbytes <= self.limit

    def all_reduce(self, x: Tensor) -> Tensor:
        graph = getattr(_here, "graph", None)
        if graph is not None:
            graph.steps.append(lambda: self.inner.all_reduce(x))
        with _disable_current_modes():
            return self.inner.all_reduce(x)

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        graph = getattr(_here, "graph", None)
        with _disable_current_modes():
            found = self.inner.all_gather(x, dim, sizes)
        if graph is not None:
            assert sizes is None
            assert found.nbytes <= self.limit
            graph.steps.append(lambda: found.copy_(self.inner.all_gather(x, dim)))
            graph.made.append(found)
        return found

    def _before(self, op: str, tensors: Sequence[Tensor], choice: Any = None) -> None:
        assert getattr(_here, "graph", None) is None, f"{op} inside a graph"

    def _around(self, child: Any) -> "InGraphs":
        return InGraphs(child, self.limit)


class _Noting(TorchDispatchMode):
    def __init__(self, graph: StandIn) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags), func
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        fresh = [x.untyped_storage().data_ptr() not in given for x in results]

        def again() -> None:
            others = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for x, other, new in zip(results, others, fresh, strict=True):
                if new:
                    x.copy_(other)

        self.graph.steps.append(again)
        self.graph.made += [x for x, new in zip(results, fresh, strict=True) if new]
        return found


def stand_in(patch: pytest.MonkeyPatch) -> list[StandIn]:
    """What torch.cuda has of graphs works on the CPU while `patch` lasts. Returns those that are captured."""
    captured: list[StandIn] = []

    @contextmanager
    def graph(cuda_graph: StandIn, pool: Any = None, **kwargs: Any) -> Iterator[None]:
        with cuda_graph.capture():
            yield
        captured.append(cuda_graph)

    patch.setattr(torch.cuda, "CUDAGraph", StandIn)
    patch.setattr(torch.cuda, "graph", graph)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    patch.setattr(torch.cuda, "synchronize", lambda *args: None)
    patch.setattr(torch.cuda, "Event", Mock)
    return captured


def replayed(call: Callable[[], Any]) -> Callable[[], Any]:
    """A graph that holds `call`; what is called gives what `call` gave, which each replay overwrites."""
    call()
    graph: Any = StandIn() if DEVICE.type == "cpu" else torch.cuda.CUDAGraph()
    with graph.capture() if isinstance(graph, StandIn) else torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay

"""CUDA graphs for tests: the real ones on a card, and a stand-in on the CPU that holds to their rules.

The stand-in notes what torch's operations and kernels in Triton's interpreter work on while it captures. A replay does the same
to the same memory: numbers that the host had then stay as they were. What waits for the device cannot be captured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton_helper import DEVICE, interpreter


class StandIn:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []
        self.made: list[Tensor] = []
        self.replays = 0

    @contextmanager
    def capture(self) -> Iterator[None]:
        steps, launch = self.steps, interpreter.GridExecutor.__call__

        def noted(executor: Any, *args: Any, **kwargs: Any) -> None:
            steps.append(lambda: launch(executor, *args, **kwargs))
            with _disable_current_modes():
                launch(executor, *args, **kwargs)

        with _CAPTURES:
            interpreter.GridExecutor.__call__ = noted
            try:
                with _Noting(self):
                    yield
            finally:
                interpreter.GridExecutor.__call__ = launch

    def replay(self) -> None:
        """What the graph itself makes is poisoned first: memory of a graph holds nothing from one replay to the next."""
        self.replays += 1
        for x in self.made:
            if x.numel():
                x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max if x.dtype != torch.bool else True)
        for step in self.steps:
            step()


_CAPTURES = RLock()


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

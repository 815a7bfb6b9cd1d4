"""CUDA graphs of decode steps: what takes hundreds of launches is one. S sequences in a step, D hidden."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qtp.batch import Batch, DeviceTables
from qtp.models import Qwen2ForCausalLM

Found = tuple[Tensor, Tensor]
_FEW = (1, 2, 4, 8)
_APART = 16
_LARGEST = 512


def buckets(most: int) -> tuple[int, ...]:
    """The batch sizes that graphs are captured for, so that every batch up to the last is at most twice as large, or 15 more, in
    the one it runs in."""
    largest = min(most, _LARGEST)
    return tuple(sorted({*(size for size in _FEW if size <= largest), *range(_APART, largest, _APART), largest}))


@dataclass(frozen=True, slots=True)
class _Captured:
    """What a graph leaves behind. found: the best value and column of this rank's vocabulary, None if it was not searched."""

    graph: torch.cuda.CUDAGraph
    hidden_SD: Tensor
    found: Found | None


class DecodeGraphs:
    """One new token of each of up to `sizes[-1]` sequences.

    Captured at construction, collectives inside: all ranks construct it, and run it with the same sequences. allowed: columns of
    this rank's vocabulary that may be chosen, 0 where it has none. blocks: of the KV cache, which must not move any more. A
    bucket's rows that are not used have length 0 (`attention.decode`)."""

    def __init__(
        self,
        model: Qwen2ForCausalLM,
        sizes: Sequence[int],
        *,
        allowed: int,
        blocks: int,
        block_size: int,
        max_model_len: int,
        device: torch.device,
        progress: Callable[[Iterable[int]], Iterable[int]],
    ) -> None:
        self._model, self._sizes, self._allowed = model, tuple(sizes), allowed
        self._length, self._block_size = max_model_len, block_size
        most = self.most
        # tokens, positions, lengths, where tables begin; then the tables
        self._numbers = torch.zeros(4 * most + blocks, dtype=torch.int64, device=device)
        self._sent = torch.zeros(4 * most + blocks, dtype=torch.int64, pin_memory=True)
        model.rope.table(self._numbers[:1], max_model_len)
        self._graphs: dict[tuple[int, bool], _Captured] = {}
        pool: Any = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            for size in progress(sorted(sizes, reverse=True)):  # the largest first: the others fit into its memory
                self._capture(size, pool)

    @property
    def most(self) -> int:
        """Sequences of the largest bucket."""
        return self._sizes[-1]

    def run(self, steps: Sequence[tuple[int, int, Sequence[int]]], greedy: bool) -> tuple[Tensor, Found | None]:
        """From (token, position, block table) of each sequence to its rows of hidden_SD and, if `greedy`, of the best value and
        column of this rank's vocabulary (None if it has none). They are overwritten by the next run."""
        count, block_size = len(steps), self._block_size
        size = self._size(count)
        idle = (0,) * (size - count)
        tokens, positions, tables = zip(*steps, strict=True)
        needed = [position // block_size + 1 for position in positions]
        starts = [0, *accumulate(needed)]
        numbers = array("q", tokens)
        for part in (idle, positions, idle, (position + 1 for position in positions), idle, starts[:-1], idle):
            numbers.extend(part)
        for table, length in zip(tables, needed, strict=True):
            numbers.extend(table[:length])
        self._sent[: len(numbers)].copy_(torch.frombuffer(numbers, dtype=torch.int64))
        self._numbers[: len(numbers)].copy_(self._sent[: len(numbers)], non_blocking=True)
        captured = self._graphs[size, greedy]
        captured.graph.replay()
        found = captured.found
        return captured.hidden_SD[:count], None if found is None else (found[0][:count], found[1][:count])

    def replay(self, count: int) -> None:
        """The last greedy step of so many sequences once more, for measuring: it writes what it wrote."""
        self._graphs[self._size(count), True].graph.replay()

    def _size(self, count: int) -> int:
        return next(size for size in self._sizes if size >= count)

    def _batch(self, size: int) -> Batch:
        tokens, positions, lens_S, starts_S = self._numbers[: 4 * size].view(4, size).unbind()
        tables = DeviceTables(lens_S=lens_S, starts_S=starts_S, blocks=self._numbers[4 * size :])
        return Batch(
            token_ids_T=tokens,
            positions_T=positions,
            slots_T=positions,  # the kernel finds them by itself
            query_lens=(1,) * size,
            kv_lens=(self._length,) * size,
            tables=(),
            num_decodes=size,
            on_device=tables,
        )

    def _capture(self, size: int, pool: Any) -> None:
        batch, model = self._batch(size), self._model
        for greedy in (True, False):

            def step(search: bool = greedy) -> tuple[Tensor, Found | None]:
                hidden_SD = model.hidden(batch)
                return hidden_SD, model.best(hidden_SD, 1, self._allowed) if search and self._allowed else None

            step()  # what is compiled or set up on first use cannot be captured
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                hidden_SD, found = step()
            self._graphs[size, greedy] = _Captured(graph, hidden_SD, found)

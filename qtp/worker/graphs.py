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

Choose = Callable[[tuple[Tensor, Tensor] | None, int], Tensor]
"""choose(found, S): the ids of S rows, as `Sampler.best_of_all`."""

_FEW = (1, 2, 4, 8)
_APART = 16
_LARGEST = 512
_ROWS = 5


def buckets(most: int) -> tuple[int, ...]:
    """The batch sizes that graphs are captured for, so that every batch up to the last is at most twice as large, or 15 more, in
    the one it runs in."""
    largest = min(most, _LARGEST)
    return tuple(sorted({*(size for size in _FEW if size <= largest), *range(_APART, largest, _APART), largest}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """One sequence's part in a decode step. token: its last one, at `position`, or None if that is what row `row` of the greedy
    step before found."""

    token: int | None
    row: int
    position: int
    table: Sequence[int]


class Told:
    """The ids that a greedy step found, on their way to the host."""

    def __init__(self, ids: Tensor, into: Tensor) -> None:
        self._ids, self._arrived = into, torch.cuda.Event()  # type: ignore[no-untyped-call]
        into.copy_(ids, non_blocking=True)
        self._arrived.record()

    def ids(self) -> list[int]:
        """Waits for the step, but for none that came after it."""
        self._arrived.synchronize()
        ids: list[int] = self._ids.tolist()
        return ids


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph and what it leaves behind."""

    graph: torch.cuda.CUDAGraph
    hidden_SD: Tensor


class DecodeGraphs:
    """One new token of each of up to `sizes[-1]` sequences.

    Captured at construction, collectives inside: all ranks construct it, and run it with the same sequences. A greedy step ends
    with the ids of its rows, on every rank. allowed: columns of this rank's vocabulary that may be chosen, 0 where it has none.
    blocks: of the KV cache, which must not move any more. A bucket's rows that are not used have length 0 (`attention.decode`).
    """

    def __init__(
        self,
        model: Qwen2ForCausalLM,
        sizes: Sequence[int],
        *,
        allowed: int,
        choose: Choose,
        blocks: int,
        block_size: int,
        max_model_len: int,
        device: torch.device,
        progress: Callable[[Iterable[int]], Iterable[int]],
    ) -> None:
        self._model, self._sizes, self._allowed, self._choose = model, tuple(sizes), allowed, choose
        self._length, self._block_size = max_model_len, block_size
        most = self.most
        # tokens, rows of the step before, positions, lengths, where tables begin; then the tables
        self._numbers = torch.zeros(_ROWS * most + blocks, dtype=torch.int64, device=device)
        self._ids, self._last = torch.zeros(2, most, dtype=torch.int64, device=device)
        # two of each: a step is prepared while the one before runs
        self._sent = torch.zeros(2, len(self._numbers), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._told = torch.zeros(2, most, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._turn = 0
        model.rope.table(self._numbers[:1], max_model_len)
        self._graphs: dict[tuple[int, bool], _Captured] = {}
        pool: Any = torch.cuda.graph_pool_handle()
        try:
            with torch.inference_mode():
                for size in progress(sorted(sizes, reverse=True)):  # the largest first: the others fit into its memory
                    self._capture(size, pool)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Frees the graphs, whoever still holds them: nccl's communicators end only when no graph holds their work."""
        for captured in self._graphs.values():
            captured.graph.reset()
        self._graphs.clear()

    @property
    def most(self) -> int:
        """Sequences of the largest bucket."""
        return self._sizes[-1]

    def run(self, steps: Sequence[Decode], greedy: bool) -> Tensor:
        """Starts a step; gives its rows of hidden_SD, which the next run overwrites. One may start while one runs, no more."""
        count, block_size = len(steps), self._block_size
        size = self._size(count)
        idle = (0,) * (size - count)
        needed = [step.position // block_size + 1 for step in steps]
        starts = [0, *accumulate(needed)]
        numbers = array("q")
        for part in (
            [0 if step.token is None else step.token for step in steps],
            [step.row if step.token is None else -1 for step in steps],
            [step.position for step in steps],
            [step.position + 1 for step in steps],
            starts[:-1],
        ):
            numbers.extend(part)
            numbers.extend(idle)
        for step, length in zip(steps, needed, strict=True):
            numbers.extend(step.table[:length])
        self._turn ^= 1
        sent = self._sent[self._turn, : len(numbers)]
        sent.copy_(torch.frombuffer(numbers, dtype=torch.int64))
        self._numbers[: len(numbers)].copy_(sent, non_blocking=True)
        captured = self._graphs[size, greedy]
        captured.graph.replay()
        return captured.hidden_SD[:count]

    def told(self, count: int) -> Told:
        """The ids that the greedy step just started finds."""
        return Told(self._last[:count], self._told[self._turn, :count])

    def replay(self, count: int) -> None:
        """The last greedy step of so many sequences once more, for measuring: it writes what it wrote."""
        self._graphs[self._size(count), True].graph.replay()

    def _size(self, count: int) -> int:
        return next(size for size in self._sizes if size >= count)

    def _batch(self, size: int) -> Batch:
        _, _, positions, lens_S, starts_S = self._numbers[: _ROWS * size].view(_ROWS, size).unbind()
        tables = DeviceTables(lens_S=lens_S, starts_S=starts_S, blocks=self._numbers[_ROWS * size :])
        return Batch(
            token_ids_T=self._ids[:size],
            positions_T=positions,
            slots_T=positions,  # the kernel finds them by itself
            query_lens=(1,) * size,
            kv_lens=(self._length,) * size,
            tables=(),
            num_decodes=size,
            on_device=tables,
        )

    def _capture(self, size: int, pool: Any) -> None:
        from qtp.kernels.triton.vocabulary import follow  # Triton is there on CUDA devices only

        batch, model, last = self._batch(size), self._model, self._last[:size]
        tokens, rows = self._numbers[: 2 * size].view(2, size).unbind()
        for greedy in (True, False):

            def step(search: bool = greedy) -> Tensor:
                follow(tokens, rows, self._last, batch.token_ids_T)
                hidden_SD = model.hidden(batch)
                if search:
                    found = model.best(hidden_SD, 1, self._allowed) if self._allowed else None
                    last.copy_(self._choose(found, size))
                return hidden_SD

            step()  # what is compiled or set up on first use cannot be captured
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    hidden_SD = step()
            except BaseException:
                graph.reset()
                raise
            self._graphs[size, greedy] = _Captured(graph, hidden_SD)

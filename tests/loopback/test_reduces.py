"""What a step costs in communication, counted: two all_reduces a block and nothing else inside it, one all_reduce for the
embedding, and one all_gather of (value, id) pairs for greedy sampling. Bytes are tokens x hidden x item size."""

from collections.abc import Callable
from typing import Any

import pytest
from batching_helper import on_threads, settled

from collectives.loopback import Loopback
from collectives.traced import Call, Traced
from qtp.wire.messages import Chunk, NewSequence, SamplingSpec, StepPlan
from qtp.worker.worker import Worker

HIDDEN, LAYERS, PAIR = 32, 2, 16
GREEDY = SamplingSpec()
GRIDS: list[tuple[str, int, dict[str, int]]] = [
    ("dense", 2, {}),
    ("dense", 3, {}),
    ("sliding", 4, {}),
    ("moe", 2, {"moe_ep": 2}),
    ("moe", 2, {"moe_tp": 2}),
    ("moe", 4, {"moe_ep": 2, "moe_tp": 2}),
    ("moe", 3, {"moe_ep": 3}),
]


def new(seq_id: int, *ids: int, sampling: SamplingSpec = GREEDY) -> NewSequence:
    return NewSequence(seq_id=seq_id, token_ids=ids, prompt_len=len(ids), sampling=sampling)


PREFILL = StepPlan(
    step=1,
    started=(new(0, 5, 6, 7, 8, 9), new(1, 1, 2, 3), new(2, *range(20, 31))),
    chunks=(
        Chunk(seq_id=0, start=0, count=5, sample=True, new_blocks=(0, 1)),
        Chunk(seq_id=1, start=0, count=3, sample=True, new_blocks=(2,)),
        Chunk(seq_id=2, start=0, count=6, sample=False, new_blocks=(3, 4)),
    ),
)
MIXED = StepPlan(
    step=2,
    chunks=(
        Chunk(seq_id=0, start=5, count=1, sample=True, appended=(40,)),
        Chunk(seq_id=1, start=3, count=1, sample=True, appended=(41,)),
        Chunk(seq_id=2, start=6, count=5, sample=True, new_blocks=(5,)),
    ),
)
DECODE = StepPlan(
    step=3,
    chunks=(
        Chunk(seq_id=0, start=6, count=1, sample=True, appended=(42,)),
        Chunk(seq_id=1, start=4, count=1, sample=True, appended=(43,), new_blocks=(6,)),
        Chunk(seq_id=2, start=11, count=1, sample=True, appended=(44,)),
    ),
)
SILENT = StepPlan(
    step=4,
    dropped=(0, 1),
    started=(new(3, 9, 8, 7, 6),),
    chunks=(Chunk(seq_id=3, start=0, count=3, sample=False, new_blocks=(7,)),),
)
FORGET = StepPlan(step=5, dropped=(2, 3))
STEPS = [(PREFILL, 14, 2), (MIXED, 7, 3), (DECODE, 3, 3), (SILENT, 3, 0)]


def traced_workers(
    kind: str, tp: int, choices: dict[str, Any], run: Callable[[Worker, Traced], list[list[Call]]]
) -> list[list[list[Call]]]:
    """Runs `run` on every rank with a worker over a traced communicator."""
    config, model = settled(kind, tp, block_size=4, num_kv_blocks=12, **choices)

    def body(comm: Loopback) -> list[list[Call]]:
        traced = Traced(comm)
        worker = Worker(config, model, traced)
        assert traced.calls == [], "loading communicates nothing"
        return run(worker, traced)

    return on_threads(tp, body)


def steps(worker: Worker, traced: Traced) -> list[list[Call]]:
    """The calls of each step."""
    counted = []
    for plan in [plan for plan, _, _ in STEPS] + [FORGET]:
        worker.execute(plan)
        counted.append(list(traced.calls))
        traced.calls.clear()
    return counted


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize(("kind", "tp", "grid"), GRIDS)
def test_calls_and_bytes_of_a_step(kind: str, tp: int, grid: dict[str, int], dtype: str, item: int) -> None:
    expected: list[list[Call]] = []
    for _, tokens, sampled in STEPS:
        calls = [Call("all_reduce", tokens * HIDDEN * item)] * (1 + 2 * LAYERS)
        expected.append(calls + [Call("all_gather", sampled * PAIR)] * (sampled > 0))
    expected.append([])
    for counted in traced_workers(kind, tp, {"dtype": dtype, **grid}, steps):
        assert counted == expected


@pytest.mark.parametrize(("kind", "tp", "grid"), GRIDS)
def test_a_block_reduces_twice_and_does_nothing_else(kind: str, tp: int, grid: dict[str, int]) -> None:
    def run(worker: Worker, traced: Traced) -> list[list[Call]]:
        inside: list[list[Call]] = []

        def watched(block: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                before = len(traced.calls)
                result = block(*args)
                inside.append(traced.calls[before:])
                return result

            return call

        worker.model.blocks = [watched(block) for block in worker.model.blocks]  # type: ignore[misc]
        worker.execute(PREFILL)
        worker.execute(MIXED)
        return inside

    due = [[Call("all_reduce", tokens * HIDDEN * 4)] * 2 for tokens in (14, 14, 7, 7)]
    for inside in traced_workers(kind, tp, grid, run):
        assert inside == due


@pytest.mark.parametrize(
    ("sampling", "width"),
    [
        (SamplingSpec(temperature=1.0, top_k=20, seed=3), 64 * PAIR),
        (SamplingSpec(temperature=1.0, seed=3), None),
        (SamplingSpec(logprobs=2), None),
        (SamplingSpec(repetition_penalty=1.5), PAIR),
    ],
    ids=["candidates", "full", "logprobs", "penalties"],
)
def test_sampling_gathers_once_and_no_more_than_it_needs(sampling: SamplingSpec, width: int | None) -> None:
    """width: bytes a row that each rank sends; None: its float32 logits."""
    plan = StepPlan(
        step=1,
        started=(new(0, 5, 6, 7, sampling=sampling), new(1, 8, 9, sampling=sampling)),
        chunks=(
            Chunk(seq_id=0, start=0, count=3, sample=True, new_blocks=(0,)),
            Chunk(seq_id=1, start=0, count=2, sample=True, new_blocks=(1,)),
        ),
    )

    def run(worker: Worker, traced: Traced) -> list[list[Call]]:
        worker.execute(plan)
        return [traced.calls[1 + 2 * LAYERS :]]

    parts = [33, 34, 34]
    for part, (calls,) in zip(parts, traced_workers("dense", 3, {}, run), strict=True):
        assert calls == [Call("all_gather", 2 * (part * 4 if width is None else width))]

"""A run is its plans: written to a file as frames and replayed on workers that no engine drives, they give the same tokens.

The run has chunked prefill, preemptions, an abort, sampling of all kinds and logprobs.
"""

import struct
from pathlib import Path
from random import Random

import pytest
from batching_helper import Job, blocks_for, make, on_threads, random_jobs, settled

from collectives.communicator import Communicator
from qtp.wire.codec import decode, encode
from qtp.wire.messages import StepPlan, StepResult
from qtp.worker.worker import Worker

CHOICES = {"block_size": 3, "max_num_batched_tokens": 11, "max_num_seqs": 5}
LENGTH = struct.Struct(">I")


def jobs() -> list[Job]:
    random = Random(77)
    made: list[Job] = []
    for params in (
        {},
        {"temperature": 1.0, "seed": 1, "n": 2},
        {"temperature": 0.8, "top_k": 12, "seed": 2, "frequency_penalty": 0.7},
        {"logprobs": 2, "prompt_logprobs": 3},
        {"repetition_penalty": 1.5, "min_tokens": 4, "stop_token_ids": [3, 14, 15]},
    ):
        made += random_jobs(random, 2, longest_prompt=17, longest_output=13, **{**params, "max_tokens": 13})
    return made


def record(kind: str, tp: int, blocks: int, file: Path) -> list[StepResult]:
    """Runs the jobs, writes every plan to `file` and returns rank 0's results."""
    results: list[StepResult] = []
    with make(kind, tp, num_kv_blocks=blocks, **CHOICES) as llm, file.open("wb") as stream:
        execute = llm.ranks.execute

        def recording(plan: StepPlan) -> StepResult:
            frame = encode(plan)
            stream.write(LENGTH.pack(len(frame)) + frame)
            results.append(execute(plan))
            return results[-1]

        llm.ranks.execute = recording  # type: ignore[method-assign]
        requests = [llm.engine.add(*job) for job in jobs()]
        while llm.engine.has_work:
            llm.engine.step()
            if len(results) == 6:
                llm.engine.abort(requests[1])
        assert llm.engine.scheduler.preemptions > 0
    return results


def read(file: Path) -> list[StepPlan]:
    plans, content = [], file.read_bytes()
    while content:
        (length,) = LENGTH.unpack(content[: LENGTH.size])
        plan = decode(content[LENGTH.size : LENGTH.size + length])
        assert isinstance(plan, StepPlan)
        plans.append(plan)
        content = content[LENGTH.size + length :]
    return plans


def replay(kind: str, tp: int, blocks: int, plans: list[StepPlan]) -> list[StepResult]:
    config, model = settled(kind, tp, num_kv_blocks=blocks, **CHOICES)

    def body(comm: Communicator) -> list[StepResult]:
        worker = Worker(config, model, comm)
        results = [worker.execute(plan) for plan in plans]
        assert not worker.sequences
        return results

    return on_threads(tp, body)[0]


def tokens(results: list[StepResult]) -> list[list[tuple[int, int | None]]]:
    return [[(sample.seq_id, sample.token) for sample in result.samples] for result in results]


@pytest.mark.parametrize(("kind", "tp", "other"), [("dense", 1, 3), ("dense", 2, 1), ("moe", 3, 2)])
def test_plans_can_be_replayed_from_a_file(kind: str, tp: int, other: int, tmp_path: Path) -> None:
    blocks = blocks_for(jobs(), CHOICES["block_size"]) + 2
    file = tmp_path / "plans"
    recorded = record(kind, tp, blocks, file)
    plans = read(file)
    assert len(plans) == len(recorded) > 20
    assert any(plan.dropped for plan in plans[:-1])
    assert len({token for step in tokens(recorded) for _, token in step}) > 20
    assert replay(kind, tp, blocks, plans) == recorded, "the same ranks: the same results to the last bit"
    assert tokens(replay(kind, other, blocks, plans)) == tokens(recorded), "other ranks: the same tokens"

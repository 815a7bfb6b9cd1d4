"""Continuous batching changes nothing: whatever arrives when, in chunks and blocks of any size, over any number of ranks,
through preemptions and beside aborted neighbours, each request gets the tokens that it gets alone. What was not written to
the KV cache is never read: here it is filled with NaN. Afterwards nothing is left over."""

from dataclasses import dataclass
from random import Random

import pytest
from batching_helper import SeenWorkers, blocks_for, idle, make, random_jobs, serve
from device_helper import CHOSEN

from qtp import LLM, SamplingParams
from qtp.engine.request import Sequence


@dataclass(frozen=True, kw_only=True)
class Case:
    """spare: KV blocks beyond the fewest; preempts: whether that must lead to preemptions."""

    kind: str = "dense"
    tp: int = 1
    block: int = 3
    chunk: int = 16
    seqs: int = 6
    spare: int = 1
    seed: int = 0
    preempts: bool = True


CASES = [
    Case(),
    Case(block=1, chunk=7, spare=3, seed=1),
    Case(block=16, chunk=64, spare=0, seed=2),
    Case(block=1, chunk=2, seqs=3, spare=0, seed=3),
    Case(block=3, chunk=1, seed=4, preempts=False),  # the oldest has the whole budget: nothing runs beside it
    Case(block=3, chunk=5, seqs=1, spare=0, seed=5, preempts=False),
    Case(tp=2, block=1, chunk=33, spare=2, seed=6),
    Case(tp=3, block=3, chunk=8, seqs=4, seed=7),
    Case(tp=3, block=16, chunk=64, seqs=8, spare=0, seed=8),
    Case(kind="sliding", block=3, chunk=6, seed=9),
    Case(kind="sliding", block=16, chunk=64, spare=0, seqs=9, seed=10),
    Case(kind="sliding", tp=3, block=1, chunk=20, spare=4, seed=11),
    Case(kind="moe", block=3, chunk=11, seed=12),
    Case(kind="moe", block=16, chunk=3, seqs=3, spare=0, seed=13),
    Case(kind="moe", tp=2, block=1, chunk=64, spare=5, seed=14),
    Case(kind="moe", tp=3, block=3, chunk=9, seqs=5, seed=15),
]


def alone(kind: str, jobs: list[tuple[list[int], SamplingParams]]) -> list[tuple[int, ...]]:
    """The tokens of each job run by itself on one rank, its prompt in one piece, with blocks to spare."""
    with make(kind, num_kv_blocks=16, block_size=32) as llm:
        tokens = [serve(llm, [job])[0].outputs[0].token_ids for job in jobs]
        assert llm.engine.scheduler.preemptions == 0
    return tokens


@pytest.mark.parametrize("kernels", CHOSEN.kernels)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}-tp{c.tp}-block{c.block}-chunk{c.chunk}-seqs{c.seqs}")
def test_tokens_do_not_depend_on_company(case: Case, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(case.seed)
    jobs = random_jobs(random, 10, longest_prompt=24, longest_output=12)
    expected = alone(case.kind, jobs)
    assert len({tokens[:2] for tokens in expected}) > 5, "the requests must tell one another apart"
    seen = SeenWorkers(monkeypatch, poison=True)
    with make(
        case.kind,
        case.tp,
        block_size=case.block,
        max_num_batched_tokens=case.chunk,
        max_num_seqs=case.seqs,
        num_kv_blocks=blocks_for(jobs, case.block) + case.spare,
        kernels=kernels,
    ) as llm:
        for _ in range(2):  # the second time over what the first left in the cache
            outputs = serve(llm, jobs, random)
            assert [output.outputs[0].token_ids for output in outputs] == expected
            assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
            assert idle(llm)
        assert (llm.engine.scheduler.preemptions > 0) == case.preempts
        assert len(seen.workers) == case.tp
        assert seen.forgot()


@pytest.mark.parametrize("seed", range(12))
def test_random_settings(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(100 + seed)
    kind, block = random.choice(("dense", "sliding", "moe")), random.choice((1, 2, 3, 5, 16))
    jobs = random_jobs(random, random.randint(6, 14), longest_prompt=random.choice((3, 12, 40)), longest_output=20)
    expected = alone(kind, jobs)
    seen = SeenWorkers(monkeypatch, poison=True)
    with make(
        kind,
        block_size=block,
        max_num_batched_tokens=random.randint(4, 64),
        max_num_seqs=random.randint(3, 12),
        num_kv_blocks=blocks_for(jobs, block) + random.randint(0, 2),
    ) as llm:
        assert [output.outputs[0].token_ids for output in serve(llm, jobs, random)] == expected
        assert llm.engine.scheduler.preemptions > 0
        assert idle(llm)
        assert seen.forgot()


@pytest.mark.parametrize("kind", ["dense", "sliding"])
def test_short_beside_long_reads_nothing_unwritten(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two decoding sequences of very different lengths and a third that is prefilled meanwhile: the table of the short one
    is padded to the long one's, and most of its only block was never written."""
    greedy = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=6)
    random = Random(5)
    jobs = [([random.randrange(90) for _ in range(length)], greedy) for length in (2, 37, 29)]
    expected = alone(kind, jobs)
    SeenWorkers(monkeypatch, poison=True)
    with make(kind, block_size=16, num_kv_blocks=16, max_num_batched_tokens=10) as llm:
        assert [output.outputs[0].token_ids for output in serve(llm, jobs)] == expected


def state(llm: LLM, s: Sequence) -> str:
    """Where a sequence is in its life."""
    if s in llm.engine.scheduler.waiting:
        return "preempted" if s.preemptions else "waiting"
    assert s in llm.engine.scheduler.running
    return "decoding" if s.output_ids else "prefilling"


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("wanted", ["waiting", "prefilling", "decoding", "preempted"])
def test_abort_frees_everything_and_disturbs_nobody(wanted: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(21)
    jobs = [
        ([random.randrange(90) for _ in range(n)], SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=14))
        for n in (9, 8, 17)
    ]
    expected = alone("dense", jobs)
    seen = SeenWorkers(monkeypatch, poison=True)
    with make("dense", tp, block_size=2, num_kv_blocks=blocks_for(jobs, 2) + 3, max_num_batched_tokens=12, max_num_seqs=3) as llm:
        kept, victim = [llm.engine.add(*jobs[0])], 2
        if wanted == "preempted":
            victim = 1
            kept.append(llm.engine.add(*jobs[2]))
        else:
            kept.append(llm.engine.add(*jobs[1]))
        doomed = llm.engine.add(*jobs[victim])
        s = llm.engine.scheduler.waiting[-1]
        assert s.request.request_id == doomed
        outputs = {}
        for _ in range(60):
            if state(llm, s) == wanted:
                break
            outputs.update({output.request_id: output for output in llm.engine.step()})
        assert state(llm, s) == wanted
        assert (doomed in outputs) == (wanted in ("decoding", "preempted"))
        outputs.pop(doomed, None)
        free = llm.engine.pool.num_free
        held = len(s.blocks)
        assert (held > 0) == (wanted in ("prefilling", "decoding"))
        llm.engine.abort(doomed)
        assert llm.engine.pool.num_free == free + held
        llm.engine.abort(doomed)  # a second time is harmless
        while llm.engine.has_work:
            outputs.update({output.request_id: output for output in llm.engine.step()})
        places = [0, 2] if wanted == "preempted" else [0, 1]
        assert sorted(outputs) == kept
        assert [outputs[i].outputs[0].token_ids for i in kept] == [expected[p] for p in places]
        assert all(outputs[i].finished for i in kept)
        assert idle(llm)
        assert len(seen.workers) == tp
        assert seen.forgot()


def test_abort_of_all_in_all_states(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = SeenWorkers(monkeypatch)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=12, n=2)
    with make("dense", 2, block_size=2, num_kv_blocks=14, max_num_batched_tokens=9, max_num_seqs=4) as llm:
        requests = [llm.engine.add([3, 1, 4, 1, 5, 9, 2, 6], params) for _ in range(4)]
        states: set[str] = set()
        for _ in range(12):
            llm.engine.step()
            sequences = [*llm.engine.scheduler.running, *llm.engine.scheduler.waiting]
            states = {state(llm, s) for s in sequences}
            if states >= {"waiting", "preempted", "decoding"}:
                break
        assert states >= {"waiting", "preempted", "decoding"}
        for request in requests:
            llm.engine.abort(request)
        assert not llm.engine.has_work
        assert llm.engine.pool.num_free == llm.engine.pool.num_blocks
        assert llm.engine.step() == []  # tells the workers what to forget
        assert idle(llm)
        again = serve(llm, [([7, 8, 9], SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=5))])
        assert len(again[0].outputs[0].token_ids) == 5
        assert seen.forgot()


def test_stream_left_early_aborts_the_rest() -> None:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=20)
    with make("dense", block_size=4, num_kv_blocks=24) as llm:
        stream = llm.stream([(None, [5, 6, 7], params), (None, [8, 9], params)])
        assert not next(stream).finished
        stream.close()  # type: ignore[attr-defined]
        assert not llm.engine.has_work
        assert llm.engine.pool.num_free == 24

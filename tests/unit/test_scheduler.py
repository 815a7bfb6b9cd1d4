"""The scheduler against a stand-in for the workers, which knows of each sequence only what the plans told it.

The stand-in checks every plan: budgets, contiguous chunks, blocks that are enough and nobody else's, tokens sent exactly once.
"""

import random
from dataclasses import dataclass, field

import pytest

from qtp.engine.engine import Engine
from qtp.engine.request import Request, Sequence
from qtp.engine.sampling_params import SamplingParams
from qtp.engine.scheduler import Scheduler
from qtp.kv.blocks import BlockPool
from qtp.wire.messages import Sample, SamplingSpec, StepPlan, StepResult


@dataclass
class Known:
    """What a worker holds of a sequence."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


def next_token(tokens: list[int]) -> int:
    """A token that depends on all before it, so that a token that is lost or sent twice changes what follows."""
    value = 17
    for token in tokens:
        value = (value * 31 + token + 1) % 1009
    return value


class FakeWorkers:
    """Runs plans and checks them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.known: dict[int, Known] = {}
        self.steps, self.starts, self.widest, self.fullest = 0, 0, 0, 0

    def execute(self, plan: StepPlan) -> StepResult:
        self.steps += 1
        assert plan.step == self.steps
        for dropped in plan.dropped:
            del self.known[dropped]
        for new in plan.started:
            assert new.seq_id not in self.known
            self.known[new.seq_id] = Known(list(new.token_ids))
            self.starts += 1
        assert len({c.seq_id for c in plan.chunks}) == len(plan.chunks) <= self.scheduler.max_num_seqs
        assert sum(c.count for c in plan.chunks) <= self.scheduler.max_num_batched_tokens
        assert len(self.known) <= self.scheduler.max_num_seqs
        self.widest = max(self.widest, len(plan.chunks))
        self.fullest = max(self.fullest, sum(c.count for c in plan.chunks))
        assert {new.seq_id for new in plan.started} <= {c.seq_id for c in plan.chunks}
        samples = []
        for chunk in plan.chunks:
            known = self.known[chunk.seq_id]
            known.tokens += chunk.appended
            known.blocks += chunk.new_blocks
            assert chunk.count >= 1
            assert chunk.start == known.computed
            known.computed += chunk.count
            assert known.computed <= len(known.tokens)
            assert chunk.sample == (known.computed == len(known.tokens))
            assert self.scheduler.pool.needed(known.computed) <= len(known.blocks)
            if chunk.sample:
                samples.append(Sample(seq_id=chunk.seq_id, token=next_token(known.tokens)))
        owned = [block for known in self.known.values() for block in known.blocks]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(self.scheduler.pool.num_blocks))
        assert len(owned) + self.scheduler.pool.num_free == self.scheduler.pool.num_blocks
        return StepResult(step=plan.step, samples=tuple(samples))


def expected(prompt: list[int], count: int) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tuple(tokens[len(prompt) :])


def setting(blocks: int, block_size: int, seqs: int, budget: int) -> tuple[Engine, FakeWorkers]:
    scheduler = Scheduler(BlockPool(blocks, block_size), seqs, budget)
    workers = FakeWorkers(scheduler)
    return Engine(workers, scheduler, vocab_size=2000, max_model_len=blocks * block_size), workers


@pytest.mark.parametrize("seed", range(40))
def test_random_traffic(seed: int) -> None:
    """Requests arrive and are aborted at random, in small pools: all that are not aborted get exactly their tokens."""
    rng = random.Random(seed)
    blocks, block_size, seqs, budget = rng.randint(3, 12), rng.randint(1, 5), rng.randint(1, 6), rng.randint(1, 14)
    engine, workers = setting(blocks, block_size, seqs, budget)
    waiting, wanted, found, aborted = rng.randint(5, 14), {}, {}, set()
    for _ in range(3000):
        while waiting and rng.random() < 0.5:
            waiting -= 1
            prompt = [rng.randrange(1009) for _ in range(rng.randint(1, max(1, blocks * block_size // 2)))]
            count = rng.randint(1, blocks * block_size - len(prompt) or 1)
            n = rng.choice((1, 1, 3))
            try:
                request = engine.add(prompt, SamplingParams(max_tokens=count, n=n))
            except ValueError:
                continue
            wanted[request] = [expected(prompt, count)] * n
        if wanted and rng.random() < 0.03:
            victim = rng.choice(list(wanted))
            if victim not in found:
                engine.abort(victim)
                aborted.add(victim)
        for output in engine.step() if engine.has_work else ():
            if output.finished:
                found[output.request_id] = [o.token_ids for o in output.outputs]
        if not waiting and not engine.has_work:
            break
    assert not engine.has_work
    assert found == {request: tokens for request, tokens in wanted.items() if request not in aborted}
    assert engine.pool.num_free == blocks
    if not aborted:
        assert workers.known == {}


def test_the_traffic_reaches_the_limits() -> None:
    """The same traffic does preempt, chunk and batch: otherwise the test above shows nothing."""
    engine, workers = setting(6, 2, 4, 5)
    for start in range(6):
        engine.add([start + i for i in range(5)], SamplingParams(max_tokens=6))
    while engine.has_work:
        engine.step()
    assert engine.scheduler.preemptions > 0
    assert workers.starts == 6 + engine.scheduler.preemptions
    assert workers.widest > 1
    assert workers.fullest == 5
    assert workers.known == {}


def sequence(seq_id: int, prompt: list[int]) -> Sequence:
    request = Request(
        request_id=seq_id,
        prompt=None,
        prompt_ids=tuple(prompt),
        params=SamplingParams(),
        max_len=100,
        stop_ids=frozenset(),
    )
    return Sequence(
        seq_id=seq_id, request=request, index=0, sampling=SamplingSpec(seed=seq_id), tokens=list(prompt), detokenizer=None
    )


def chunks(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(c.seq_id, c.start, c.count, c.sample) for c in plan.chunks]


def test_a_long_prompt_is_cut_by_the_budget() -> None:
    scheduler = Scheduler(BlockPool(10, 4), 4, 6)
    scheduler.add(sequence(0, list(range(15))))
    plans = [scheduler.schedule()[0] for _ in range(3)]
    assert [chunks(plan) for plan in plans] == [[(0, 0, 6, False)], [(0, 6, 6, False)], [(0, 12, 3, True)]]
    assert [c.new_blocks for plan in plans for c in plan.chunks] == [(0, 1), (2,), (3,)]
    assert [c.appended for plan in plans for c in plan.chunks] == [(), (), ()]
    assert [len(plan.started) for plan in plans] == [1, 0, 0]
    assert plans[0].started[0].token_ids == tuple(range(15))


def test_decoding_goes_beside_prefill_and_before_it() -> None:
    scheduler = Scheduler(BlockPool(10, 4), 4, 6)
    first, second = sequence(0, [1, 2, 3]), sequence(1, list(range(9)))
    scheduler.add(first)
    scheduler.schedule()
    first.tokens.append(50)
    scheduler.add(second)
    plan, chosen = scheduler.schedule()
    assert chunks(plan) == [(0, 3, 1, True), (1, 0, 5, False)]
    assert chosen == [first, second]
    assert plan.chunks[0].appended == (50,)
    first.tokens.append(51)
    assert chunks(scheduler.schedule()[0]) == [(0, 4, 1, True), (1, 5, 4, True)]


def test_no_more_sequences_run_than_allowed() -> None:
    scheduler = Scheduler(BlockPool(10, 4), 2, 100)
    members = [sequence(i, [i, i]) for i in range(3)]
    for member in members:
        scheduler.add(member)
    assert chunks(scheduler.schedule()[0]) == [(0, 0, 2, True), (1, 0, 2, True)]
    scheduler.finish(members[0])
    members[1].tokens.append(9)
    plan = scheduler.schedule()[0]
    assert plan.dropped == (0,)
    assert chunks(plan) == [(1, 2, 1, True), (2, 0, 2, True)]


def test_no_more_sequences_start_in_a_step_than_allowed() -> None:
    scheduler = Scheduler(BlockPool(10, 4), 3, 100, max_prefill_seqs=1)
    for i in range(3):
        scheduler.add(sequence(i, [i + 1]))
    first = scheduler.schedule()[0]
    assert chunks(first) == [(0, 0, 1, True)]
    scheduler.running[0].tokens.append(9)
    assert chunks(scheduler.schedule()[0]) == [(0, 1, 1, True), (1, 0, 1, True)]


def test_the_youngest_is_preempted_and_starts_over() -> None:
    scheduler = Scheduler(BlockPool(4, 2), 4, 100)
    members = [sequence(i, [i, i + 10]) for i in range(3)]
    for member in members:
        scheduler.add(member)
    scheduler.schedule()
    for member in members:
        member.tokens.append(70 + member.seq_id)
    plan = scheduler.schedule()[0]
    assert chunks(plan) == [(0, 2, 1, True), (1, 2, 1, True)]
    assert plan.dropped == (2,)
    assert (scheduler.preemptions, members[2].preemptions, members[2].blocks) == (1, 1, [])
    assert not set(members[0].blocks) & set(members[1].blocks)
    scheduler.finish(members[0])
    members[1].tokens.append(80)
    plan = scheduler.schedule()[0]
    assert plan.dropped == (0,)
    assert chunks(plan) == [(1, 3, 1, True), (2, 0, 3, True)]
    assert plan.started[0].token_ids == (2, 12, 72)
    assert plan.started[0].prompt_len == 2


def test_nobody_is_admitted_in_the_step_that_preempts() -> None:
    scheduler = Scheduler(BlockPool(3, 2), 4, 100)
    old, young, late = sequence(0, [1, 2]), sequence(1, [3, 4, 5]), sequence(2, [6])
    scheduler.add(old)
    scheduler.add(young)
    scheduler.schedule()
    old.tokens.append(9)
    young.tokens.append(9)
    scheduler.add(late)
    assert chunks(scheduler.schedule()[0]) == [(0, 2, 1, True)]
    assert [s.seq_id for s in scheduler.waiting] == [1, 2]


def test_a_sequence_that_no_worker_knows_is_not_dropped() -> None:
    scheduler = Scheduler(BlockPool(3, 2), 1, 100)
    first, second = sequence(0, [1]), sequence(1, [2])
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    scheduler.finish(second)
    assert scheduler.drop_plan() is None
    scheduler.finish(first)
    plan = scheduler.drop_plan()
    assert plan is not None
    assert (plan.dropped, plan.chunks, plan.step) == ((0,), (), 2)
    assert scheduler.drop_plan() is None
    assert not scheduler.has_work


def test_few_blocks_do_not_make_sequences_start_over_again_and_again() -> None:
    """Two requests that do not fit together: the second waits until its prompt fits, instead of prefilling in vain beside the
    first. At most three times the tokens of a pool with room for both are computed; admitting by the first chunk took 20."""
    computed = {}
    for blocks in (1000, 250, 200):
        engine, workers = setting(blocks=blocks, block_size=16, seqs=4, budget=256)
        for start in (1, 2):
            engine.add([start] * 2000, SamplingParams(max_tokens=500, ignore_eos=True))
        computed[blocks] = 0
        while engine.has_work:
            before = {i: known.computed for i, known in workers.known.items()}
            engine.step()
            computed[blocks] += sum(max(0, known.computed - before.get(i, 0)) for i, known in workers.known.items())
    assert computed[1000] >= 4900
    assert computed[250] <= 3 * computed[1000]
    assert computed[200] <= 3 * computed[1000]

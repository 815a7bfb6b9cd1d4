"""An engine that begins a step before it has the result of the one before, against a stand-in for workers that do the same.

The stand-in keeps what a device would know of each sequence, and beside it what plans told of it, which must agree.
"""

import random
from collections import deque

import pytest
from test_scheduler import FakeWorkers, expected, next_token

from qtp.engine.engine import Engine
from qtp.engine.sampling_params import SamplingParams
from qtp.engine.scheduler import Scheduler
from qtp.kv.blocks import BlockPool
from qtp.wire.messages import StepPlan, StepResult


class AheadWorkers(FakeWorkers):
    """`device`: all tokens of a sequence; `known`: those that plans told, behind by one while a step is under way."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self.device: dict[int, list[int]] = {}
        self.begun: deque[StepResult] = deque()
        self.ahead = 0

    def begin(self, plan: StepPlan) -> None:
        assert len(self.begun) < 2
        follows = len(self.begun) == 1
        self.ahead += follows
        assert not (follows and plan.started)
        told = {c.seq_id: [*self.known[c.seq_id].tokens, *c.appended] for c in plan.chunks if c.seq_id in self.known}
        for chunk in plan.chunks:
            if follows:
                tokens = told[chunk.seq_id]
                assert (chunk.start, chunk.count) == (len(tokens), 1)
                # what the device found reaches the stand-in's `known` here, and by the next plan in earnest
                self.known[chunk.seq_id].tokens.append(self.device[chunk.seq_id][chunk.start])
        late = {c.seq_id for c in plan.chunks} if follows else set()
        result = self._run(plan, late)
        self.begun.append(result)

    def _run(self, plan: StepPlan, late: set[int]) -> StepResult:
        known = {i: list(k.tokens) for i, k in self.known.items()}
        for i in late:  # `execute` appends what is told behind what is pending: put the pending one last
            pending = self.known[i].tokens.pop()
            chunk = next(c for c in plan.chunks if c.seq_id == i)
            assert [*self.known[i].tokens, *chunk.appended] == self.device[i][: chunk.start], known[i]
            self.known[i].tokens += [*chunk.appended, pending]
        told = StepPlan(
            step=plan.step,
            dropped=plan.dropped,
            started=plan.started,
            chunks=tuple(c if c.seq_id not in late else type(c)(**{**_fields(c), "appended": ()}) for c in plan.chunks),
        )
        result = super().execute(told)
        for new in plan.started:
            self.device[new.seq_id] = list(new.token_ids)
        for chunk in plan.chunks:
            i = chunk.seq_id
            if i not in late:
                self.device[i] = list(self.known[i].tokens)
            else:
                self.known[i].tokens.pop()  # not told yet
        for sample in result.samples:
            assert sample.token == next_token(self.device[sample.seq_id])
            self.device[sample.seq_id].append(sample.token)
        return result

    def finish(self) -> StepResult:
        return self.begun.popleft()

    def execute(self, plan: StepPlan) -> StepResult:
        self.begin(plan)
        return self.finish()


def _fields(chunk: object) -> dict[str, object]:
    return {name: getattr(chunk, name) for name in ("seq_id", "start", "count", "sample", "appended", "new_blocks")}


def setting(blocks: int, block_size: int, seqs: int, budget: int, ahead: int = 8) -> tuple[Engine, AheadWorkers]:
    scheduler = Scheduler(BlockPool(blocks, block_size), seqs, budget)
    workers = AheadWorkers(scheduler)
    return Engine(workers, scheduler, vocab_size=2000, max_model_len=blocks * block_size, ahead=ahead), workers


def until(tokens: tuple[int, ...], stop: int | None) -> tuple[int, ...]:
    return tokens if stop is None or stop not in tokens else tokens[: tokens.index(stop) + 1]


@pytest.mark.parametrize("seed", range(40))
def test_random_traffic(seed: int) -> None:
    """Greedy and drawn requests, some with a stop id that ends them early, arrive and are aborted at random."""
    rng = random.Random(seed)
    blocks, block_size, seqs, budget = rng.randint(3, 14), rng.randint(1, 5), rng.randint(1, 6), rng.randint(2, 14)
    engine, workers = setting(blocks, block_size, seqs, budget, rng.choice((1, 3, 8)))
    waiting, wanted, found, aborted = rng.randint(5, 14), {}, {}, set()
    for _ in range(3000):
        while waiting and rng.random() < 0.3:
            waiting -= 1
            prompt = [rng.randrange(1009) for _ in range(rng.randint(1, max(1, blocks * block_size // 2)))]
            count = rng.randint(1, blocks * block_size - len(prompt) or 1)
            tokens = expected(prompt, count)
            stop = rng.choice((None, None, rng.choice(tokens)))
            params = SamplingParams(
                max_tokens=count, temperature=rng.choice((0.0, 0.0, 1.0)), stop_token_ids=None if stop is None else [stop]
            )
            try:
                wanted[engine.add(prompt, params)] = until(tokens, stop)
            except ValueError:
                continue
        if wanted and rng.random() < 0.05:
            victim = rng.choice(list(wanted))
            if victim not in found:
                engine.abort(victim)
                aborted.add(victim)
        for output in engine.step() if engine.has_work else ():
            if output.finished:
                found[output.request_id] = output.outputs[0].token_ids
        if not waiting and not engine.has_work:
            break
    assert not engine.has_work
    assert found == {request: tokens for request, tokens in wanted.items() if request not in aborted}
    assert engine.pool.num_free == blocks
    assert not workers.begun
    assert workers.known == {}


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0)


def test_decode_runs_ahead() -> None:
    """All steps but the prompts' and the first decode."""
    engine, workers = setting(20, 4, 4, 64)
    for start in range(3):
        engine.add([start, start + 1], greedy(10))
    while engine.has_work:
        engine.step()
    assert workers.steps == 11  # 10 and one that tells what to forget
    assert workers.ahead == 8


def test_not_where_tokens_are_drawn_or_there_are_too_many() -> None:
    for params, ahead in ((SamplingParams(max_tokens=10, temperature=1.0), 8), (greedy(10), 2)):
        engine, workers = setting(20, 4, 4, 64, ahead)
        for start in range(3):
            engine.add([start, start + 1], params)
        while engine.has_work:
            engine.step()
        assert workers.ahead == 0


@pytest.mark.parametrize("begun", [1, 2])
def test_what_was_begun_before_an_interrupt_is_finished(begun: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one who ends the requests then, so that the next ones find the workers idle."""
    engine, workers = setting(20, 4, 4, 64)
    request = engine.add([1, 2], greedy(10))
    for _ in range(2 * begun - 1):
        engine.step()

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    place = (engine.scheduler, "follow") if begun == 1 else (workers, "finish")
    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert len(workers.begun) == begun
    engine.abort(request)
    assert not workers.begun
    engine.add([5, 6], greedy(3))
    (output,) = [o for _ in range(9) if engine.has_work for o in engine.step() if o.finished]
    assert output.outputs[0].token_ids == expected([5, 6], 3)


def test_who_waits_is_let_in() -> None:
    """A request that arrives while steps run ahead starts two steps later at most; one without room holds up nobody."""
    engine, workers = setting(20, 4, 2, 64)
    first = engine.add([1, 2], greedy(30))
    for _ in range(5):
        engine.step()
    second = engine.add([5, 6], greedy(12))
    third = engine.add([7, 8], greedy(3))
    grown: dict[int, int] = {}
    for step in range(12):
        for output in engine.step():
            grown.setdefault(output.request_id, step)
    assert grown[first] == 0
    assert grown[second] <= 2
    assert third not in grown
    before = workers.ahead
    while engine.has_work:
        engine.step()
    assert before >= 6


def test_blocks_that_are_short_are_not_taken_ahead() -> None:
    """Where a sequence must be preempted, that waits for the result; nobody loses a token."""
    engine, workers = setting(4, 2, 3, 64)
    wanted = {engine.add([start, start + 1], greedy(5)): expected([start, start + 1], 5) for start in range(3)}
    found = {}
    while engine.has_work:
        found.update({o.request_id: o.outputs[0].token_ids for o in engine.step() if o.finished})
    assert found == wanted
    assert engine.scheduler.preemptions > 0
    assert workers.ahead > 0

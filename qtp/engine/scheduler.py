"""Which tokens of which sequences run in the next step: plain Python over the block pool.

A step mixes decoding and chunked prefill under a token budget. Running sequences come first, oldest first; then waiting ones
are admitted in order of arrival, once the pool holds all the tokens they have, and unless a sequence had to be preempted in
this step. Blocks are taken as a sequence grows.
When none is left, the youngest running sequence is preempted: its blocks go back, and it starts over later (recompute) from
its prompt and what it had sampled.
"""

from collections import deque

from qtp.engine.request import Sequence
from qtp.kv.blocks import BlockPool
from qtp.wire.messages import Chunk, NewSequence, StepPlan


class Scheduler:
    """max_num_seqs: sequences in a step; max_num_batched_tokens: tokens in a step; max_prefill_seqs: sequences that start in
    one step, None: no limit of their own. Every sequence added must fit the pool
    alone (the engine sees to it), so the oldest running one can always go on."""

    def __init__(
        self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, max_prefill_seqs: int | None = None
    ) -> None:
        self.pool = pool
        self.max_prefill_seqs = max_prefill_seqs or max_num_seqs
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._step = 0
        self._dropped: list[int] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> tuple[StepPlan, list[Sequence]]:
        """The next step and the sequences whose chunks it holds, in the same order. Their `computed` is moved on."""
        budget, before = self.max_num_batched_tokens, self.preemptions
        chosen: list[tuple[Sequence, Chunk]] = []
        started: list[NewSequence] = []
        place = 0
        while place < len(self.running) and budget:  # those who are preempted on the way leave from the end
            s = self.running[place]
            count = min(len(s.tokens) - s.computed, budget)
            blocks = self._take_preempting(s, s.computed + count)
            if blocks is None:
                break
            chosen.append((s, self._chunk(s, count, blocks)))
            budget -= count
            place += 1
        unpromised = self._unpromised() if self.waiting else 0
        while self.waiting and self.preemptions == before and budget and self._has_seat(len(started)):
            s = self.waiting[0]
            count = min(len(s.tokens), budget)
            if unpromised < self.pool.needed(len(s.tokens)):
                break
            unpromised -= self.pool.needed(len(s.tokens))
            blocks = self.pool.take(self.pool.needed(count))
            assert blocks is not None
            self.running.append(self.waiting.popleft())
            started.append(self._start(s))
            chosen.append((s, self._chunk(s, count, blocks)))
            budget -= count
        self._step += 1
        dropped, self._dropped = tuple(self._dropped), []
        plan = StepPlan(step=self._step, dropped=dropped, started=tuple(started), chunks=tuple(c for _, c in chosen))
        return plan, [s for s, _ in chosen]

    def follow(self, flying: list[Sequence]) -> tuple[StepPlan, list[Sequence]] | None:
        """The decode step after one that still runs, which gives a token to each sequence in `flying`; those of them whose last
        one it is are left out. None where others could run as well, or blocks are short: then it takes the result to go on."""
        going = [s for s in flying if s.finish_reason is None and len(s.tokens) + 1 < s.request.max_len]
        if not going or any(s.computed < len(s.tokens) for s in self.running):
            return None
        if self.waiting and self._has_seat(0) and self._unpromised() >= self.pool.needed(len(self.waiting[0].tokens)):
            return None
        lacking = [self.pool.needed(s.computed + 1) - len(s.blocks) for s in going]
        if sum(lacking) > self.pool.num_free:
            return None
        chunks = []
        for s, count in zip(going, lacking, strict=True):
            blocks = self.pool.take(count) if count > 0 else []
            assert blocks is not None
            chunks.append(self._chunk(s, 1, blocks))
        self._step += 1
        dropped, self._dropped = tuple(self._dropped), []
        return StepPlan(step=self._step, dropped=dropped, chunks=tuple(chunks)), going

    def finish(self, s: Sequence) -> None:
        """A sequence has ended, whether it runs or waits: its blocks are free, the workers forget it with the next plan."""
        if s in self.running:
            self.running.remove(s)
            self._release(s)
        else:
            self.waiting.remove(s)

    def drop_plan(self) -> StepPlan | None:
        """A plan that only tells the workers what to forget, or None if there is nothing."""
        if not self._dropped:
            return None
        self._step += 1
        dropped, self._dropped = tuple(self._dropped), []
        return StepPlan(step=self._step, dropped=dropped)

    def _has_seat(self, started: int) -> bool:
        return len(self.running) < self.max_num_seqs and started < self.max_prefill_seqs

    def _unpromised(self) -> int:
        """Free blocks less those that running sequences lack for the tokens they already have. A sequence is admitted only if
        its own tokens fit into these: one that prefills until the pool is empty would only preempt itself, again and again."""
        return self.pool.num_free - sum(max(0, self.pool.needed(len(s.tokens)) - len(s.blocks)) for s in self.running)

    def _take_preempting(self, s: Sequence, num_tokens: int) -> list[int] | None:
        """The blocks that `s` lacks for num_tokens; preempts the youngest until they are there. None: `s` itself had to go."""
        lacking = self.pool.needed(num_tokens) - len(s.blocks)
        while (blocks := self.pool.take(max(0, lacking))) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is s:
                return None
        return blocks

    def _preempt(self, s: Sequence) -> None:
        self.running.remove(s)
        self._release(s)
        s.computed = s.sent = 0
        s.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(s)

    def _release(self, s: Sequence) -> None:
        self.pool.give_back(s.blocks)
        s.blocks = []
        if s.sent:
            self._dropped.append(s.seq_id)

    def _start(self, s: Sequence) -> NewSequence:
        s.sent = len(s.tokens)
        return NewSequence(seq_id=s.seq_id, token_ids=tuple(s.tokens), prompt_len=len(s.request.prompt_ids), sampling=s.sampling)

    def _chunk(self, s: Sequence, count: int, blocks: list[int]) -> Chunk:
        chunk = Chunk(
            seq_id=s.seq_id,
            start=s.computed,
            count=count,
            sample=s.computed + count >= len(s.tokens),
            appended=tuple(s.tokens[s.sent :]),
            new_blocks=tuple(blocks),
        )
        s.blocks += blocks
        s.computed += count
        s.sent = len(s.tokens)
        return chunk

"""The engine: requests in, steps through an executor, outputs out. Plain Python; the executor is whatever runs a StepPlan."""

import secrets
import time
from collections.abc import Sequence as Ids
from typing import Protocol

from qtp.engine.detokenize import Decoder, Detokenizer, find_stop
from qtp.engine.outputs import CompletionOutput, Logprob, RequestOutput
from qtp.engine.request import Request, Sequence
from qtp.engine.sampling_params import SamplingParams
from qtp.engine.scheduler import Scheduler
from qtp.kv.blocks import BlockPool
from qtp.wire.messages import Sample, SamplingSpec, StepPlan, StepResult, TokenLogprobs


class Executor(Protocol):
    def execute(self, plan: StepPlan) -> StepResult:
        """Runs the plan on every rank and returns rank 0's result."""
        ...

    def begin(self, plan: StepPlan) -> None:
        """Starts the plan, perhaps while the one before it runs; needed only by an Engine that is `ahead`."""
        ...

    def finish(self) -> StepResult:
        """The result of the plan that was begun first."""
        ...


class Engine:
    """Continuous batching over an executor.

    vocab_size: ids must be below it. max_model_len: tokens of prompt and output together. eos_ids end a sequence unless it
    ignores them. decoder: gives text; None: ids only.

    ahead: sequences in a step of greedy decode that may be begun before the result of the one before is there, so that what is
    done here with a result costs the ranks no time; 0: none. Such a step goes on with sequences that may turn out to have ended:
    what it finds for them is dropped.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        *,
        vocab_size: int,
        max_model_len: int,
        eos_ids: tuple[int, ...] = (),
        decoder: Decoder | None = None,
        ahead: int = 0,
    ) -> None:
        self.executor, self.scheduler = executor, scheduler
        self.vocab_size, self.max_model_len, self.eos_ids, self.decoder = vocab_size, max_model_len, eos_ids, decoder
        self.ahead = ahead
        self._begun: tuple[StepPlan, list[Sequence]] | None = None
        self._unfinished = 0  # steps that were begun
        self._requests: dict[int, Request] = {}
        self._next_request = 0
        self._next_sequence = 0

    @property
    def pool(self) -> BlockPool:
        return self.scheduler.pool

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, prompt_ids: Ids[int], params: SamplingParams, prompt: str | None = None) -> int:
        """Queues a request and returns its id. Raises ValueError, and queues nothing, for a prompt that cannot be served."""
        self.check(prompt_ids, params)
        request = Request(
            request_id=self._next_request,
            prompt=prompt,
            prompt_ids=tuple(prompt_ids),
            params=params,
            max_len=longest(len(prompt_ids), params, self.max_model_len),
            stop_ids=frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else frozenset(self.eos_ids)),
        )
        self._next_request += 1
        seed = secrets.randbits(62) if params.seed is None else params.seed
        for index in range(params.n):
            s = Sequence(
                seq_id=self._next_sequence,
                request=request,
                index=index,
                sampling=_spec(params, request, seed, index),
                tokens=list(prompt_ids),
                detokenizer=Detokenizer(self.decoder) if self.decoder is not None else None,
            )
            self._next_sequence += 1
            request.sequences.append(s)
            self.scheduler.add(s)
        self._requests[request.request_id] = request
        return request.request_id

    def check(self, prompt_ids: Ids[int], params: SamplingParams) -> None:
        """As `check_request`, for this engine."""
        check_request(
            prompt_ids,
            params,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            pool=self.pool,
            has_decoder=self.decoder is not None,
        )

    def abort(self, request_id: int) -> None:
        """Ends a request where it is; its blocks are free at once. An unknown or finished one is ignored."""
        request = self._requests.pop(request_id, None)
        for s in request.sequences if request is not None else ():
            if s.finish_reason is None:
                s.finish_reason = "abort"
                self.scheduler.finish(s)
        self._forget_if_idle()

    def step(self) -> list[RequestOutput]:
        """Runs one step and returns the outputs of the requests that it moved on, finished ones for the last time."""
        return [self.output(request) for request in self.advance()]

    def advance(self) -> list[Request]:
        """As `step`, for callers that do not want every output so far: `output` makes one of a request."""
        plan, chosen = self._begun or self.scheduler.schedule()
        assert plan.chunks or not self.scheduler.has_work, "there is work, but no sequence could be scheduled"
        now = time.perf_counter()
        by_id = {s.seq_id: s for s in chosen}
        for s in chosen:
            if s.request.started is None:
                s.request.started = now
        result = self._result(plan, chosen) if self.ahead else self.executor.execute(plan)
        assert result.step == plan.step, (result.step, plan.step)
        moved: dict[int, Request] = {}
        for sample in result.samples:
            s = by_id[sample.seq_id]
            if s.finish_reason is None:  # else it had ended when this step was begun already
                self._take(s, sample, plan)
                moved[s.request.request_id] = s.request
        for request in moved.values():
            if request.finished:
                del self._requests[request.request_id]
        self._forget_if_idle()
        return list(moved.values())

    def _result(self, plan: StepPlan, chosen: list[Sequence]) -> StepResult:
        """Of the plan, which is begun if it was not; the step after it, if it may be, is begun before."""
        if self._begun is None:
            self._begin(plan)
            self._begun = plan, chosen
        alone = len(chosen) <= self.ahead and all(chunk.count == 1 and chunk.sample for chunk in plan.chunks)
        follows = alone and all(s.sampling.only_best for s in chosen)
        following = self.scheduler.follow(chosen) if follows else None
        if following is not None:
            self._begin(following[0])
        self._begun = following
        return self._finish()

    def _begin(self, plan: StepPlan) -> None:
        self.executor.begin(plan)
        self._unfinished += 1

    def _finish(self) -> StepResult:
        result = self.executor.finish()
        self._unfinished -= 1
        return result

    def output(self, request: Request) -> RequestOutput:
        """The request so far."""
        prompt = None
        if request.params.prompt_logprobs is not None:
            told = request.prompt_logprobs
            prompt = (None, *(told[p] for p in range(1, len(request.prompt_ids)) if p in told))
        started, first, last = request.started or 0.0, request.first_token or 0.0, request.last_token or 0.0
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_ids,
            outputs=tuple(map(_completion, request.sequences)),
            prompt_logprobs=prompt,
            finished=request.finished,
            prefill_seconds=max(0.0, first - started),
            decode_seconds=max(0.0, last - first),
        )

    def _forget_if_idle(self) -> None:
        """With no step to come, the workers learn at once what to forget."""
        if not self._requests:
            self._begun = None
            while self._unfinished:  # two, where something came between
                self._finish()
        if not self._requests and (forget := self.scheduler.drop_plan()) is not None:
            self.executor.execute(forget)

    def _take(self, s: Sequence, sample: Sample, plan: StepPlan) -> None:
        request = s.request
        if sample.prompt_logprobs:
            start = next(chunk.start for chunk in plan.chunks if chunk.seq_id == s.seq_id)
            for place, told in enumerate(sample.prompt_logprobs, start=start + 1):
                if place not in request.prompt_logprobs:  # a recompute tells them again
                    request.prompt_logprobs[place] = self._named(told)
        if sample.token is None:
            return
        request.last_token = time.perf_counter()
        request.first_token = request.last_token if request.first_token is None else request.first_token
        s.tokens.append(sample.token)
        if sample.logprobs is not None:
            s.logprobs.append(self._named(sample.logprobs))
        self._end_if_due(s, sample.token)
        if s.finish_reason is not None:
            self.scheduler.finish(s)

    def _end_if_due(self, s: Sequence, token: int) -> None:
        params, produced = s.request.params, len(s.tokens) - len(s.request.prompt_ids)
        ends = token in s.request.stop_ids and produced >= params.min_tokens
        full = len(s.tokens) >= s.request.max_len
        if s.detokenizer is not None:
            known = len(s.detokenizer.text) if params.stops else 0  # without stops the text may wait until it is asked for
            if not (ends and token in self.eos_ids):
                s.detokenizer.add(token)
            if ends or full:
                s.detokenizer.flush()
            if params.stops and produced >= params.min_tokens:
                s.text_end = find_stop(s.detokenizer.text, params.stops, known)
        if ends or s.text_end is not None:
            s.finish_reason = "stop"
        elif full:
            s.finish_reason = "length"

    def _named(self, told: TokenLogprobs) -> dict[int, Logprob]:
        return {
            i: Logprob(logprob=value, rank=rank, decoded_token=self.decoder.decode([i]) if self.decoder is not None else None)
            for i, value, rank in zip(told.token_ids, told.logprobs, told.ranks, strict=True)
        }


def longest(prompt_len: int, params: SamplingParams, max_model_len: int) -> int:
    """Tokens of prompt and output together at which a sequence ends."""
    return max_model_len if params.max_tokens is None else min(max_model_len, prompt_len + params.max_tokens)


def check_request(
    prompt_ids: Ids[int], params: SamplingParams, *, vocab_size: int, max_model_len: int, pool: BlockPool, has_decoder: bool
) -> None:
    """Raises ValueError naming what is wrong, and the way out, if the request cannot be served."""
    if not prompt_ids:
        raise ValueError("the prompt is empty; give at least one token")
    for i in prompt_ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
            raise ValueError(f"token id {i!r} is outside the vocabulary of {vocab_size}; give ids from 0 to {vocab_size - 1}")
    for i in params.stop_token_ids or ():
        if not 0 <= i < vocab_size:
            raise ValueError(f"stop_token_ids: id {i} is outside the vocabulary of {vocab_size}")
    if params.stops and not has_decoder:
        raise ValueError("stop texts need a tokenizer; load one, or use stop_token_ids")
    if len(prompt_ids) >= max_model_len:
        raise ValueError(
            f"the prompt has {len(prompt_ids)} tokens and the limit is {max_model_len - 1} (max_model_len {max_model_len} less "
            "one to generate); shorten it or raise max_model_len"
        )
    needed = pool.needed(longest(len(prompt_ids), params, max_model_len) - 1)
    if needed > pool.num_blocks:
        raise ValueError(
            f"{len(prompt_ids)} prompt tokens and {params.max_tokens or 'all'} to generate need {needed} KV blocks of "
            f"{pool.block_size} tokens, and there are {pool.num_blocks}; raise num_kv_blocks or lower max_tokens"
        )


def _completion(s: Sequence) -> CompletionOutput:
    logprobs = None if s.request.params.logprobs is None else tuple(s.logprobs)
    return CompletionOutput(
        index=s.index, text=s.text, token_ids=tuple(s.output_ids), logprobs=logprobs, finish_reason=s.finish_reason
    )


def _spec(params: SamplingParams, request: Request, seed: int, index: int) -> SamplingSpec:
    """What the workers need of the params. Only the first sequence of a request reports on the prompt."""
    return SamplingSpec(
        temperature=float(params.temperature),
        top_p=float(params.top_p),
        top_k=max(0, params.top_k),
        min_p=float(params.min_p),
        repetition_penalty=float(params.repetition_penalty),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        seed=(seed + index * 0x9E3779B97F4A7C15) % 2**63,
        min_tokens=params.min_tokens,
        stop_token_ids=tuple(sorted(request.stop_ids)) if params.min_tokens else (),
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs if index == 0 else None,
    )

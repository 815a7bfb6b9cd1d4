"""A request and its sequences, as rank 0 knows them."""

from dataclasses import dataclass, field

from qtp.engine.detokenize import Detokenizer
from qtp.engine.outputs import Logprob
from qtp.engine.sampling_params import SamplingParams
from qtp.wire.messages import SamplingSpec


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """One sequence of a request. tokens: prompt, then what was sampled. computed: how many of them have their KV in the
    cache. sent: how many the workers know, 0 while they do not know the sequence at all. blocks: its KV blocks."""

    seq_id: int
    request: "Request"
    index: int
    sampling: SamplingSpec
    tokens: list[int]
    detokenizer: Detokenizer | None
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    sent: int = 0
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    text_end: int | None = None
    finish_reason: str | None = None
    preemptions: int = 0

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]

    @property
    def text(self) -> str:
        return self.detokenizer.text[: self.text_end] if self.detokenizer is not None else ""


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """max_len: tokens of prompt and output together at which a sequence ends. Times are of time.perf_counter."""

    request_id: int
    prompt: str | None
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_len: int
    stop_ids: frozenset[int]
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: dict[int, dict[int, Logprob]] = field(default_factory=dict)
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    @property
    def finished(self) -> bool:
        return all(s.finish_reason is not None for s in self.sequences)

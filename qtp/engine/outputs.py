"""What a request gives back, in vLLM's words."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprob:
    """Natural logarithm of a token's probability, its rank (1: most likely) and its text (None without a tokenizer)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One sequence of a request. finish_reason: "stop" (eos, a stop text or id), "length", or None while it runs.
    logprobs: for each token a dict from id to Logprob: the token itself and the most likely ones."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """A request so far. prompt_logprobs: None for the first prompt token, then as CompletionOutput.logprobs.
    prefill_seconds: from the request's first step to its first token; decode_seconds: from there to the last."""

    request_id: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    finished: bool = False
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

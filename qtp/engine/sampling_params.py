"""How a request is sampled, in vLLM's words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """max_tokens: most tokens to generate, None: until the context is full. min_tokens: eos and stop_token_ids wait for it.
    temperature: 0 is greedy. top_p: in (0, 1]. top_k: 0 or -1 is off. min_p: least probability relative to the best token's.
    repetition_penalty: above 0, 1 is off; presence_penalty, frequency_penalty: -2 to 2, 0 is off.
    seed: makes the request repeatable; None draws one. stop: texts that end it and are cut off; stop_token_ids: ids, kept.
    n: sequences of the prompt. logprobs, prompt_logprobs: how many of the most likely tokens to report, -1: all.

    Raises ValueError naming the parameter if one is out of range.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (kind, optional, good, needed) in _RULES.items():
            value = getattr(self, name)
            if not (optional and value is None) and not (_is(kind, value) and good(value)):
                raise ValueError(f"{name} {value!r} is out of range; it must be {needed}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is out of range; it must be between 0 and max_tokens")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def _is(kind: Any, value: object) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not isinstance(value, bool)


def _are_texts(value: str | Sequence[str]) -> bool:
    return all(isinstance(text, str) and text for text in ([value] if isinstance(value, str) else value))


_MUCH = 2**31  # what no count or id reaches, and what a plan can carry
_Rule = tuple[Any, bool, Callable[[Any], bool], str]

# name -> (type, may be None, what holds of a good value, that in words); a comparison with NaN does not hold
_RULES: dict[str, _Rule] = {
    "max_tokens": (int, True, lambda v: 1 <= v < _MUCH, "an integer of at least 1, below 2**31"),
    "min_tokens": (int, False, lambda v: 0 <= v < _MUCH, "an integer of 0 or more, below 2**31"),
    "temperature": (float, False, lambda v: 0 <= v < inf, "a number of 0 or more"),
    "top_p": (float, False, lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "top_k": (int, False, lambda v: -1 <= v < _MUCH, "an integer, 0 (off) or more, below 2**31"),
    "min_p": (float, False, lambda v: 0 <= v <= 1, "between 0 and 1"),
    "repetition_penalty": (float, False, lambda v: 0 < v < inf, "a number above 0"),
    "presence_penalty": (float, False, lambda v: -2 <= v <= 2, "between -2 and 2"),
    "frequency_penalty": (float, False, lambda v: -2 <= v <= 2, "between -2 and 2"),
    "seed": (int, True, lambda v: 0 <= v < 2**63, "an integer between 0 and 2**63 - 1"),
    "stop": (str | list | tuple, True, _are_texts, "text that is not empty, or a list of such"),
    "stop_token_ids": (list | tuple, True, lambda v: all(type(i) is int and 0 <= i < _MUCH for i in v), "a list of ids"),
    "n": (int, False, lambda v: 1 <= v <= 1024, "between 1 and 1024"),
    "logprobs": (int, True, lambda v: -1 <= v < _MUCH, "an integer, -1 (all), 0 or more, below 2**31"),
    "prompt_logprobs": (int, True, lambda v: -1 <= v < _MUCH, "an integer, -1 (all), 0 or more, below 2**31"),
}

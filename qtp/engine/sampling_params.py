"""How a request is sampled, in vLLM's words."""

from dataclasses import dataclass, fields


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
    stop_token_ids: list[int] | tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("temperature", "top_p", "min_p") or field.name.endswith("_penalty"):
                _check(
                    isinstance(value, int | float) and not isinstance(value, bool) and value == value,
                    field.name,
                    value,
                    "a number",
                )
            elif field.name in ("min_tokens", "top_k", "n") or (
                field.name in ("max_tokens", "seed", "logprobs", "prompt_logprobs") and value is not None
            ):
                _check(isinstance(value, int) and not isinstance(value, bool), field.name, value, "an integer")
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(
            0 <= self.min_tokens <= (self.max_tokens or self.min_tokens),
            "min_tokens",
            self.min_tokens,
            "between 0 and max_tokens",
        )
        _check(0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(self.top_k >= -1, "top_k", self.top_k, "0 (off) or more")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _check(0 < self.repetition_penalty < float("inf"), "repetition_penalty", self.repetition_penalty, "above 0")
        _check(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "between -2 and 2")
        _check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "between -2 and 2")
        _check(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2**63 - 1")
        _check(1 <= self.n <= 1024, "n", self.n, "between 1 and 1024")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or value >= -1, name, value, "-1 (all), 0 or more")
        stops_listed = self.stop is None or isinstance(self.stop, str | list | tuple)
        _check(stops_listed and all(isinstance(s, str) and s for s in self.stops), "stop", self.stop, "text that is not empty")
        ids_listed = isinstance(self.stop_token_ids, list | tuple)
        _check(
            ids_listed and all(type(i) is int for i in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            "a list of ids",
        )

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def _check(good: bool, name: str, value: object, needed: str) -> None:
    if not good:
        raise ValueError(f"{name} {value!r} is out of range; it must be {needed}")

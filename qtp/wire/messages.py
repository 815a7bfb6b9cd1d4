"""The messages of the control channel: frozen, made of plain values only."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSpec:
    """How the tokens of one sequence are chosen; constant over its life. Meanings and ranges as in `SamplingParams`.

    seed: of this sequence; with the number of tokens sampled so far it fixes each draw, whatever else is in the step.
    logprobs, prompt_logprobs: how many to return for each token, or None. stop_token_ids: what min_tokens holds back.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def only_best(self) -> bool:
        """Whether each token is the best of the logits as they are, and nothing else is told."""
        told = self.logprobs is not None or self.prompt_logprobs is not None
        penalised = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return not (self.temperature or told or penalised or self.min_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewSequence:
    """A sequence that workers do not know: a new one, or one that comes back after a preemption.

    token_ids: prompt and what was sampled before; the first `prompt_len` of them are the prompt.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    prompt_len: int
    sampling: SamplingSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """One sequence's part in a step: its tokens at positions start .. start + count - 1 are computed.

    appended: tokens sampled since the workers last heard of this sequence. new_blocks: KV blocks added to its table.
    sample: the chunk reaches the last token, so the next one is sampled.
    """

    seq_id: int
    start: int
    count: int
    sample: bool
    appended: tuple[int, ...] = ()
    new_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One step, for every rank. dropped: sequences that are forgotten first (ended or preempted); then `started` are
    learned; then `chunks` run."""

    step: int
    dropped: tuple[int, ...] = ()
    started: tuple[NewSequence, ...] = ()
    chunks: tuple[Chunk, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities before temperature and penalties. The first entry is the token itself, then the
    most likely ones in order. ranks: 1 is the most likely token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a step gave one sequence. token: the sampled id, or None if the chunk ended before the sequence's last token.
    prompt_logprobs: for the prompt positions start + 1, start + 2, ... that this chunk predicts."""

    seq_id: int
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Rank 0's result of a step, a Sample for each chunk that has something to say."""

    step: int
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """The first frame from a rank, after the token: who it is, and a digest of its model and settings. machine: equal
    where process ids mean the same (see `collectives.network.machine_identity`)."""

    rank: int
    host: str
    pid: int
    fingerprint: str = ""
    machine: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome:
    """Rank 0's answer to a Hello: who rank 0 is."""

    host: str
    pid: int
    machine: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ping:
    """Rank 0 is alive, and asks whether the other rank is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pong:
    """The answer to a Ping, whatever the rank is busy with. step: the plan that it runs, -1 if none; entered: how many
    collectives it has entered since it joined."""

    step: int
    entered: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A rank has read its weights and made its KV cache. bytes_read: from the checkpoint; weight_bytes: that it holds;
    cores: its threads and where they run, in words."""

    rank: int
    bytes_read: int
    weight_bytes: int
    cores: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A rank gives up: one line that names the cause, and its traceback if it was not the user's mistake."""

    rank: int
    cause: str
    details: str
    user_error: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """No more steps: ranks end with exit code 0."""


Message = Hello | Welcome | Ready | Failure | Stop | StepPlan | StepResult | Ping | Pong

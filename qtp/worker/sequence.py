"""What a worker remembers of a sequence between steps."""

from dataclasses import dataclass, field

from qtp.wire.messages import SamplingSpec


@dataclass(kw_only=True, slots=True)
class Sequence:
    """token_ids: prompt and sampled tokens so far; blocks: the KV block table. Both grow as plans arrive."""

    token_ids: list[int]
    prompt_len: int
    sampling: SamplingSpec
    blocks: list[int] = field(default_factory=list)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

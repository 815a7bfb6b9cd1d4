"""Perplexity of a checkpoint on a text, by the runtime's own worker: over all ranks of a communicator, each with its shard."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, fsum
from pathlib import Path

from collectives.communicator import Communicator
from qtp.config import EngineConfig, ModelConfig
from qtp.resolve import context_limit, resolve
from qtp.wire.messages import Chunk, NewSequence, SamplingSpec, StepPlan
from qtp.worker.worker import Worker

_BLOCK = 128
_TOGETHER = 4  # windows in a step


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-probability of `tokens` tokens."""

    value: float
    tokens: int


def perplexity(folder: Path, ids: Sequence[int], comm: Communicator, *, window: int = 512, dtype: str = "auto") -> Perplexity:
    """Over windows of `window` tokens, each half a window further than the last; of all but the first one the second half counts,
    so that each token but the very first counts once. All ranks must call it; rank 0 gets the answer. ValueError for a text
    that is too short."""
    model = ModelConfig.load(folder)
    window = min(window, context_limit(model))
    windows = sliding(len(ids), window)
    blocks = -(-window // _BLOCK)
    asked = EngineConfig(
        model=str(folder),
        tp=comm.size,
        dtype=dtype,
        device=comm.device.type,
        communicator="solo",
        block_size=_BLOCK,
        max_model_len=window,
        num_kv_blocks=_TOGETHER * blocks,
    )
    worker = Worker(resolve(asked, model, comm.size, cuda=comm.device.type == "cuda"), model, comm)
    logprobs: list[float] = []
    for step, first in enumerate(range(0, len(windows), _TOGETHER)):
        some = list(enumerate(windows[first : first + _TOGETHER], start=first))
        plan = StepPlan(
            step=step,
            dropped=tuple(range(max(first - _TOGETHER, 0), first)),
            started=tuple(_sequence(number, ids[span.start : span.stop]) for number, (span, _) in some),
            chunks=tuple(
                Chunk(
                    seq_id=number,
                    start=0,
                    count=len(span),
                    sample=False,
                    new_blocks=tuple(range(i * blocks, i * blocks + -(-len(span) // _BLOCK))),
                )
                for i, (number, (span, _)) in enumerate(some)
            ),
        )
        told = {sample.seq_id: sample.prompt_logprobs for sample in worker.execute(plan).samples}
        for number, (span, counted) in some if comm.rank == 0 else ():
            logprobs += [entry.logprobs[0] for entry in told[number][-counted:]]
            assert len(told[number]) == len(span) - 1
    return Perplexity(exp(-fsum(logprobs) / len(logprobs)) if logprobs else 0.0, len(logprobs))


def sliding(length: int, window: int) -> list[tuple[range, int]]:
    """Windows over `length` tokens, and how many tokens at the end of each count. ValueError if there are fewer than two."""
    if length < 2:
        raise ValueError("--evaluate: the text has fewer than two tokens; give a longer one")
    stride = max(window // 2, 1)
    windows = [(range(min(window, length)), min(window, length) - 1)]
    while windows[-1][0].stop < length:
        stop = min(windows[-1][0].stop + stride, length)
        windows.append((range(max(stop - window, 0), stop), stop - windows[-1][0].stop))
    return windows


def _sequence(number: int, ids: Sequence[int]) -> NewSequence:
    return NewSequence(seq_id=number, token_ids=tuple(ids), prompt_len=len(ids), sampling=SamplingSpec(prompt_logprobs=0))

"""Measures what a card has room for beside the weights, by a step of the largest size, and turns running out of memory into the
user's line. Also the other steps that a worker runs before there are requests."""

import functools
import hashlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch

from collectives.communicator import Communicator
from collectives.network import machine_identity
from qtp.config import EngineConfig
from qtp.memory import Doing, Use, ran_out
from qtp.wire.messages import Chunk, NewSequence, SamplingSpec, StepPlan

P = ParamSpec("P")
R = TypeVar("R")


class Card(Protocol):
    """The memory of the device that a rank runs on, in bytes. What is said of this process goes for all ranks that are threads
    of it together."""

    @property
    def place(self) -> int:
        """The same number for ranks on the same card and for no others; 63 bits."""
        ...

    @property
    def process(self) -> int:
        """The same number for ranks of the same process and for no others; 63 bits."""
        ...

    def release(self) -> None:
        """Gives what this process holds without using it back to the card, and begins to note its peak anew."""
        ...

    def peak(self) -> int:
        """The most that this process has taken from the card since `release`."""
        ...

    def taken(self) -> int:
        """What this process has taken from the card by now."""
        ...

    def card(self) -> tuple[int, int]:
        """(what the card has free, what it has in all), whoever took the rest."""
        ...


class TorchCard:
    """A Card through torch's caching allocator: what is taken are its segments, so that their fragments count."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        host = machine_identity() or socket.gethostname()
        # Two processes may call one card by two numbers, or two cards by one, as CUDA_VISIBLE_DEVICES has it.
        name = getattr(self._module.get_device_properties(device), "uuid", None) or f"{host} {os.getpid()} {device}"
        self.place, self.process = _number(f"{device.type} {name}"), _number(f"{host} {os.getpid()}")

    def release(self) -> None:
        self._module.synchronize(self._device)
        self._module.empty_cache()
        self._module.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        self._module.synchronize(self._device)
        return int(self._module.max_memory_reserved(self._device))

    def taken(self) -> int:
        return int(self._module.memory_reserved(self._device))

    def card(self) -> tuple[int, int]:
        free, total = self._module.mem_get_info(self._device)
        return int(free), int(total)


def card_of(device: torch.device) -> Card:
    return TorchCard(device)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def measure(card: Card, comm: Communicator, step: Callable[[], object], *, weights: int, block: int) -> list[Use]:
    """Runs `step` on every rank at once, and returns every rank's Use, in order. Ranks that share a card must not look at it
    while another one's memory moves, so all of them meet between these acts; every rank must call it."""
    _exchange(comm, [0])
    card.release()
    _exchange(comm, [0])
    step()
    _exchange(comm, [0])
    peak = card.peak()
    _exchange(comm, [0])
    card.release()
    _exchange(comm, [0])
    free, total = card.card()
    rows = _exchange(comm, [card.place, card.process, total, total - free, max(0, peak - card.taken()), weights, block])
    names = ("card", "process", "total", "used", "step", "weights", "block")
    return [Use(**dict(zip(names, row, strict=True))) for row in rows]


def _exchange(comm: Communicator, row: Sequence[int]) -> list[list[int]]:
    """Every rank's row, on the host."""
    mine = torch.tensor([row], dtype=torch.int64, device=comm.device)
    rows: list[list[int]] = comm.all_gather(mine).tolist()
    comm.check()
    return rows


# Tokens from which on another kernel is taken: for one, few and some, larger tiles, other tiles of experts.
_SIZES = (1, 2, 5, 17, 33, 65, 129, 257, 1025)


def largest_step(config: EngineConfig, vocab_size: int) -> tuple[StepPlan, StepPlan]:
    """A step of max_num_batched_tokens tokens in as many sequences as there may be, one token each but for the last ones, all
    sampled from their whole logits; and the step that forgets them. All their KV goes to block 0."""
    assert config.max_model_len is not None
    count = min(config.max_num_seqs, config.max_num_batched_tokens)
    lengths, left = [1] * count, config.max_num_batched_tokens - count
    for i in reversed(range(count)):
        more = min(left, config.max_model_len - 1)
        lengths[i], left = lengths[i] + more, left - more
    return _step(lengths, SamplingSpec(logprobs=0), config, vocab_size)


def first_steps(config: EngineConfig, vocab_size: int) -> list[StepPlan]:
    """Steps that ask for the kernels which requests will, where each is compiled when it is first met: a prompt of each of
    _SIZES, for they differ in the number of tokens, and so many sequences, and the most, chosen by the best, from whole logits
    and by top_k. All their KV goes to block 0."""
    assert config.max_model_len is not None
    specs = (SamplingSpec(), SamplingSpec(logprobs=0), SamplingSpec(temperature=1.0, top_k=2))
    steps = [_step([n], specs[0], config, vocab_size) for n in _SIZES if n <= config.max_model_len - 1]
    rows = sorted({n for n in _SIZES if n < config.max_num_seqs} | {config.max_num_seqs})
    steps += [_step([1] * n, spec, config, vocab_size) for n in rows for spec in specs]
    return [plan for step in steps if sum(c.count for c in step[0].chunks) <= config.max_num_batched_tokens for plan in step]


def _step(lengths: Sequence[int], spec: SamplingSpec, config: EngineConfig, vocab_size: int) -> tuple[StepPlan, StepPlan]:
    started = tuple(
        NewSequence(seq_id=i, token_ids=tuple((i + at) % vocab_size for at in range(n)), prompt_len=n, sampling=spec)
        for i, n in enumerate(lengths)
    )
    chunks = tuple(
        Chunk(seq_id=i, start=0, count=n, sample=True, new_blocks=(0,) * -(-n // config.block_size))
        for i, n in enumerate(lengths)
    )
    return StepPlan(step=0, started=started, chunks=chunks), StepPlan(step=0, dropped=tuple(range(len(lengths))))


class Works(Protocol):
    """What may run out of memory: on which device, and doing what at the moment."""

    doing: Doing
    device: torch.device


W = TypeVar("W", bound=Works)
# In the words of what asks the driver by itself: CUDA graphs, Triton loading a kernel, cuBLAS.
_OUT_OF_MEMORY = ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def naming_memory(method: Callable[Concatenate[W, P], R]) -> Callable[Concatenate[W, P], R]:
    """`method`, in which a failed allocation on the device is a ValueError: one line that says during what, and what helps."""

    @functools.wraps(method)
    def run(self: W, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in _OUT_OF_MEMORY):
                raise
            line = ran_out(self.doing, str(self.device), error)
        raise ValueError(line)

    return cast(Callable[Concatenate[W, P], R], run)

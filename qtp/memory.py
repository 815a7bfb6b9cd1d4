"""What a card has room for, from what its ranks measured, and what is said where memory runs out. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from qtp.config import EngineConfig
from qtp.resolve import blocks_of

_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """What a rank found on its card once its weights were there and a step of the largest size had run; in bytes, two apart.

    card, process: numbers that ranks on one card, and ranks of one process, share. total: of the card; used: of it, by whomever,
    between steps and without a KV cache; step: what this rank's process takes on top of that in a step; weights: of this rank;
    block: of one KV block of it.
    """

    card: int
    process: int
    total: int
    used: int
    step: int
    weights: int
    block: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """A card's memory as its ranks share it. spare: bytes for the KV caches of all of them, below 0 if not even the rest fits;
    block: of one KV block on each of them; rank: the first of them."""

    rank: int
    total: int
    usable: int
    used: int
    step: int
    weights: int
    block: int

    @property
    def spare(self) -> int:
        return self.usable - self.used - self.step

    @property
    def blocks(self) -> int:
        """KV blocks that each rank of the card can have."""
        return max(0, self.spare) // self.block


def rooms(uses: Sequence[Use], utilization: float) -> list[Room]:
    """The cards of the ranks whose Use is given in order, by their first rank. What others hold counts once a card, the working
    memory of a step once a process: ranks that share a card may all be in a step, and those of one process were measured
    together. Of figures that ought to be alike the largest counts."""
    found = []
    for card in dict.fromkeys(use.card for use in uses):
        ranks = [rank for rank, use in enumerate(uses) if use.card == card]
        own = [uses[rank] for rank in ranks]
        steps = {p: max(use.step for use in own if use.process == p) for p in {use.process for use in own}}
        total = min(use.total for use in own)
        found.append(
            Room(
                rank=ranks[0],
                total=total,
                usable=int(total * utilization),
                used=max(use.used for use in own),
                step=sum(steps.values()),
                weights=sum(use.weights for use in own),
                block=sum(use.block for use in own),
            )
        )
    return found


def kv_blocks(uses: Sequence[Use], config: EngineConfig) -> int:
    """The KV blocks of every rank: what the fullest card has room for within gpu_memory_utilization, and no more than
    max_num_seqs sequences of max_model_len tokens could use. ValueError, the same on every rank, if not even one such sequence
    fits."""
    tightest = min(rooms(uses, config.gpu_memory_utilization), key=lambda room: room.blocks)
    needed = blocks_of(config)
    if tightest.blocks < needed:
        raise ValueError(_too_little(tightest, needed, config))
    return min(tightest.blocks, config.max_num_seqs * needed)


def _too_little(room: Room, needed: int, config: EngineConfig) -> str:
    fits = room.blocks * config.block_size
    lower = f"max_model_len to {fits} or less, " if fits else ""
    more = "tp" if config.gpu_memory_utilization == 1 else "tp or gpu_memory_utilization"
    return (
        f"{_where(room, config)} is {_gib(room.usable)} GiB: {_spent(room, config)}, so {_gib(room.spare)} GiB are left, and the "
        f"KV cache of one sequence of max_model_len {config.max_model_len} needs {_gib(needed * room.block)}; lower {lower}"
        f"max_num_batched_tokens or max_num_seqs, raise {more}, or use a card that is free"
    )


def told(uses: Sequence[Use], blocks: int, config: EngineConfig) -> str:
    """How `blocks` came about, in one line."""
    room = min(rooms(uses, config.gpu_memory_utilization), key=lambda room: room.blocks)
    most = config.max_num_seqs * blocks_of(config)
    why = f"all that {config.max_num_seqs} sequences can use" if blocks == most else "all that fit"
    return (
        f"{blocks} KV blocks of {config.block_size} tokens ({_gib(blocks * room.block)} GiB), {why}: {_where(room, config)} is "
        f"{_gib(room.usable)} GiB, {_spent(room, config)}"
    )


def _where(room: Room, config: EngineConfig) -> str:
    return f"gpu_memory_utilization {config.gpu_memory_utilization:g} of the {_gib(room.total)} GiB of rank {room.rank}'s card"


def _spent(room: Room, config: EngineConfig) -> str:
    others = max(0, room.used - room.weights)
    return (
        f"weights take {_gib(room.weights)}, a step of {config.max_num_batched_tokens} tokens {_gib(room.step)}, the libraries "
        f"and other processes {_gib(others)}"
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}"


@dataclass(frozen=True, slots=True)
class Doing:
    """Something during which memory may run out, and what helps then."""

    words: str
    way_out: str


READING = Doing("reading the weights", "raise tp, take a quantized checkpoint, or use a card that is free")
MEASURING = Doing(
    "running a step of the largest size", "lower max_num_batched_tokens or max_num_seqs, raise tp, or use a card that is free"
)
BEGINNING = Doing(
    "running the first steps", "lower gpu_memory_utilization, num_kv_blocks, max_num_batched_tokens or max_num_seqs"
)
ALLOCATING = Doing("making the KV cache", "lower gpu_memory_utilization, num_kv_blocks or kv_cache_gib")
CAPTURING = Doing("capturing CUDA graphs", "lower gpu_memory_utilization or max_num_seqs")
STEPPING = Doing("running a step", "lower gpu_memory_utilization, num_kv_blocks, max_num_batched_tokens or max_num_seqs")


def ran_out(doing: Doing, device: str, error: Exception) -> str:
    """The line for an allocation that failed on `device` with `error`, of whose message the sentence with the size is kept."""
    said = " ".join(str(error).split()).split(". ")
    size = next((part for part in said if part.startswith("Tried to allocate")), "")
    asked = f" ({size[:1].lower()}{size[1:].rstrip('.')})" if size else ""
    return f"out of memory on {device} while {doing.words}{asked}; {doing.way_out}"

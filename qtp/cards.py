"""Cards by name, and the limits that their memory and their arithmetic set to a model. Imports no torch."""

from dataclasses import dataclass

from qtp.config import ModelConfig
from qtp.layout.split import Grid
from qtp.resolve import ITEM_SIZE
from qtp.weights.names import declare

_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """memory: bytes as the driver tells them, of which a run gets a share; bandwidth: of that memory, bytes a second; peak: of
    its matrix units in bfloat16 without sparsity, operations a second. The last two as its maker publishes them."""

    name: str
    memory: int
    bandwidth: float
    peak: float


def _card(name: str, gib: float, terabytes: float, teraflops: float) -> Card:
    return Card(name=name, memory=int(gib * _GIB), bandwidth=terabytes * 1e12, peak=teraflops * 1e12)


CARDS = {
    card.name.lower(): card
    for card in (
        _card("H100", 79.1, 3.35, 989.4),
        _card("H200", 139.8, 4.8, 989.4),
        _card("A100-80", 79.2, 2.039, 312.0),
        _card("A100-40", 39.4, 1.555, 312.0),
        _card("L40S", 44.4, 0.864, 362.0),
        _card("RTX4090", 23.6, 1.008, 165.2),
        _card("910B", 60.9, 1.6, 313.0),
    )
}


def card(name: str) -> Card:
    """The card of that name, in any case. Raises ValueError if there is none."""
    if name.lower() not in CARDS:
        raise ValueError(f"--card {name} is unknown; choose {', '.join(c.name for c in CARDS.values())}, or give --memory")
    return CARDS[name.lower()]


def reached(model: ModelConfig, tokens: int) -> float:
    """The part of the experts that `tokens` tokens reach between them, if each chooses its own at random."""
    return 1.0 if model.moe is None else 1.0 - (1.0 - model.moe.top_k / model.moe.num_experts) ** tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a rank holds that steps read and multiply with: bytes of weights but an embedding that is no head as well; elements of
    matrices but embedding and head; of both, apart from them, those of experts."""

    bytes: int
    elements: int
    expert_bytes: int
    expert_elements: int


def loads(model: ModelConfig, grid: Grid, dtype: str) -> list[Load]:
    """The Load of each rank."""
    item, specs = ITEM_SIZE[dtype], [s for s in declare(model) if s.name != "embed.weight" or model.tie_word_embeddings]

    def load(rank: int) -> Load:
        sizes, elements = [0, 0], [0, 0]
        for spec in specs:
            routed = ".moe.experts." in spec.name
            sizes[routed] += spec.bytes(rank, grid, item, expanded=True)
            if not spec.name.startswith(("embed", "lm_head")) and len(spec.parts[0].shape) == 2:
                elements[routed] += spec.elements(rank, grid)
        return Load(bytes=sizes[0], elements=elements[0], expert_bytes=sizes[1], expert_elements=elements[1])

    return list(map(load, range(grid.size)))


def bytes_read(model: ModelConfig, ranks: list[Load], sequences: int) -> int:
    """Bytes of weights that a decode step of `sequences` reads on the rank that reads most; of experts, what the tokens reach."""
    part = reached(model, sequences)
    return int(max(rank.bytes + part * rank.expert_bytes for rank in ranks))


def decode_limit(read: int, kv: int, device: Card, sequences: int) -> float:
    """Tokens a second that reading memory allows in decode of `sequences`: each step reads `read` bytes of weights and `kv`
    bytes of keys and values for each sequence."""
    return sequences * device.bandwidth / (read + sequences * kv)


def prefill_limit(model: ModelConfig, ranks: list[Load], device: Card) -> float:
    """Prompt tokens a second that the products with weights allow, all in bfloat16: two operations for each weight that a token
    meets on the rank where it meets most. Attention and the head, which is for a prompt's last token, come on top."""
    part = reached(model, 1)
    return device.peak / (2 * max(rank.elements + part * rank.expert_elements for rank in ranks))

"""The linear layers that can be quantized, by the model's own declarations, and which stay in float. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from qtp.config import ModelConfig
from qtp.quantization import FLOAT
from qtp.quantize.settings import Settings
from qtp.weights.names import declare

_PACKED = re.compile(
    r"(?:layers\.(\d+)\.(?:attention\.(?:qkv|o)|(?:mlp|moe\.experts\.\d+|moe\.shared)\.(?:gate_up|down))|lm_head)\.weight"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One linear layer, [n, k]. name: in the checkpoint, without '.weight'. own: of the layer of the running model that it is a
    part of, by which its input goes, and first: its first row there. norm: what its input comes from, if it is one."""

    name: str
    own: str
    first: int
    shape: tuple[int, int]
    biased: bool
    layer: int | None
    norm: str | None

    @property
    def expert(self) -> int | None:
        found = re.search(r"\.experts\.(\d+)\.", self.name)
        return int(found[1]) if found else None

    def ends(self, *names: str) -> bool:
        return self.name.rsplit(".", 1)[-1] in names


def linears(config: ModelConfig) -> tuple[Linear, ...]:
    """In the order of the model. A tied lm_head is among them, as if it had a weight of its own."""
    specs = declare(replace(config, quantization=None, tie_word_embeddings=False))
    names = {spec.name for spec in specs}
    found = []
    for spec in specs:
        match = _PACKED.fullmatch(spec.name)
        if match is None:
            continue
        own, first = spec.name.removesuffix(".weight"), 0
        layer = None if match[1] is None else int(match[1])
        for part in spec.parts:
            n, k = part.shape
            found.append(
                Linear(
                    name=part.name.removesuffix(".weight"),
                    own=own,
                    first=first,
                    shape=(n, k),
                    biased=f"{own}.bias" in names,
                    layer=layer,
                    norm=_norm(own, layer),
                )
            )
            first += n
    return tuple(found)


def _norm(own: str, layer: int | None) -> str | None:
    if own.endswith(".qkv"):
        return f"model.layers.{layer}.input_layernorm"
    return f"model.layers.{layer}.post_attention_layernorm" if own.endswith(".gate_up") else None


def forms(config: ModelConfig, asked: Settings) -> dict[str, str]:
    """The type of each linear layer by name: `asked.kind`, `asked.head_kind`, or FLOAT. Raises ValueError for a name that is no
    layer's."""
    every = linears(config)
    for pattern in asked.disable_names:
        if pattern != "lm_head" and not any(fnmatchcase(linear.name, pattern) for linear in every):
            raise ValueError(
                f"--disable_names {pattern}: no such linear layer; give names such as {every[0].name}, or patterns as '*.o_proj'"
            )

    def form(linear: Linear) -> str:
        if linear.ends("down_proj") and not asked.down_proj:
            return FLOAT
        if any(fnmatchcase(linear.name, pattern) for pattern in asked.disable_names):
            return FLOAT
        return asked.kind if linear.layer is not None else asked.head_kind

    return {linear.name: form(linear) for linear in every}


def disable_more(chosen: Mapping[str, str], scores: Mapping[str, float], count: int) -> dict[str, str]:
    """`chosen` with `count` more layers in FLOAT: those of the highest scores, the first among equals."""
    open_to = [name for name, form in chosen.items() if form != FLOAT and name in scores]
    worst = sorted(open_to, key=lambda name: -scores[name])[:count]
    return {name: FLOAT if name in worst else form for name, form in chosen.items()}


def in_one_form(norm_of: Sequence[Linear], chosen: Mapping[str, str]) -> bool:
    """Whether the layers behind a norm are all quantized, or, where no expert is among them, at least one is: then they can take
    a norm of their own."""
    quantized = [chosen[linear.name] != FLOAT for linear in norm_of]
    return all(quantized) if any(linear.expert is not None for linear in norm_of) else any(quantized)

"""Names of tensors as MindFormers has them (its convert_weight.py for qwen2 and qwen2_moe), to and from those of Hugging Face.

The modules of a layer have other names, and the experts of a layer are stacked: experts.{e}.gate_proj.weight [n, k] of all e are
routed_experts.ffn.w1.weight [E, n, k]. Its transposed form (use_gmm, [E, k, n]) is another one, whose shapes do not fit.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

from qtp.weights.store import ITEM_SIZE, Entry

_TOP = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.weight": "model.norm_out.weight",
}
_MODULES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.gate": "feed_forward.routed_experts.router.dense",
    "mlp.shared_expert.gate_proj": "feed_forward.shared_experts.w1",
    "mlp.shared_expert.down_proj": "feed_forward.shared_experts.w2",
    "mlp.shared_expert.up_proj": "feed_forward.shared_experts.w3",
    "mlp.shared_expert_gate": "feed_forward.shared_experts_gate",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_STACKED = {"gate": "w1", "down": "w2", "up": "w3"}
_EXPERT = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(\d+)\.(gate|down|up)_proj\.(.+)")
_STACK = re.compile(r"(model\.layers\.\d+)\.feed_forward\.routed_experts\.ffn\.(w[123])\.(.+)")
_LAYER = re.compile(r"(model\.layers\.\d+)\.(.+)")


def to_mindformers(name: str) -> tuple[str, int | None]:
    """(the name there, which expert of a stack it is). What has no other name there keeps its own."""
    if expert := _EXPERT.fullmatch(name):
        layer, number, kind, leaf = expert.groups()
        return f"{layer}.feed_forward.routed_experts.ffn.{_STACKED[kind]}.{leaf}", int(number)
    return _TOP.get(name) or _renamed(name, _MODULES), None


def from_mindformers(name: str, expert: int = 0) -> str:
    """The name here; of a stack, that of this expert."""
    if stack := _STACK.fullmatch(name):
        layer, kind, leaf = stack.groups()
        (ours,) = (k for k, v in _STACKED.items() if v == kind)
        return f"{layer}.mlp.experts.{expert}.{ours}_proj.{leaf}"
    return next((k for k, v in _TOP.items() if v == name), None) or _renamed(name, {v: k for k, v in _MODULES.items()})


def is_mindformers(names: Iterable[str]) -> bool:
    return _TOP["model.embed_tokens.weight"] in names


def is_stack(name: str) -> bool:
    return _STACK.fullmatch(name) is not None


def unstacked(entries: Mapping[str, Entry], first: Mapping[str, int] | None = None) -> dict[str, Entry]:
    """Entries under the names of Hugging Face: each expert of a stack lies behind the one before. `first`: the number of the
    first expert of each stack, 0 where it is not named."""
    found = {}
    for name, entry in entries.items():
        if not is_stack(name) or not entry.shape:
            found[from_mindformers(name)] = entry
            continue
        size = prod(entry.shape[1:]) * ITEM_SIZE[entry.dtype]
        for i in range(entry.shape[0]):
            expert = (first or {}).get(name, 0) + i
            found[from_mindformers(name, expert)] = replace(entry, shape=entry.shape[1:], offset=entry.offset + i * size)
    return found


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    if layer := _LAYER.fullmatch(name):
        prefix, rest = layer.groups()
        for module, other in modules.items():
            if rest.startswith(module + "."):
                return f"{prefix}.{other}{rest[len(module) :]}"
    return name

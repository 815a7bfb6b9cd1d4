"""Every tensor of a model, declared once: its names in the checkpoint, its shapes, and how each is cut.

The loader, the planner and the resharder all read these declarations; the model files take the loaded shards by `Spec.name`. A
linear layer of a quantized checkpoint is declared as its format has it (`weights.formats`).
"""

from collections.abc import Iterator
from itertools import groupby

from qtp.config import ModelConfig, MoeConfig
from qtp.layout.spec import FLOAT32, RUN, Part, Spec
from qtp.layout.split import Even, Expert, KVHeads, QueryHeads, Replicate, Split
from qtp.quantization import C8, FAQUANT, FLOAT, Quantization
from qtp.weights.formats import FORMATS, Linear

Layer = tuple[str, tuple[Linear, ...]]  # its weight's name in the running model, and its parts by format


def declare(config: ModelConfig) -> tuple[Spec, ...]:
    """All tensors of a Qwen2 or Qwen2-MoE model, under the names that Hugging Face checkpoints, or msModelSlim's, use."""
    specs: list[Spec] = []
    for found in _tensors(config):
        specs += [found] if isinstance(found, Spec) else [s for part in found[1] for s in FORMATS[part.kind].specs(part)]
    return tuple(specs)


def quantized_layers(config: ModelConfig) -> Iterator[Layer]:
    """The linear layers of which at least a part is quantized."""
    for found in _tensors(config):
        if not isinstance(found, Spec):
            yield found


def _tensors(config: ModelConfig) -> Iterator[Spec | Layer]:
    quantization, hidden = config.quantization, config.hidden_size
    yield _spec("embed.weight", ("model.embed_tokens.weight", (config.vocab_size, hidden), Even(0)))
    for layer in range(config.num_layers):
        yield from _block(config, layer)
    yield _spec("norm.weight", ("model.norm.weight", (hidden,), Replicate()))
    if not config.tie_word_embeddings:
        yield from _linear(quantization, "lm_head", ("lm_head", (config.vocab_size, hidden), Even(0)))


def _block(config: ModelConfig, layer: int) -> Iterator[Spec | Layer]:
    own, theirs, quantization = f"layers.{layer}", f"model.layers.{layer}", config.quantization
    hidden, heads = config.hidden_size, config.heads
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    query, kv = QueryHeads(0, heads), KVHeads(0, heads)
    qkv = (("q_proj", q_width, query), ("k_proj", kv_width, kv), ("v_proj", kv_width, kv))
    packed = ((f"{theirs}.self_attn.{n}", (w, hidden), s) for n, w, s in qkv)

    yield from _norm(quantization, f"{own}.input_norm", f"{theirs}.input_layernorm", hidden)
    yield from _linear(quantization, f"{own}.attention.qkv", *packed, biased=config.qkv_bias)
    yield from _linear(
        quantization, f"{own}.attention.o", (f"{theirs}.self_attn.o_proj", (hidden, q_width), QueryHeads(1, heads))
    )
    yield from _kv_cache(config, f"{own}.attention", f"{theirs}.self_attn")
    yield from _norm(quantization, f"{own}.post_norm", f"{theirs}.post_attention_layernorm", hidden)
    if config.moe is not None and layer in config.moe.layers:
        yield from _moe(config.moe, quantization, hidden, f"{own}.moe", f"{theirs}.mlp")
    else:
        unit = _unit(quantization, f"{theirs}.mlp")
        yield from _mlp(
            quantization, f"{own}.mlp", f"{theirs}.mlp", hidden, config.intermediate_size, Even(0, unit), Even(1, unit)
        )


def _moe(moe: MoeConfig, quantization: Quantization | None, hidden: int, own: str, theirs: str) -> Iterator[Spec | Layer]:
    yield _spec(f"{own}.router.weight", (f"{theirs}.gate.weight", (moe.num_experts, hidden), Replicate()))
    for e in range(moe.num_experts):
        expert, unit = f"{theirs}.experts.{e}", _unit(quantization, f"{theirs}.experts.{e}")
        rows, columns = (Expert(e, moe.num_experts, dim, unit) for dim in (0, 1))
        yield from _mlp(quantization, f"{own}.experts.{e}", expert, hidden, moe.expert_intermediate_size, rows, columns)
    shared, unit = f"{theirs}.shared_expert", _unit(quantization, f"{theirs}.shared_expert")
    yield from _mlp(quantization, f"{own}.shared", shared, hidden, moe.shared_intermediate_size, Even(0, unit), Even(1, unit))
    yield _spec(f"{own}.shared_gate.weight", (f"{theirs}.shared_expert_gate.weight", (1, hidden), Replicate()))


def _mlp(
    quantization: Quantization | None, own: str, theirs: str, hidden: int, width: int, rows: Split, columns: Split
) -> Iterator[Spec | Layer]:
    yield from _linear(quantization, f"{own}.gate_up", *((f"{theirs}.{n}_proj", (width, hidden), rows) for n in ("gate", "up")))
    yield from _linear(quantization, f"{own}.down", (f"{theirs}.down_proj", (hidden, width), columns))


def _linear(
    quantization: Quantization | None, own: str, *parts: tuple[str, tuple[int, int], Split], biased: bool = False
) -> Iterator[Spec | Layer]:
    """Parts whose outputs follow each other, under their names in the checkpoint without '.weight' and '.bias'."""
    kinds = [FLOAT if quantization is None else quantization.type_of(f"{name}.weight") for name, _, _ in parts]
    if set(kinds) == {FLOAT}:
        yield _spec(f"{own}.weight", *((f"{name}.weight", shape, split) for name, shape, split in parts))
        if biased:
            yield _spec(f"{own}.bias", *((f"{name}.bias", shape[:1], split) for name, shape, split in parts))
        return
    assert quantization is not None
    groups = [(kind, [part for _, part in some]) for kind, some in groupby(zip(kinds, parts, strict=True), lambda pair: pair[0])]
    yield (
        f"{own}.weight",
        tuple(
            Linear(
                own=own if len(groups) == 1 else f"{own}.{i}",
                kind=kind,
                parts=tuple(Part(f"{name}.weight", shape, split) for name, shape, split in some),
                biased=biased,
                group_size=quantization.group_size,
            )
            for i, (kind, some) in enumerate(groups)
        ),
    )


def _norm(quantization: Quantization | None, own: str, theirs: str, hidden: int) -> Iterator[Spec]:
    """With its anti-outlier twin, which quantized layers take in its place, where the checkpoint has one."""
    yield _spec(f"{own}.weight", (f"{theirs}.weight", (hidden,), Replicate()))
    if quantization is not None and f"{theirs}.module.weight" in quantization.types:
        yield _spec(f"{own}.anti.weight", (f"{theirs}.module.weight", (hidden,), Replicate()))
        yield _spec(f"{own}.anti.bias", (f"{theirs}.module.bias", (hidden,), Replicate()))


def _kv_cache(config: ModelConfig, own: str, theirs: str) -> Iterator[Spec]:
    """Scales and offsets of an int8 KV cache: of each channel in C8, of each head in FAQuant, there of the queries too."""
    if config.quantization is None or config.quantization.kv_cache is None:
        return
    heads = config.heads
    query, kv = QueryHeads(0, heads), KVHeads(0, heads)
    channels, kv_heads = (config.num_kv_heads * config.head_dim,), (config.num_kv_heads, 1)
    for word in ("scale", "offset"):
        for name in ("key", "value"):
            if config.quantization.kv_cache == C8:
                part = Part(f"{theirs}.{name[0]}_proj.kv_cache_{word}", channels, kv)
            else:
                part = Part(f"{theirs}.fa_{name[0]}.{word}", kv_heads, kv)
            yield Spec(f"{own}.{name}_{word}", (part,), FLOAT32)
        if config.quantization.kv_cache == FAQUANT:
            yield Spec(f"{own}.query_{word}", (Part(f"{theirs}.fa_q.{word}", (config.num_heads, 1), query),), FLOAT32)


def _unit(quantization: Quantization | None, mlp: str) -> int:
    """How many columns of an MLP stay together: those that its down_proj cannot part."""
    if quantization is None:
        return 1
    return FORMATS[quantization.type_of(f"{mlp}.down_proj.weight")].granularity(quantization.group_size)


def _spec(name: str, *parts: tuple[str, tuple[int, ...], Split]) -> Spec:
    return Spec(name, tuple(Part(*part) for part in parts), RUN)

"""Every tensor of a model, declared once: its names in the checkpoint, its logical shapes, and how each is cut.

The loader, the planner and the resharder all read these declarations; the model files take the loaded shards by `Spec.name`.
"""

from collections.abc import Iterator

from qtp.config import ModelConfig, MoeConfig
from qtp.layout.spec import Part, Spec
from qtp.layout.split import Even, Expert, KVHeads, QueryHeads, Replicate, Split


def declare(config: ModelConfig) -> tuple[Spec, ...]:
    """All tensors of a Qwen2 or Qwen2-MoE model, under the names that Hugging Face checkpoints use."""
    specs = [_spec("embed.weight", ("model.embed_tokens.weight", (config.vocab_size, config.hidden_size), Even(0)))]
    for layer in range(config.num_layers):
        specs += _block(config, layer)
    specs.append(_spec("norm.weight", ("model.norm.weight", (config.hidden_size,), Replicate())))
    if not config.tie_word_embeddings:
        specs.append(_spec("lm_head.weight", ("lm_head.weight", (config.vocab_size, config.hidden_size), Even(0))))
    return tuple(specs)


def _block(config: ModelConfig, layer: int) -> Iterator[Spec]:
    own, theirs = f"layers.{layer}", f"model.layers.{layer}"
    hidden, heads = config.hidden_size, config.heads
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    query, kv = QueryHeads(0, heads), KVHeads(0, heads)
    qkv = (("q_proj", q_width, query), ("k_proj", kv_width, kv), ("v_proj", kv_width, kv))

    yield _spec(f"{own}.input_norm.weight", (f"{theirs}.input_layernorm.weight", (hidden,), Replicate()))
    yield _spec(f"{own}.attention.qkv.weight", *((f"{theirs}.self_attn.{n}.weight", (w, hidden), s) for n, w, s in qkv))
    if config.qkv_bias:
        yield _spec(f"{own}.attention.qkv.bias", *((f"{theirs}.self_attn.{n}.bias", (w,), s) for n, w, s in qkv))
    yield _spec(f"{own}.attention.o.weight", (f"{theirs}.self_attn.o_proj.weight", (hidden, q_width), QueryHeads(1, heads)))
    yield _spec(f"{own}.post_norm.weight", (f"{theirs}.post_attention_layernorm.weight", (hidden,), Replicate()))
    if config.moe is not None and layer in config.moe.layers:
        yield from _moe(config.moe, hidden, f"{own}.moe", f"{theirs}.mlp")
    else:
        yield from _mlp(f"{own}.mlp", f"{theirs}.mlp", hidden, config.intermediate_size, Even(0), Even(1))


def _moe(moe: MoeConfig, hidden: int, own: str, theirs: str) -> Iterator[Spec]:
    yield _spec(f"{own}.router.weight", (f"{theirs}.gate.weight", (moe.num_experts, hidden), Replicate()))
    for e in range(moe.num_experts):
        rows, columns = Expert(e, moe.num_experts, 0), Expert(e, moe.num_experts, 1)
        yield from _mlp(f"{own}.experts.{e}", f"{theirs}.experts.{e}", hidden, moe.expert_intermediate_size, rows, columns)
    yield from _mlp(f"{own}.shared", f"{theirs}.shared_expert", hidden, moe.shared_intermediate_size, Even(0), Even(1))
    yield _spec(f"{own}.shared_gate.weight", (f"{theirs}.shared_expert_gate.weight", (1, hidden), Replicate()))


def _mlp(own: str, theirs: str, hidden: int, width: int, rows: Split, columns: Split) -> Iterator[Spec]:
    yield _spec(f"{own}.gate_up.weight", *((f"{theirs}.{n}_proj.weight", (width, hidden), rows) for n in ("gate", "up")))
    yield _spec(f"{own}.down.weight", (f"{theirs}.down_proj.weight", (hidden, width), columns))


def _spec(name: str, *parts: tuple[str, tuple[int, ...], Split]) -> Spec:
    return Spec(name, tuple(Part(*part) for part in parts))

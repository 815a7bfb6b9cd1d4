"""Qwen2-MoE (arXiv 2407.10671, section 2.2.2), for Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B.

Qwen2 with a mixture of experts in place of the MLP of the sparse layers. Experts are cut by expert over the groups of the
grid and by columns inside a group, the shared expert by columns over all ranks; their partial sums are reduced together.
"""

from torch import Tensor

from qtp.config import ModelConfig, MoeConfig
from qtp.kernels.interface import Expert, Norm, in_floats
from qtp.layers.mlp import GatedMLP
from qtp.layers.moe import MoE
from qtp.layout.leaves import leaf_experts
from qtp.models.qwen2 import Place, Qwen2ForCausalLM, block, mlp, norm
from qtp.weights.assemble import Shard


class Qwen2MoeForCausalLM(Qwen2ForCausalLM):
    """The forward of one rank, as Qwen2ForCausalLM."""

    def __init__(self, config: ModelConfig, shard: Shard, place: Place) -> None:
        assert config.moe is not None
        blocks = []
        for i in range(config.num_layers):
            post_norm = norm(config, shard, f"layers.{i}.post_norm")
            sparse = i in config.moe.layers
            feed_forward = (
                moe(config.moe, shard, place, f"layers.{i}.moe", post_norm)
                if sparse
                else mlp(shard, place, f"layers.{i}.mlp", post_norm)
            )
            blocks.append(block(config, shard, place, i, feed_forward))
        super().__init__(config, shard, place, blocks)


def moe(config: MoeConfig, shard: Shard, place: Place, own: str, norm: Norm) -> MoE:
    kernels = place.kernels
    weights = [
        Expert(*(shard[f"{own}.experts.{e}.{name}.weight"] for name in ("gate_up", "down"))) for e in range(config.num_experts)
    ]
    down, cuts = shard[f"{own}.shared.down.weight"], place.cuts.get(f"{own}.shared.down.weight")
    row = kernels.linear(down, across=place.comm) if cuts is None else kernels.linear_leaves(down, cuts, place.comm)
    shared = shard[f"{own}.shared.gate_up.weight"]
    anti = norm.anti if not isinstance(shared, Tensor) else None
    leaves = None if cuts is None else leaf_experts(config.num_experts, place.rank, place.grid)
    return MoE(
        norm=kernels.rms_norm(norm),
        anti_norm=None if anti is None else kernels.rms_norm(anti),
        router=kernels.linear(shard[f"{own}.router.weight"]),
        choose=kernels.choose(config.top_k, config.norm_topk_prob),
        experts=kernels.experts({e: expert for e, expert in enumerate(weights) if all(expert.down.shape)}, leaves),
        shared=in_floats(GatedMLP(kernels.gated(shared), row)),
        shared_gate=kernels.linear(shard[f"{own}.shared_gate.weight"]),
        scale=kernels.scale,
    )

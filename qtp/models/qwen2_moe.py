"""Qwen2-MoE (arXiv 2407.10671, section 2.2.2), for Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B.

Qwen2 with a mixture of experts in place of the MLP of the sparse layers. Experts are cut by expert over the groups of the
grid and by columns inside a group, the shared expert by columns over all ranks; their partial sums are reduced together.
"""

from qtp.config import ModelConfig, MoeConfig
from qtp.layers.linear import Linear
from qtp.layers.moe import MoE
from qtp.models.qwen2 import Place, Qwen2ForCausalLM, block, mlp
from qtp.weights.loader import Shard


class Qwen2MoeForCausalLM(Qwen2ForCausalLM):
    """The forward of one rank, as Qwen2ForCausalLM."""

    def __init__(self, config: ModelConfig, shard: Shard, place: Place) -> None:
        assert config.moe is not None
        blocks = [
            block(
                config,
                shard,
                place,
                i,
                moe(config.moe, shard, f"layers.{i}.moe") if i in config.moe.layers else mlp(shard, f"layers.{i}.mlp"),
            )
            for i in range(config.num_layers)
        ]
        super().__init__(config, shard, place, blocks)


def moe(config: MoeConfig, shard: Shard, own: str) -> MoE:
    held = [e for e in range(config.num_experts) if shard[f"{own}.experts.{e}.down.weight"].numel()]
    return MoE(
        router=Linear(shard[f"{own}.router.weight"]),
        experts={e: mlp(shard, f"{own}.experts.{e}") for e in held},
        shared=mlp(shard, f"{own}.shared"),
        shared_gate=Linear(shard[f"{own}.shared_gate.weight"]),
        top_k=config.top_k,
        norm_topk_prob=config.norm_topk_prob,
    )

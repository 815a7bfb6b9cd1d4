"""Mixture of experts with a shared expert, as in Qwen1.5-MoE and Qwen2-57B-A14B.

T tokens, D hidden, E experts, K = top_k experts a token.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qtp.layers.linear import Linear
from qtp.layers.mlp import GatedMLP


class MoE:
    """sum over the top K experts e of p_e * expert_e(x), plus sigmoid(shared_gate(x)) * shared(x), where p = softmax(router(x)),
    renormalised over the K if `norm_topk_prob`.

    Router and shared gate are on every rank; `experts` holds those (or the columns of those) that this rank owns, by index.
    Takes the full x_TD and gives ONE partial sum [T, D]: routed and shared parts added, to be reduced together.
    """

    def __init__(
        self,
        router: Linear,
        experts: Mapping[int, GatedMLP],
        shared: GatedMLP,
        shared_gate: Linear,
        top_k: int,
        norm_topk_prob: bool,
    ) -> None:
        self.router, self.experts, self.shared, self.shared_gate = router, experts, shared, shared_gate
        self.top_k, self.norm_topk_prob = top_k, norm_topk_prob

    def __call__(self, x_TD: Tensor) -> Tensor:
        weights_TK, experts_TK = self.route(x_TD)
        partial_TD = torch.sigmoid(self.shared_gate(x_TD)) * self.shared(x_TD)
        chosen = set(experts_TK.unique().tolist())
        for index in sorted(chosen & self.experts.keys()):
            tokens, place = torch.where(experts_TK == index)
            out = self.experts[index](x_TD[tokens])
            partial_TD.index_add_(0, tokens, out * weights_TK[tokens, place, None])
        return partial_TD

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of the chosen experts, [T, K] each; the softmax in float32."""
        probabilities_TE = torch.softmax(self.router(x_TD), dim=-1, dtype=torch.float32)
        weights_TK, experts_TK = torch.topk(probabilities_TE, self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK.to(x_TD.dtype), experts_TK

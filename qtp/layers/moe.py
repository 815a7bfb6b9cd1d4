"""Mixture of experts with a shared expert, as in Qwen1.5-MoE and Qwen2-57B-A14B.

T tokens, D hidden, E experts, K = top_k experts a token.
"""

from collections.abc import Callable

from torch import Tensor

from qtp.kernels.interface import Choose, Experts, Op


class MoE:
    """sum over the top K experts e of p_e * expert_e(x), plus sigmoid(shared_gate(x)) * shared(x), where p = softmax(router(x)),
    renormalised over the K if the model says so (`choose`), and x went through `norm`; `scale` is `Kernels.scale`. anti_norm:
    what the experts' x went through instead, where quantized ones have a norm of their own (`Norm.anti`).

    Router and shared gate are on every rank; `experts` holds those (or the columns of those) that this rank owns.
    Takes the full x_TD and gives ONE partial sum [T, D]: routed and shared parts added, to be reduced together. Where sums must
    not depend on the world size, `shared` gives leaves, and `experts` adds to each and then adds them up (`Kernels`).
    """

    def __init__(
        self,
        *,
        norm: Op,
        anti_norm: Op | None,
        router: Op,
        choose: Choose,
        experts: Experts,
        shared: Op,
        shared_gate: Op,
        scale: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.norm, self.anti_norm, self.router, self.choose, self.experts = norm, anti_norm, router, choose, experts
        self.shared, self.shared_gate, self.scale = shared, shared_gate, scale

    def __call__(self, x_TD: Tensor) -> Tensor:
        normed_TD = self.norm(x_TD)
        inner_TD = normed_TD if self.anti_norm is None else self.anti_norm(x_TD)
        partial_TD = self.scale(self.shared_gate(normed_TD), self.shared(inner_TD))
        return self.experts(inner_TD, *self.choose(self.router(normed_TD)), partial_TD)

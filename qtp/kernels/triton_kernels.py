"""Kernels for CUDA devices: Triton's where reading a weight takes the time or several passes become one, torch's matrix product
for several tokens. Nothing waits for the device, and nothing depends on values, so that a step can be captured in a CUDA graph;
but for experts that `triton.experts` does not take (W8A16 by group, unlike ones), which go one by one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from collectives.communicator import Communicator
from qtp.kernels import triton_quantized
from qtp.kernels.interface import Choose, Cuts, Deferred, Expert, Experts, Head, Norm, Op, RowOp
from qtp.kernels.torch_kernels import TorchKernels, grouped
from qtp.kernels.triton import routing
from qtp.kernels.triton.experts import GroupedExperts, takes
from qtp.kernels.triton.linear import OneToken
from qtp.kernels.triton.norm import rms_norm, silu_and_mul
from qtp.kernels.triton.vocabulary import VocabularyHead
from qtp.weights.quantized import Float, Packed, Weight


class TritonKernels:
    """Weights stay where they are: whoever holds an op holds its weights. Sums with cuts are torch's."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self._torch, self._device = TorchKernels(), device
        self.waits = False

    def linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        cuts: Cuts | None = None,
        across: Communicator | None = None,
    ) -> Callable[[Tensor], Any]:
        if not isinstance(weight, Tensor):
            assert bias is None, "a quantized weight holds its bias itself"
            return triton_quantized.linear(self, weight, norm=norm, cuts=cuts, across=across)
        if cuts is not None:
            return self._torch.linear(weight, bias, norm=norm, cuts=cuts)
        return _Linear(weight, bias, norm)

    def joining(self, weight: Weight) -> RowOp:
        if isinstance(weight, Float | Packed):
            return self.linear(weight)
        if not isinstance(weight, Tensor):
            return triton_quantized.joining(weight)
        op = _Linear(weight, None, None)
        return lambda x: Deferred(lambda residual: op.added(x, residual))

    def linear_leaves(self, weight: Weight, cuts: Cuts, across: Communicator | None = None) -> Op:
        if not isinstance(weight, Tensor):
            return triton_quantized.linear_leaves(self, weight, cuts, across)
        return self._torch.linear_leaves(weight, cuts, across)

    def gated(self, weight: Weight, *, norm: Norm | None = None) -> Op:
        if not isinstance(weight, Tensor):
            return triton_quantized.gated(self, weight, norm=norm)
        return _Linear(weight, None, norm, gated=True)

    def rms_norm(self, norm: Norm) -> Op:
        return lambda x: rms_norm(x, norm)

    def choose(self, top_k: int, norm_topk_prob: bool) -> Choose:
        return routing.choose(top_k, norm_topk_prob)

    def scale(self, gate: Tensor, x: Tensor) -> Tensor:
        return routing.scale(gate, x)

    def head(self, weight: Weight) -> Head:
        return VocabularyHead(weight) if isinstance(weight, Tensor) else triton_quantized.QuantizedHead(self, weight)

    def experts(self, experts: Mapping[int, Expert], leaves: Sequence[range] | None = None) -> Experts:
        if leaves is not None:
            self.waits = True
            return self._torch.experts(experts, leaves)
        whole = {e: Expert(_whole(expert.gate_up), _whole(expert.down)) for e, expert in experts.items()}
        if takes(whole):
            return GroupedExperts(whole, self._device)
        self.waits = True
        return grouped({e: (self.gated(expert.gate_up), self.linear(expert.down)) for e, expert in whole.items()})


def _whole(weight: Weight) -> Weight:
    return weight if isinstance(weight, Tensor) else triton_quantized.whole(weight)


class _Linear:
    """y = norm(x) W^T + b, or silu(gate) * up."""

    __slots__ = ("_before", "_bias", "_gated", "_norm", "_one", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, norm: Norm | None, gated: bool = False) -> None:
        self._weight, self._bias, self._norm, self._gated = weight, bias, norm, gated
        self._before = None if norm is None or norm.bias is None else norm  # which goes by itself
        self._one = OneToken(weight, bias, norm if self._before is None else None, gated)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            return self._one(x if self._before is None else rms_norm(x, self._before))
        y = F.linear(x if self._norm is None else rms_norm(x, self._norm), self._weight, self._bias)
        return silu_and_mul(y) if self._gated else y

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + x W^T, in the place of residual; for one without norm, gate and bias."""
        return self._one(x, residual) if len(x) == 1 else residual.addmm_(x, self._weight.t())

"""Kernels for CPUs from the extension module qtp.kernels._native, which chooses among instruction sets at run time.

Every output is added up in float32 in an order that depends on the weight alone, not on how many tokens are in the step.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from collectives.tree import tree_sum
from qtp.kernels.extension import native, why_not
from qtp.kernels.interface import Choose, Cuts, Expert, Experts, Head, Op

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class NativeKernels:
    """Weights stay where they are: whoever holds an op holds its weights."""

    def __init__(self) -> None:
        assert why_not() is None, why_not()

    @property
    def name(self) -> str:
        return f"native ({native.isas()[-1]})"

    def linear(self, weight: Tensor, bias: Tensor | None = None, cuts: Cuts | None = None) -> Op:
        assert bias is None or cuts is None, "a bias would be added to one rank's leaves"
        return _Linear(weight, bias, cuts=cuts)

    def linear_leaves(self, weight: Tensor, cuts: Cuts) -> Op:
        leaves = [_Linear(weight[:, a:b], cuts=(0, b - a)) for a, b in pairwise(cuts)]
        return lambda x: torch.stack([leaf(x[:, a:b]) for leaf, (a, b) in zip(leaves, pairwise(cuts), strict=True)])

    def gated(self, weight: Tensor) -> Op:
        return _Linear(weight, gated=True)

    def rms_norm(self, weight: Tensor, eps: float) -> Op:
        dtype, width, at = _DTYPES[weight.dtype], weight.shape[0], weight.data_ptr()
        run = native.rms_norm

        def norm(x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            run(dtype, x.data_ptr(), x.shape[0], width, at, eps, out.data_ptr())
            return out

        norm.weight = weight  # type: ignore[attr-defined]
        return norm

    def choose(self, top_k: int, norm_topk_prob: bool) -> Choose:
        def run(logits: Tensor) -> tuple[Tensor, Tensor]:
            tokens, experts = logits.shape
            weights = logits.new_empty(tokens, top_k)
            chosen = torch.empty(tokens, top_k, dtype=torch.int64)
            result = (weights.data_ptr(), chosen.data_ptr())
            native.choose(_DTYPES[logits.dtype], logits.data_ptr(), tokens, experts, top_k, norm_topk_prob, *result)
            return weights, chosen

        return run

    def scale(self, gate: Tensor, x: Tensor) -> Tensor:
        tokens, width = x.shape[-2:]
        native.scale(_DTYPES[gate.dtype], gate.data_ptr(), _DTYPES[x.dtype], x.data_ptr(), x.numel() // width, tokens, width)
        return x

    def head(self, weight: Tensor) -> Head:
        return _Head(weight)

    def experts(self, experts: Mapping[int, Expert], leaves: Sequence[range] | None = None) -> Experts:
        if leaves is None:
            return _Experts(experts)
        parts = [_Experts({e: experts[e] for e in leaf if e in experts}) for leaf in leaves]

        def run(x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor, partial_LTD: Tensor) -> Tensor:
            each = zip(parts, partial_LTD, strict=True)
            return tree_sum([part(x_TD, weights_TK, chosen_TK, partial_TD) for part, partial_TD in each])

        return run


class _Linear:
    """A linear layer, or a gated pair of them."""

    __slots__ = ("_bias", "_dtype", "_outputs", "_run", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False, cuts: Cuts | None = None) -> None:
        self._weight, self._bias = weight, bias
        self._outputs = weight.shape[0] // (2 if gated else 1)
        self._dtype = weight.dtype if cuts is None else torch.float32
        self._run = _handle(weight, bias, gated=gated, cuts=cuts).run

    def __call__(self, x: Tensor) -> Tensor:
        tokens, outputs = x.shape[0], self._outputs
        out = torch.empty(tokens, outputs, dtype=self._dtype)
        self._run(x.data_ptr(), tokens, x.stride(0), out.data_ptr(), outputs)
        return out


class _Head:
    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._handle = _handle(weight, cuts=(0, weight.shape[1]))
        self.logits = _Linear(weight, cuts=(0, weight.shape[1]))

    def best(self, x: Tensor, count: int, allowed: int) -> tuple[Tensor, Tensor]:
        assert 0 < count <= allowed <= self._weight.shape[0], (count, allowed, self._weight.shape)
        values = torch.empty(x.shape[0], count, dtype=torch.float32)
        columns = torch.empty(x.shape[0], count, dtype=torch.int64)
        self._handle.best(x.data_ptr(), x.shape[0], x.stride(0), count, allowed, values.data_ptr(), columns.data_ptr())
        return values, columns


class _Experts:
    def __init__(self, experts: Mapping[int, Expert]) -> None:
        self._weights = dict(experts)
        handles = [(_handle(e.gate_up, gated=True), _handle(e.down, cuts=(0, e.down.shape[1]))) for e in experts.values()]
        by_index = dict(zip(experts, handles, strict=True))
        self._run = native.Experts(*(by_index.get(i) for i in range(max(experts, default=-1) + 1))).run

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor, partial: Tensor) -> Tensor:
        tokens, choices = chosen.shape
        weights, chosen = weights.contiguous(), chosen.contiguous()
        wide = partial.dtype == torch.float32
        place = (weights.data_ptr(), chosen.data_ptr(), choices, partial.data_ptr(), wide)
        self._run(x.data_ptr(), tokens, x.stride(0), *place)
        return partial


def _handle(weight: Tensor, bias: Tensor | None = None, *, gated: bool = False, cuts: Cuts | None = None) -> Any:
    """cuts: outputs are float32."""
    rows, columns = weight.shape
    assert weight.stride(1) == 1 or min(weight.shape) < 2, "a weight is row-major"
    return native.Linear(
        _DTYPES[weight.dtype],
        rows,
        columns,
        weight.data_ptr(),
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        0,
        0.0,
        gated,
        cuts is not None,
        cuts or (0, columns),
    )

"""Kernels for CPUs from the extension module qtp.kernels._native, which chooses among instruction sets at run time.

Every output is added up in float32 in an order that depends on the weight alone, not on how many tokens are in the step.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from collectives.communicator import Communicator
from collectives.tree import TreeReduce, tree_sum
from qtp.kernels import native_quantized
from qtp.kernels.extension import native, why_not
from qtp.kernels.interface import Choose, Cuts, Deferred, Expert, Experts, Head, Norm, Op, RowOp, Whole
from qtp.kernels.native_quantized import DTYPES, normed
from qtp.weights.quantized import Weight

# Tokens from which on torch's matrix product is faster, in float32, bfloat16, float16; measured on 896 x 9728, 4864 x 896, 1536 x
# 17920 by 1 and 2 threads. With AVX512 it is not: at 512 tokens in bfloat16 it gains up to 3 % at best, and loses more to norms
# and gates, which are fused here. With AVX2 it is in float32 (by 1.5 at 512 tokens), and takes 4 to 5 times as long in halves.
_NEVER = sys.maxsize
_MANY = {
    "amx": (128, 128, 128),
    "avx512bf16": (_NEVER, _NEVER, _NEVER),
    "avx512": (_NEVER, _NEVER, _NEVER),
    "avx2": (64, _NEVER, _NEVER),
    "baseline": (32, 32, 32),
}
_FEW = 65  # tokens, from which on what Python takes for a step is nothing beside its products
_TILE = 512  # tokens; what is larger comes as fresh memory from the system each time, which doubles the time of a product
Attention = tuple[int, int, int, int, int]  # addresses of the spec, keys and values, the window, the address of scales


class NativeKernels:
    """Weights stay where they are: whoever holds an op holds its weights. deterministic: every product is native."""

    def __init__(self, *, deterministic: bool = False) -> None:
        assert why_not() is None, why_not()
        self._many = (_NEVER,) * 3 if deterministic else _MANY[native.isas()[-1]]

    waits = True

    @property
    def name(self) -> str:
        return f"native ({native.isas()[-1]})"

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
            return native_quantized.linear(self, weight, norm=norm, cuts=cuts, across=across)
        assert bias is None or cuts is None, "a bias would be added to one rank's leaves"
        if norm is not None and norm.bias is not None:
            return _after(self.rms_norm(norm), self.linear(weight, bias, cuts=cuts))
        return Linear(weight, bias, norm=norm, cuts=cuts, many=self._many[DTYPES[weight.dtype]])

    def joining(self, weight: Weight) -> Op:
        return self.linear(weight)

    def linear_leaves(self, weight: Weight, cuts: Cuts, across: Communicator | None = None) -> Op:
        if not isinstance(weight, Tensor):
            return native_quantized.linear_leaves(self, weight, cuts, across)
        leaves = [Linear(weight[:, a:b], cuts=(0, b - a)) for a, b in pairwise(cuts)]
        return lambda x: torch.stack([leaf(x[:, a:b]) for leaf, (a, b) in zip(leaves, pairwise(cuts), strict=True)])

    def gated(self, weight: Weight, *, norm: Norm | None = None) -> Op:
        if not isinstance(weight, Tensor):
            return native_quantized.gated(self, weight, norm=norm)
        if norm is not None and norm.bias is not None:
            return _after(self.rms_norm(norm), self.gated(weight))
        return Linear(weight, gated=True, norm=norm, many=self._many[DTYPES[weight.dtype]])

    def rms_norm(self, norm: Norm) -> Op:
        return lambda x: normed(x, norm)

    def choose(self, top_k: int, norm_topk_prob: bool) -> Choose:
        def run(logits: Tensor) -> tuple[Tensor, Tensor]:
            tokens, experts = logits.shape
            weights = logits.new_empty(tokens, top_k)
            chosen = torch.empty(tokens, top_k, dtype=torch.int64)
            result = (weights.data_ptr(), chosen.data_ptr())
            native.choose(DTYPES[logits.dtype], logits.data_ptr(), tokens, experts, top_k, norm_topk_prob, *result)
            return weights, chosen

        return run

    def scale(self, gate: Tensor, x: Tensor) -> Tensor:
        tokens, width = x.shape[-2:]
        native.scale(DTYPES[gate.dtype], gate.data_ptr(), DTYPES[x.dtype], x.data_ptr(), x.numel() // width, tokens, width)
        return x

    def head(self, weight: Weight) -> Head:
        if not isinstance(weight, Tensor):
            return native_quantized.QuantizedHead(self, weight)
        return _Head(weight)

    def experts(self, experts: Mapping[int, Expert], leaves: Sequence[range] | None = None) -> Experts:
        both = ((i, e.gate_up, e.down) for i, e in experts.items())
        held = {i: (up, down) for i, up, down in both if isinstance(up, Tensor) and isinstance(down, Tensor)}
        if len(held) < len(experts):
            return native_quantized.experts(self, experts, leaves)
        if leaves is None:
            return _Experts(held)
        parts = [_Experts({e: held[e] for e in leaf if e in held}) for leaf in leaves]

        def run(x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor, partial_LTD: Tensor) -> Tensor:
            each = zip(parts, partial_LTD, strict=True)
            return tree_sum([part(x_TD, weights_TK, chosen_TK, partial_TD) for part, partial_TD in each])

        return run


class Linear:
    """A linear layer, or a gated pair of them. From `many` tokens on, without cuts, torch's matrix product does it, which is
    faster there. (Not where rows are no multiple of 32 long: torch 2.13 with AMX multiplies what lies behind them by 0.)"""

    __slots__ = ("_bias", "_dtype", "_gated", "_handle", "_many", "_norm", "_outputs", "_run", "_weight", "_wide")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        gated: bool = False,
        norm: Norm | None = None,
        cuts: Cuts | None = None,
        many: int = _NEVER,
    ) -> None:
        self._weight, self._bias, self._gated, self._norm = weight, bias, gated, norm
        self._many = many if cuts is None and weight.shape[1] % 32 == 0 else _NEVER
        self._outputs = weight.shape[0] // (2 if gated else 1)
        self._wide = cuts is not None
        self._dtype = torch.float32 if self._wide else weight.dtype
        self._handle = _handle(weight, bias, gated=gated, norm=norm, cuts=cuts)
        self._run = self._handle.run

    def __call__(self, x: Tensor) -> Tensor:
        tokens, outputs = x.shape[0], self._outputs
        out = torch.empty(tokens, outputs, dtype=self._dtype)
        if tokens < self._many:
            self._run(x.data_ptr(), tokens, x.stride(0), out.data_ptr(), outputs)
        else:
            for some, into in zip(x.split(_TILE), out.split(_TILE), strict=True):
                self._product(some, into)
        return out

    def joined(self, second: RowOp, comm: Communicator, attention: Attention | None = None) -> Whole | None:
        """As `Joins.joined`; with the addresses of an attention between the two (`attention.native_backend`), whose plan is the
        address of a step."""
        if not isinstance(second, Linear) or self._wide or self._weight.dtype != second._weight.dtype:
            return None
        sums = TreeReduce(comm).sum_at(torch.float32) if second._wide else comm.sum_at(self._weight.dtype)
        if sums is None and comm.size > 1:
            return None
        add = native.Half(self._handle, second._handle, *(sums or (None, None)), attention).add
        few = min(_FEW, self._many, second._many)

        def run(x: Tensor, step: Any, held: object = (self, second)) -> Deferred | None:
            tokens = x.shape[0]
            if tokens >= few:
                return None

            def add_to(residual: Tensor) -> Tensor:
                add(x.data_ptr(), tokens, residual.data_ptr(), step or 0)
                return residual

            return Deferred(add_to)

        return run

    def _product(self, x: Tensor, out: Tensor) -> None:
        if self._norm is not None:
            x = normed(x, self._norm)
        if self._gated:
            both = F.linear(x, self._weight)
            native.silu_and_mul(DTYPES[x.dtype], both.data_ptr(), len(x), self._outputs, out.data_ptr())
        elif self._bias is None:
            torch.mm(x, self._weight.t(), out=out)
        else:
            torch.addmm(self._bias, x, self._weight.t(), out=out)


class _Head:
    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._handle = _handle(weight, cuts=(0, weight.shape[1]))
        self.logits = Linear(weight, cuts=(0, weight.shape[1]))

    def best(self, x: Tensor, count: int, allowed: int) -> tuple[Tensor, Tensor]:
        assert 0 < count <= allowed <= self._weight.shape[0], (count, allowed, self._weight.shape)
        values = torch.empty(x.shape[0], count, dtype=torch.float32)
        columns = torch.empty(x.shape[0], count, dtype=torch.int64)
        self._handle.best(x.data_ptr(), x.shape[0], x.stride(0), count, allowed, values.data_ptr(), columns.data_ptr())
        return values, columns


class _Experts:
    def __init__(self, experts: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        self._weights = dict(experts)
        handles = [(_handle(up, gated=True), _handle(down, cuts=(0, down.shape[1]))) for up, down in experts.values()]
        by_index = dict(zip(experts, handles, strict=True))
        self._run = native.Experts(*(by_index.get(i) for i in range(max(experts, default=-1) + 1))).run

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor, partial: Tensor) -> Tensor:
        tokens, choices = chosen.shape
        weights, chosen = weights.contiguous(), chosen.contiguous()
        wide = partial.dtype == torch.float32
        place = (weights.data_ptr(), chosen.data_ptr(), choices, partial.data_ptr(), wide)
        self._run(x.data_ptr(), tokens, x.stride(0), *place)
        return partial


def _after(before: Op, op: Op) -> Op:
    return lambda x: op(before(x))


def _handle(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    norm: Norm | None = None,
    cuts: Cuts | None = None,
) -> Any:
    """cuts: outputs are float32."""
    rows, columns = weight.shape
    assert weight.stride(1) == 1 or min(weight.shape) < 2, "a weight is row-major"
    return native.Linear(
        DTYPES[weight.dtype],
        rows,
        columns,
        weight.data_ptr(),
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        0 if norm is None else norm.weight.data_ptr(),
        0.0 if norm is None else norm.eps,
        gated,
        cuts is not None,
        cuts or (0, columns),
    )

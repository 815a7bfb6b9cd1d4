"""Kernels from torch's own operations; they run on any device, and are what the native ones are tested against."""

from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from collectives.communicator import Communicator
from collectives.tree import tree_sum
from qtp.kernels import torch_quantized
from qtp.kernels.interface import Choose, Cuts, Expert, Experts, Head, Norm, Op
from qtp.weights.quantized import W8A8FP8, W8A16, Float, Packed, Quantized, Weight, row_part


class TorchKernels:
    name, waits = "torch", True

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
            return self._quantized(weight, norm=norm, cuts=cuts, across=across)
        before = _identity if norm is None else self.rms_norm(norm)
        if cuts is None:
            return lambda x: F.linear(before(x), weight, bias)
        leaves = self.linear_leaves(weight, cuts)
        return lambda x: tree_sum(leaves(before(x)).unbind())

    def _quantized(
        self, weight: Quantized | Float | Packed, *, norm: Norm | None, cuts: Cuts | None, across: Communicator | None
    ) -> Callable[[Tensor], Any]:
        if isinstance(weight, Packed):
            ops = [self._quantized(part, norm=norm, cuts=cuts, across=None) for part in weight.parts]
            return torch_quantized.side_by_side(ops)
        if isinstance(weight, Float):
            return self.linear(weight.weight, weight.bias, norm=norm, cuts=cuts)
        weight, before = torch_quantized.expanded(weight), _identity if norm is None else self.rms_norm(norm.anti or norm)
        if across is not None and not isinstance(weight, W8A8FP8 | W8A16):
            row_part(weight)
            return lambda x: torch_quantized.unscaled(weight, before(x), across)
        if cuts is not None:
            leaves = self.linear_leaves(weight, cuts, across)
            return lambda x: tree_sum(leaves(before(x)).unbind())
        return lambda x: torch_quantized.wide(weight, before(x), across).to(x.dtype)

    def joining(self, weight: Weight) -> Op:
        return self.linear(weight)

    def linear_leaves(self, weight: Weight, cuts: Cuts, across: Communicator | None = None) -> Op:
        if isinstance(weight, Packed):
            ops = [self.linear_leaves(row_part(part), cuts, across) for part in weight.parts]
            return lambda x: torch.cat([op(x) for op in ops], dim=2)
        if not isinstance(weight, Tensor):
            row_part(weight)
            weight = torch_quantized.expanded(weight)
            return lambda x: torch_quantized.leaves(weight, x, cuts, across)
        return lambda x: torch.stack([F.linear(x[:, a:b].float(), weight[:, a:b].float()) for a, b in pairwise(cuts)])

    def gated(self, weight: Weight, *, norm: Norm | None = None) -> Op:
        both = self.linear(weight, norm=norm)

        def run(x: Tensor) -> Tensor:
            gate, up = both(x).chunk(2, dim=-1)
            return F.silu(gate).mul_(up)

        return run

    def rms_norm(self, norm: Norm) -> Op:
        """Written out, because torch's own rms_norm on the CPU takes 1 to 3 ms for 1024 x 896 in bfloat16, and this 0.3 ms."""

        def run(x: Tensor) -> Tensor:
            wide = x.to(torch.float32)
            normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).to(x.dtype)
            if norm.bias is None:
                return normed * norm.weight
            return (normed.float() * norm.weight.float() + norm.bias.float()).to(x.dtype)

        return run

    def choose(self, top_k: int, norm_topk_prob: bool) -> Choose:
        def run(logits: Tensor) -> tuple[Tensor, Tensor]:
            weights, chosen = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), top_k, dim=-1)
            if norm_topk_prob:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            return weights.to(logits.dtype), chosen

        return run

    def scale(self, gate: Tensor, x: Tensor) -> Tensor:
        return torch.sigmoid(gate) * x

    def head(self, weight: Weight) -> Head:
        return _Head(weight)

    def experts(self, experts: Mapping[int, Expert], leaves: Sequence[range] | None = None) -> Experts:
        return grouped({e: (self.gated(expert.gate_up), self.linear(expert.down)) for e, expert in experts.items()}, leaves)


def grouped(ops: Mapping[int, tuple[Op, Op]], leaves: Sequence[range] | None = None) -> Experts:
    """`Kernels.experts` from the gated and the down op of each expert, one expert after the other."""

    def add(within: Container[int], x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor, partial_TD: Tensor) -> Tensor:
        for index in sorted(set(chosen_TK.unique().tolist()) & ops.keys()):
            if index in within:
                gated, down = ops[index]
                tokens, place = torch.where(chosen_TK == index)
                out = down(gated(x_TD[tokens])) * weights_TK[tokens, place, None]
                partial_TD.index_add_(0, tokens, out.to(partial_TD.dtype))
        return partial_TD

    if leaves is None:
        return partial(add, ops)
    return lambda x, weights, chosen, parts: tree_sum(
        [add(leaf, x, weights, chosen, part) for leaf, part in zip(leaves, parts, strict=True)]
    )


def _identity(x: Tensor) -> Tensor:
    return x


class _Head:
    def __init__(self, weight: Weight) -> None:
        self._weight = weight if isinstance(weight, Tensor | Packed) else torch_quantized.expanded(weight)

    def logits(self, x: Tensor) -> Tensor:
        if isinstance(self._weight, Tensor):
            return F.linear(x, self._weight).to(torch.float32)
        return torch_quantized.wide(self._weight, x)

    def best(self, x: Tensor, count: int, allowed: int) -> tuple[Tensor, Tensor]:
        return top(self.logits(x)[:, :allowed], count)


def top(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best `count` values and columns of each row, best first and the lower column first among equals; torch.topk picks any
    of equal values. Ties with the last value matter most: where one is left out, the row is sorted whole."""
    if count == 1:
        return scores_RV.max(dim=1, keepdim=True)
    more = min(count + 1, scores_RV.shape[1])
    values, columns = scores_RV.topk(more, dim=1)
    tied = (values[:, -1] == values[:, -2]).nonzero()[:, 0] if more > count else ()
    values, columns = values[:, :count], columns[:, :count]
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if len(tied):
        sorted_values, sorted_columns = scores_RV[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = sorted_values[:, :count], sorted_columns[:, :count]
    return values, columns

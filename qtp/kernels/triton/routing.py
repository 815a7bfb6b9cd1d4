"""What a mixture of experts does besides products: which experts a token goes to, and the gate of the shared one.

T tokens, E experts, K chosen for each, D hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtp.kernels.interface import Choose
from qtp.kernels.triton.launch import launch_dependents, options, wait

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _choose(
    logits_ptr, weights_ptr, chosen_ptr, E, stride,
    K: tl.constexpr, NORM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token, at_E, at_K = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    launch_dependents(PDL)
    wait(PDL)
    logits_E = tl.load(logits_ptr + token * stride + at_E, mask=at_E < E, other=float("-inf")).to(tl.float32)
    powers_E = tl.exp(logits_E - tl.max(logits_E, axis=0))
    soft_E = powers_E / tl.sum(powers_E, axis=0)
    left_E = tl.where(at_E < E, tl.maximum(logits_E, _LOWEST), float("-inf"))
    weights_K, chosen_K = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.int32)
    for k in range(K):
        best = tl.min(tl.where(left_E == tl.max(left_E, axis=0), at_E, E - 1), axis=0)
        weights_K = tl.where(at_K == k, tl.sum(tl.where(at_E == best, soft_E, 0.0), axis=0), weights_K)
        chosen_K = tl.where(at_K == k, best, chosen_K)
        left_E = tl.where(at_E == best, float("-inf"), left_E)
    if NORM:
        weights_K /= tl.sum(weights_K, axis=0)
    tl.store(weights_ptr + token * K + at_K, weights_K.to(weights_ptr.dtype.element_ty), mask=at_K < K)
    tl.store(chosen_ptr + token * K + at_K, chosen_K.to(tl.int64), mask=at_K < K)


@triton.jit(do_not_specialize=["T"])
def _scale(gate_ptr, x_ptr, T, D, gate_stride, leaf_stride, x_stride, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    row, at_D = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    leaf, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    launch_dependents(PDL)
    wait(PDL)
    gate = tl.load(gate_ptr + token * gate_stride).to(tl.float32)
    place_D = x_ptr + leaf * leaf_stride + token * x_stride + at_D
    x_D = tl.load(place_D, mask=at_D < D, other=0.0).to(tl.float32)
    tl.store(place_D, (x_D / (1.0 + tl.exp(-gate))).to(x_ptr.dtype.element_ty), mask=at_D < D)


def choose(top_k: int, norm_topk_prob: bool) -> Choose:
    """`Kernels.choose`; the lower index first among equals."""

    def run(logits: Tensor) -> tuple[Tensor, Tensor]:
        tokens, experts = logits.shape
        assert top_k <= experts, (top_k, experts)
        weights = logits.new_empty(tokens, top_k)
        chosen = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
        if weights.numel():
            blocks = {"BLOCK_E": triton.next_power_of_2(experts), "BLOCK_K": triton.next_power_of_2(top_k)}
            sizes = (experts, logits.stride(0))
            _choose[(tokens,)](logits, weights, chosen, *sizes, K=top_k, NORM=norm_topk_prob, **blocks, **options(logits, 1, 1))
        return weights, chosen

    return run


def scale(gate: Tensor, x: Tensor) -> Tensor:
    """`Kernels.scale`: sigmoid(gate) * x in place of x. gate [T, 1]; x [T, D] or [leaves, T, D]."""
    assert x.stride(-1) == 1 or x.shape[-1] < 2, x.stride()
    if x.numel():
        tokens, width = x.shape[-2:]
        rows, leaf_stride = x.numel() // width, x.stride(0) if x.dim() == 3 else 0
        block = min(2048, triton.next_power_of_2(width))
        strides = (gate.stride(0), leaf_stride, x.stride(-2))
        _scale[(rows, triton.cdiv(width, block))](gate, x, tokens, width, *strides, BLOCK_D=block, **options(x, 4, 1))
    return x

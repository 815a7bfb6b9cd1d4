"""RMSNorm and the gate by themselves, for many tokens. T tokens, D hidden, F columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtp.kernels.interface import Norm
from qtp.kernels.triton.launch import launch_dependents, options, wait


@triton.jit
def normed(x_D, g_D, bias_ptr, at_D, D, eps):
    """A row after RMSNorm (interface.Norm), in its dtype."""
    x32_D = x_D.to(tl.float32)
    whole_D = (x32_D * (1.0 / tl.sqrt(tl.sum(x32_D * x32_D, axis=0) / D + eps))).to(x_D.dtype)
    y_D = whole_D.to(tl.float32) * g_D.to(tl.float32)
    if bias_ptr is not None:
        y_D += tl.load(bias_ptr + at_D, mask=at_D < D, other=0.0).to(tl.float32)
    return y_D.to(x_D.dtype)


@triton.jit
def _rms_norm(x_ptr, g_ptr, bias_ptr, out_ptr, D, x_stride, eps, BLOCK_D: tl.constexpr, PDL: tl.constexpr):
    row, at_D = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    inside_D = at_D < D
    g_D = tl.load(g_ptr + at_D, mask=inside_D, other=0.0)
    launch_dependents(PDL)
    wait(PDL)
    x_D = tl.load(x_ptr + row * x_stride + at_D, mask=inside_D, other=0.0)
    tl.store(out_ptr + row * D + at_D, normed(x_D, g_D, bias_ptr, at_D, D, eps), mask=inside_D)


@triton.jit
def _silu_and_mul(x_ptr, out_ptr, F, x_stride, BLOCK_F: tl.constexpr, PDL: tl.constexpr):
    row, at_F = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_F = at_F < F
    launch_dependents(PDL)
    wait(PDL)
    gate_F = tl.load(x_ptr + row * x_stride + at_F, mask=inside_F, other=0.0).to(tl.float32)
    up_F = tl.load(x_ptr + row * x_stride + F + at_F, mask=inside_F, other=0.0).to(tl.float32)
    y_F = gate_F / (1.0 + tl.exp(-gate_F)) * up_F
    tl.store(out_ptr + row * F + at_F, y_F.to(out_ptr.dtype.element_ty), mask=inside_F)


def row_warps(block: int) -> int:
    """Warps of a program that takes a whole row: with as many, the sum of its squares has the same bits wherever it is made."""
    return min(16, max(2, block // 512))


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """norm(x): [T, D] to [T, D]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, width = x.shape
    if out.numel():
        block = triton.next_power_of_2(width)
        shape = (width, x.stride(0), norm.eps)
        _rms_norm[(tokens,)](x, norm.weight, norm.bias, out, *shape, BLOCK_D=block, **options(x, row_warps(block), 1))
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(the first half of each row) * the second (arXiv 2002.05202): [T, 2 F] to [T, F]."""
    tokens, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(tokens, width)
    if out.numel():
        block = min(2048, triton.next_power_of_2(width))
        grid = (tokens, triton.cdiv(width, block))
        _silu_and_mul[grid](x, out, width, x.stride(0), BLOCK_F=block, **options(x, 4, 1))
    return out

"""How the kernels of this package are launched."""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, sums):
    """sums + a b, added up in float32. (Triton's interpreter takes the bits of bfloat16 for integers here.)"""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def dot_fp8(a, b, sums):
    """sums + a b of float8 e4m3 [M, C] and [C, N]. A Hopper card's own product of float8 adds up with 14 bits: its sums are taken
    over into float32 after each C columns. Products of few rows, which it does not take, are those of float16: exact."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    if a.shape[0] < 64:
        return tl.dot(a.to(tl.float16), b.to(tl.float16), sums)
    return tl.dot(a, b, sums, max_num_imprecise_acc=a.shape[1])


@triton.jit
def int8_levels(x, scale, offset):
    """clamp(round(x / scale + offset)), half to even, of float32: `/` alone is not rounded to the nearest on a card, and a
    float32 below 2^22 to which 1.5 * 2^23 is added has no bits left behind the point."""
    levels = tl.minimum(tl.maximum(tl.math.div_rn(x, scale + tl.zeros_like(x)) + offset, -128.0), 127.0)
    return (levels + 12582912.0) - 12582912.0


@triton.jit
def fp8_levels(x, scale):
    """x / scale, of float32, held within float8 e4m3 and rounded to it, half to even."""
    return tl.minimum(tl.maximum(tl.math.div_rn(x, scale + tl.zeros_like(x)), -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def dot4(a, b, sums):
    """sums + the products of the four int8 that each int32 of a and b holds, in int32."""
    if _INTERPRETED:
        for i in tl.static_range(4):
            sums += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
        return sums
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, sums], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def read_once(w_N1, at_D, D):
    """Columns at_D, below D, of rows of a weight that no other program reads: [N, BLOCK_D], zeros beyond."""
    return tl.load(w_N1 + at_D[None, :], mask=at_D[None, :] < D, other=0, eviction_policy="evict_first")


@triton.jit
def wait(PDL: tl.constexpr):
    """From here on, what the kernels before have written is there. Every kernel launched with PDL must call it in each of its
    programs, before it reads what a kernel wrote or writes anything: what comes before it may only read weights, and what lay on
    the device before the step."""
    if PDL:
        gdc_wait()


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """The next kernel may begin, up to its own `wait`, once all programs have come here or ended. One that fills the card calls
    it when its loads are done: if at its begin, the two fight for memory (gate and up of 7B 64.0 in place of 62.4 us on H200)."""
    if PDL:
        gdc_launch_dependents()


@cache
def _programmatic(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether Triton knows float8 e4m3 there."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def options(x: Tensor, warps: int, stages: int) -> dict[str, Any]:
    """The keywords of a launch on x's device: with programmatic dependent launch where the card has it (compute capability 9.0),
    so that a kernel fetches its first weights while the one before it ends."""
    if x.device.type != "cuda":
        return {"PDL": False}
    programmatic = _programmatic(x.device)
    return {"PDL": programmatic, "launch_pdl": programmatic, "num_warps": warps, "num_stages": stages}

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


@triton.jit
def fetch(address, bytes, program, programs, THREADS: tl.constexpr):
    """Begins to bring bytes [0, bytes) behind an address into the second-level cache, program by program a part. They are
    multiples of 512 and 16. To be called with as many THREADS as the kernel has; needs compute capability 9.0."""
    part = tl.cdiv(tl.cdiv(bytes, programs), 512) * 512
    begin = program * part
    end = tl.minimum(begin + part, bytes) - 512
    at = tl.arange(0, THREADS) * 512
    for start in range(begin, begin + part, THREADS * 512):
        place = address + tl.minimum(start + at, tl.maximum(end, 0)).to(tl.int64)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 512; mov.u32 $0, 0;", "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
        )


@cache
def _programmatic(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def options(x: Tensor, warps: int, stages: int) -> dict[str, Any]:
    """The keywords of a launch on x's device: with programmatic dependent launch where the card has it (compute capability 9.0),
    so that a kernel fetches its first weights while the one before it ends."""
    if x.device.type != "cuda":
        return {"PDL": False}
    programmatic = _programmatic(x.device)
    return {"PDL": programmatic, "launch_pdl": programmatic, "num_warps": warps, "num_stages": stages}

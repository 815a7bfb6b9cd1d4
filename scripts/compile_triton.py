"""Compiles what Triton kernels a piece of code launches for a Hopper GPU, on any machine: `python scripts/compile_triton.py`.

The interpreter takes more than the compiler does, so that a kernel may pass all tests on the CPU and be none on a card. Launches
are caught here: each is compiled to machine code as its arguments would have it, and does nothing. Prints how many there were,
and of which the registers do not suffice.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, type_canonicalisation_dict

sys.path.insert(0, str(Path(__file__).parents[1]))

HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes of shared memory that a program can have there
compiled: set[str] = set()
spilling: list[str] = []


def _type(value: Any, specialize: bool) -> tuple[str, Any]:
    """A type, and the value where it is known to the compiler."""
    if value is None or isinstance(value, bool | str) or (specialize and isinstance(value, int) and value == 1):
        return "constexpr", value
    if isinstance(value, Tensor):
        return "*" + type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")], None
    if isinstance(value, float):
        return "fp32", None
    return ("i32" if abs(value) < 2**31 else "i64"), None


def _compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in kwargs}
    values = dict(zip(self.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(self.params):
        value = values[param.name]
        kind, known = ("constexpr", value) if param.is_constexpr else _type(value, not param.do_not_specialize)
        signature[param.name] = kind
        if kind == "constexpr":
            constants[(i,)] = known
            continue
        address = value.data_ptr() if isinstance(value, Tensor) else value
        free = param.do_not_specialize or param.do_not_specialize_on_alignment
        if not free and isinstance(address, int) and address % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    key = f"{self.fn.__module__}.{self.fn.__name__} {signature} {constants} {attributes} {options}"
    if key not in compiled:
        compiled.add(key)
        try:
            kernel = triton.compile(ASTSource(self, signature, constants, attributes), target=HOPPER, options=options)
        except Exception as e:
            raise RuntimeError(f"does not compile: {key}") from e
        assert kernel.metadata.shared <= SHARED, f"{kernel.metadata.shared} bytes of shared memory: {key}"
        if stack := _stack(kernel.asm["cubin"]):
            spilling.append(f"{stack} bytes of stack a thread: {key}")


def _stack(binary: bytes) -> int:
    """Bytes that each thread keeps in memory since it has no registers for them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(found) for found in re.findall(r"STACK:(\d+)", usage))


def catch() -> None:
    """From here on launches are compiled. To be called before the modules that hold kernels are imported."""
    JITFunction.run = _compile
    from qtp.kernels.triton import launch

    launch.options = lambda x, warps, stages: {"PDL": True, "launch_pdl": True, "num_warps": warps, "num_stages": stages}


def linear_layers() -> None:
    """Every format, for one, some and many tokens, even and odd shapes."""
    from qtp.kernels import triton_quantized
    from qtp.kernels.interface import Norm
    from qtp.kernels.torch_kernels import TorchKernels
    from qtp.kernels.triton.vocabulary import VocabularyHead
    from qtp.weights.quantized import W8A8, W8A8FP8, W8A16, W8A8Dynamic

    torch_kernels = TorchKernels()
    for rows, columns in ((64, 512), (30, 391)):
        w, ones = torch.zeros(rows, columns, dtype=torch.int8), torch.ones(rows)
        bias = torch.zeros(rows, dtype=torch.bfloat16)
        made: list[Any] = [
            W8A8(w, 0.5, 3.0, torch.zeros(rows, dtype=torch.int32), ones),
            W8A8Dynamic(w, ones, bias),
            W8A8FP8(w.view(torch.float8_e4m3fn), ones, bias),
            W8A16(w, ones[:, None], ones[:, None], bias, 0, 0),
            *(
                W8A16(w, *[ones[:, None].repeat(1, -(-(p + columns) // g))] * 2, None, g, p)
                for g, p in ((128, 0), (32, 0), (64, 9))
            ),
        ]
        for weight in made:
            ops = [triton_quantized.linear(torch_kernels, weight), triton_quantized.gated(torch_kernels, weight)]
            for b in (None, torch.ones(columns, dtype=torch.bfloat16)):
                norm = Norm(torch.ones(columns, dtype=torch.bfloat16), 1e-6, b)
                ops.append(triton_quantized.linear(torch_kernels, weight, norm=norm))
            joining: Any = triton_quantized.joining(weight)
            for tokens in (1, 2, 33, 64, 200):
                x = torch.zeros(tokens, columns, dtype=torch.bfloat16)
                for op in ops:
                    op(x)
                joining(x).add_to(torch.zeros(tokens, rows, dtype=torch.bfloat16))
            triton_quantized.wide(torch_kernels, weight)(torch.zeros(3, columns, dtype=torch.float16))
        for dtype in (torch.bfloat16, torch.float32):
            head = VocabularyHead(w.to(dtype))
            for tokens in (1, 2, 200):
                x = torch.zeros(tokens, columns, dtype=dtype)
                head.logits(x), head.best(x, 1, rows), head.best(x, 2, rows)


def sums_between_cards() -> None:
    """Every dtype, for a few ranks, even and odd lengths."""
    from collectives.cuda_ipc import LIMIT, SUMMED
    from collectives.cuda_ipc_kernel import launch
    from collectives.cuda_segment import Layout

    for size in (2, 3, 8):
        segment: Any = SimpleNamespace(address=1 << 40, words_address=1 << 41, layout=Layout.of(size, LIMIT))
        for dtype in SUMMED:
            for n in (1, 77, 4096):
                launch(torch.zeros(n, dtype=dtype), segment, size - 1, size, 300.0)


def float_layers() -> None:
    """For one token and several, with norm, bias and gate, alone and joining the residual stream."""
    from qtp.kernels.interface import Norm
    from qtp.kernels.triton.linear import OneToken
    from qtp.kernels.triton.norm import rms_norm, silu_and_mul

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, columns in ((64, 512), (2, 391), (20000, 896), (896, 4864)):
            weight, bias = torch.zeros(rows, columns, dtype=dtype), torch.zeros(rows, dtype=dtype)
            norm, x = Norm(weight[0], 1e-6), torch.zeros(1, columns, dtype=dtype)
            OneToken(weight, bias, norm, False)(x)
            OneToken(weight, None, norm, True)(x), OneToken(weight, None, None, True)(x)
            down = OneToken(weight, None, None, False)
            down(x, torch.zeros(1, rows, dtype=dtype))
            for b in (None, weight[0]):
                rms_norm(torch.zeros(3, columns, dtype=dtype), Norm(weight[0], 1e-6, b))
            silu_and_mul(torch.zeros(3, 2 * columns, dtype=dtype))


def expert_layers() -> None:
    """Every kind, for one token, few, some and many, a tile for each; rows aligned and not."""
    from qtp.kernels.interface import Expert
    from qtp.kernels.triton.experts import GroupedExperts
    from qtp.weights.quantized import W8A8, W8A8FP8, W8A16, W8A8Dynamic, Weight

    def weight(kind: str, rows: int, columns: int) -> Weight:
        if hasattr(torch, kind):
            return torch.zeros(rows, columns, dtype=getattr(torch, kind))
        w, ones = torch.zeros(rows, columns, dtype=torch.int8), torch.ones(rows)
        match kind:
            case "w8a8":
                return W8A8(w, 0.5, 3.0, torch.zeros(rows, dtype=torch.int32), ones)
            case "w8a8_dynamic":
                return W8A8Dynamic(w, ones, None)
            case "w8a8_fp8":
                return W8A8FP8(w.view(torch.float8_e4m3fn), ones, None)
        return W8A16(w, ones[:, None], ones[:, None], None, 0, 0)

    for kind in ("bfloat16", "float16", "float32", "w8a8", "w8a8_dynamic", "w8a8_fp8", "w8a16"):
        dtype = getattr(torch, kind) if hasattr(torch, kind) else torch.bfloat16
        for hidden, columns in ((512, 320), (77, 39)):
            some = {e: Expert(weight(kind, 2 * columns, hidden), weight(kind, hidden, columns)) for e in range(3)}
            call = GroupedExperts(some, "cpu")
            for tokens in (1, 4, 9, 90, 400):
                x, weights = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(tokens, 2, dtype=dtype)
                call(x, weights, torch.zeros(tokens, 2, dtype=torch.int64), x.clone())


def attention() -> None:
    """A step of decoding sequences and one of a chunk, for caches in floats and in int8, windows, few sequences and many."""
    from qtp.attention.triton_backend import TritonAttention
    from qtp.batch import make_batch
    from qtp.kv.cache import KVCache, KVScales

    host = torch.device("cpu")
    for head_dim, dtype, cached in (
        (64, torch.bfloat16, "floats"),
        (128, torch.bfloat16, "floats"),
        (64, torch.bfloat16, "int8"),
        (128, torch.bfloat16, "int8"),
        (128, torch.bfloat16, "int8, queries too"),
        (128, torch.float16, "floats"),
        (80, torch.float32, "floats"),
    ):
        k, q = torch.ones(1, 2, head_dim), torch.ones(1, 10) if "queries" in cached else None
        scales = KVScales(key_scale=k, key_offset=k, value_scale=k, value_offset=k, query_scale=q, query_offset=q)
        cache = KVCache(1, 400, 16, 2, head_dim, dtype, host, None if cached == "floats" else scales)
        backend = TritonAttention(cache, (0,) * 7 + (1,) * 3, host)
        for parts in ([((1,), 40, (0, 1, 2))], [((1,), 3, (i,)) for i in range(200)], [((1,) * 9, 3, (0,))]):
            batch = make_batch([(tuple(ids), start, table) for ids, start, table in parts], 16, host)
            tokens = len(batch.token_ids_T)
            plan = backend.plan(batch, *torch.ones(2, tokens, head_dim // 2))
            for window in (None, 7):
                backend.run(plan, 0, torch.zeros(tokens, 14, head_dim, dtype=dtype), window)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    catch()
    linear_layers()
    float_layers()
    expert_layers()
    attention()
    sums_between_cards()
    print(*spilling, f"{len(compiled)} compiled, {len(spilling)} of them with too few registers", sep="\n")

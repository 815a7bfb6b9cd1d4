"""How long linear layers take with int8 weights and with bfloat16 ones, by the native kernels.

    python scripts/bench/int8_linear.py [--threads 2] [--tokens 1 8 128] [--rounds 15] [--clock wall] [--json FILE]

The shapes are those of Qwen2-0.5B: gate and up, down, head. Each kind has copies of its weight that are larger than the caches
together and takes them in turn; the kinds take turns too, so that all see the same machine. A figure is a median over rounds:
microseconds; bytes of weights a second, in GB/s; and the time of bfloat16 over that of the kind. `read` is a sum of floats, as
many bytes as the int8 weight has. On a machine that others use too, `--threads 1 --clock cpu` counts this thread's own time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.remove(str(Path(__file__).resolve().parent))  # where another collectives.py is

from qtp.kernels.interface import Kernels
from qtp.kernels.native_kernels import NativeKernels
from qtp.weights.quantized import W8A8, W8A16, Quantized, W8A8Dynamic

SHAPES = ((9728, 896), (896, 4864), (151936, 896))
ENOUGH = 128 * 2**20  # bytes, which no cache holds
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
Run = Callable[[Tensor], object]


def weights(rows: int, columns: int) -> dict[str, Quantized]:
    w = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    ones, groups = torch.full((rows,), 1e-4), columns // 64
    return {
        "w8a8": W8A8(w, 0.02, 3.0, torch.zeros(rows, dtype=torch.int32), ones),
        "w8a8_dynamic": W8A8Dynamic(w, ones, None),
        "w8a16": W8A16(w, ones[:, None].clone(), torch.zeros(rows, 1), None, 0, 0),
        "w8a16 g64": W8A16(w, ones[:, None].repeat(1, groups), torch.zeros(rows, groups), None, 64, 0),
        "w8a16 g64 offset": W8A16(w, ones[:, None].repeat(1, groups), torch.ones(rows, groups), None, 64, 0),
    }


def ops(kernels: Kernels, rows: int, columns: int) -> dict[str, list[Run]]:
    """Copies of each kind."""
    copies = max(1, ENOUGH // (rows * columns))
    int8 = [weights(rows, columns) for _ in range(copies)]
    kinds: dict[str, list[Run]] = {kind: [kernels.linear(each[kind]) for each in int8] for kind in int8[0]}
    half = [torch.randn(rows, columns, dtype=torch.bfloat16) for _ in range((copies + 1) // 2)]
    kinds["bf16"] = [kernels.linear(w) for w in half]
    plain = [torch.ones(rows * columns // 4) for _ in range(copies)]
    kinds["read"] = [lambda _, w=w: w.sum() for w in plain]
    return kinds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 128])
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--clock", choices=CLOCKS, default="wall")
    p.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))), help="which of the shapes, by number")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    kernels, found, clock = NativeKernels(), [], CLOCKS[args.clock]
    print(f"{kernels.name}, {args.threads} threads")
    for rows, columns in (SHAPES[i] for i in args.shapes):
        kinds = ops(kernels, rows, columns)
        for tokens in args.tokens:
            x = torch.randn(tokens, columns, dtype=torch.bfloat16)
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            for i in range(-2, args.rounds):
                for number, (kind, runs) in enumerate(kinds.items()):
                    run = runs[(i + number) % len(runs)]  # not the copy that the kind before has just read
                    start = clock()
                    run(x)
                    if i >= 0:
                        times[kind].append(clock() - start)
            medians = {kind: statistics.median(each) for kind, each in times.items()}
            for kind, seconds in medians.items():
                size = rows * columns * (2 if kind == "bf16" else 1)
                entry = {"rows": rows, "columns": columns, "tokens": tokens, "kind": kind, "us": 1e6 * seconds}
                found.append({**entry, "gb_s": size / seconds / 1e9, "of_bf16": medians["bf16"] / seconds})
                print(
                    f"{columns:5} x {rows:6} {tokens:4} tokens  {kind:17}{found[-1]['us']:10.0f} us"
                    f"{found[-1]['gb_s']:7.1f} GB/s{found[-1]['of_bf16']:7.2f} x"
                )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""Speed of linear layers with compressed weights (W8A8SC), beside a plain read of memory and a bfloat16 linear of the shape.

    python scripts/bench/sparse.py [--threads 1 2] [--tokens 1 8] [--shapes 9728x896 ...] [--rounds 9]

Weights have 1.1 % outliers. Of each kind there are so many copies, used in turn, that no cache holds them. The three take turns
A B C A B C; figures are medians over rounds. GB/s are of the bytes that each reads: compressed, bfloat16, plain.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.remove(str(Path(__file__).resolve().parent))  # where another collectives.py is

from qtp.kernels.extension import native
from qtp.kernels.native_kernels import NativeKernels
from qtp.weights.codec import compress
from qtp.weights.quantized import W8A8SC

FRACTION = 0.011
BEYOND_CACHE = 192 << 20


def sparse_weight(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    outlier = torch.rand(rows, columns) < FRACTION
    weight[outlier] = torch.randint(-128, 128, (int(outlier.sum()),), dtype=torch.int8)
    return weight


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--tokens", type=int, nargs="+", default=[1, 8])
    p.add_argument("--shapes", nargs="+", default=["9728x896", "896x4864", "151936x896"])
    p.add_argument("--rounds", type=int, default=9)
    args = p.parse_args()
    block = torch.ones(1 << 26)
    print(f"{native.isas()[-1]}; weights a second in 10^9; GB/s; plain: a read of memory by all threads")
    print("       shape tokens threads |  plain | sparse GB/s  weights/s | bfloat16 GB/s  weights/s | of plain  faster")
    for shape in args.shapes:
        rows, columns = map(int, shape.split("x"))
        stream = compress(sparse_weight(rows, columns))
        size = sum(part.numel() * part.element_size() for part in stream)
        copies = [tuple(part.clone() for part in stream) for _ in range(BEYOND_CACHE // size + 1)]
        after = torch.zeros(rows, dtype=torch.int32), torch.ones(rows)
        ours = [NativeKernels().linear(W8A8SC(*copy, 1.0, 0.0, *after)) for copy in copies]
        wide = torch.randn(BEYOND_CACHE // (2 * rows * columns) + 1, rows, columns, dtype=torch.bfloat16)
        theirs = [NativeKernels(deterministic=True).linear(weight) for weight in wide]
        for tokens in args.tokens:
            x = torch.randint(-128, 128, (tokens, columns)).bfloat16()
            y = torch.randn(tokens, columns, dtype=torch.bfloat16)
            for threads in args.threads:
                torch.set_num_threads(threads)
                times: list[list[float]] = [[], [], []]
                for _ in range(args.rounds):
                    times[0].append(seconds(block.sum))
                    times[1].append(seconds(lambda ops=ours, x=x: [op(x) for op in ops]) / len(ours))
                    times[2].append(seconds(lambda ops=theirs, y=y: [op(y) for op in ops]) / len(theirs))
                plain, sparse, full = (statistics.median(each) for each in times)
                read, weights = block.numel() * 4e-9 / plain, rows * columns * 1e-9
                print(
                    f"{shape:>12} {tokens:6} {threads:7} | {read:6.1f} | {size * 1e-9 / sparse:11.1f} {weights / sparse:10.1f} |"
                    f" {2 * weights / full:13.1f} {weights / full:10.1f} |"
                    f" {size * 1e-9 / sparse / read:8.2f} {full / sparse:7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

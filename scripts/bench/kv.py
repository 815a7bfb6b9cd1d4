"""Speed of native attention over an int8 cache against one in bfloat16: one token after a long context, and a whole prompt.

    python scripts/bench/kv.py [--threads 1 2] [--contexts 2048 16384] [--prompt 2048] [--rounds 15]
        [--clock cpu] [--json FILE]

A pass is all layers of a model, rope and the writing of the cache included, each layer over its own part of the cache. The two
take turns within a round; figures are medians over rounds. Beside them stands a plain read of as many threads in the same rounds:
the sum of a tensor far larger than any cache of the processor. On a machine that others use too, --clock cpu counts the process's
own time, of all its threads together, instead of the wall's; with several threads the rates then are those of one.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.remove(str(Path(__file__).resolve().parent))  # where another collectives.py is

from qtp.attention.native_backend import NativeAttention
from qtp.batch import make_batch
from qtp.kv.cache import KVCache, KVScales

BLOCK = 128
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = (Shape("0.5B", 24, 14, 2, 64), Shape("1.5B", 28, 12, 2, 128))


def full_cache(shape: Shape, context: int, int8: bool) -> KVCache:
    """Random keys and values; scales under which they are of one size."""
    size = (shape.layers, shape.kv_heads, shape.head_dim)
    fixed = {"key_offset": torch.full(size, 3.5), "value_offset": torch.full(size, -2.5)}
    scales = KVScales(key_scale=torch.full(size, 0.03), value_scale=torch.full(size, 0.03), **fixed) if int8 else None
    blocks = -(-context // BLOCK)
    cache = KVCache(shape.layers, blocks, BLOCK, shape.kv_heads, shape.head_dim, torch.bfloat16, CPU, scales)
    for part in (cache.keys, cache.values):
        _ = part.random_(-100, 100) if int8 else part.normal_()
    return cache


def one_pass(shape: Shape, cache: KVCache, start: int, stop: int) -> Callable[[], None]:
    """Tokens start ... stop - 1 of a sequence through all layers. The last blocks come first in the table."""
    backend = NativeAttention(cache, tuple(h * shape.kv_heads // shape.heads for h in range(shape.heads)), CPU)
    table = tuple(reversed(range(-(-stop // BLOCK))))
    angles = torch.rand(stop - start, shape.head_dim // 2)
    batch = make_batch([((1,) * (stop - start), start, table)], BLOCK, CPU)
    qkv = torch.randn(stop - start, shape.heads + 2 * shape.kv_heads, shape.head_dim).bfloat16()

    def run() -> None:
        plan = backend.plan(batch, angles.cos(), angles.sin())
        for layer in range(shape.layers):
            backend.run(plan, layer, qkv, None)

    return run


def medians(runs: list[Callable[[], object]], rounds: int, now: Callable[[], float]) -> list[float]:
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, took in zip(runs, times, strict=True):
            start = now()
            run()
            if turn:
                took.append(now() - start)
    return [statistics.median(took) for took in times]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--contexts", type=int, nargs="+", default=[2048, 16384])
    p.add_argument("--prompt", type=int, default=2048)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--clock", choices=CLOCKS, default="wall")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    plain = torch.ones(1 << 26)
    rows = []
    columns = f"{'':6}{'threads':>8}{'tokens':>8}{'context':>9}{'bf16 ms':>10}{'int8 ms':>10}{'ratio':>7}"
    print(f"{columns}   GB/s: bf16   int8  plain read")
    for shape in SHAPES:
        for context, fresh in [(n, 1) for n in args.contexts] + [(n, n) for n in [args.prompt] if n]:
            caches = [full_cache(shape, context, int8) for int8 in (False, True)]
            for threads in args.threads:
                torch.set_num_threads(threads)
                runs: list[Callable[[], object]] = [one_pass(shape, cache, context - fresh, context) for cache in caches]
                rounds = args.rounds if fresh == 1 else min(args.rounds, 3)
                *took, read = medians([*runs, plain.sum], rounds, CLOCKS[args.clock])
                at = 2 * shape.layers * shape.kv_heads * shape.head_dim * context
                rates = [at * cache.keys.element_size() / t / 1e9 for cache, t in zip(caches, took, strict=True)]
                rates.append(plain.numel() * 4 / read / 1e9)
                ms = [t * 1e3 for t in took]
                said = "".join(f"{rate:7.1f}" for rate in rates) if fresh == 1 else ""
                print(
                    f"{shape.name:6}{threads:8}{fresh:8}{context:9}{ms[0]:10.2f}{ms[1]:10.2f}{ms[0] / ms[1]:7.2f}        {said}",
                    flush=True,
                )
                one = {"shape": shape.name, "threads": threads, "tokens": fresh, "context": context}
                speeds = dict(zip(("bf16", "int8", "plain"), rates, strict=True))
                rows.append({**one, "bf16_ms": ms[0], "int8_ms": ms[1], "gigabytes_a_second": speeds})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

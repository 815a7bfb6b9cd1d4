"""What loading one rank's shard costs: bytes read and peak memory, as the operating system counts them.

    python scripts/bench/load.py --model DIR --tp N --rank R

Prints one JSON line: shard_bytes (of the tensors it ends up with), read_bytes (of read calls, /proc/self/io) and peak_bytes
(growth of the resident peak, VmHWM, over what the process used before), seconds.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.remove(str(Path(__file__).resolve().parent))  # where another collectives.py is

from qtp.config import ModelConfig
from qtp.layout.split import Grid
from qtp.weights.loader import load
from qtp.weights.names import declare
from qtp.weights.store import Store
from qtp.weights.verify import verify


def counter(file: str, key: str) -> int:
    """The number after `key` in a file of /proc/self."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--tp", type=int, required=True)
    p.add_argument("--rank", type=int, required=True)
    args = p.parse_args()
    model = ModelConfig.load(args.model)
    grid = Grid.of(args.tp)
    read, resident, start = counter("io", "rchar"), 1024 * counter("status", "VmRSS"), time.perf_counter()
    store, specs = Store(args.model), declare(model)
    verify(store, specs, grid)
    shard = load(store, specs, args.rank, grid, getattr(torch, model.dtype), torch.device("cpu"))
    report = {
        "shard_bytes": sum(t.numel() * t.element_size() for t in shard.values()),
        "read_bytes": counter("io", "rchar") - read,
        "peak_bytes": 1024 * counter("status", "VmHWM") - resident,
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

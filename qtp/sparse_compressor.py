"""Compresses a W8A8S checkpoint: `torchrun --nproc-per-node N -m qtp.sparse_compressor --model_path A --save_directory B`.

Each rank reads its shard, compresses its weights and writes them; rank 0 adds what the folder needs beside them. Alone, with
--tp N, one process does it for all ranks.
"""

import argparse
import sys
from pathlib import Path

from launch.detect import detect
from qtp.cli import Parser, run
from qtp.config import ModelConfig
from qtp.hub import folder_of
from qtp.layout.split import Grid
from qtp.meeting import meet
from qtp.reshard.bars import Bars
from qtp.reshard.compress import check_target, compressed


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="qtp.sparse_compressor", description="Compress W8A8S for the ranks of a run.", allow_abbrev=False)
    p.add_argument("--model_path", "--model", required=True, metavar="DIR", help="a W8A8S checkpoint, whole or in parts")
    p.add_argument("--save_directory", required=True, type=Path, metavar="DIR", help="part{rank}-of-{world}/ are written here")
    p.add_argument("--multiprocess_num", type=int, default=2, metavar="N", help="threads of a rank that compress")
    p.add_argument("--save_split_w8a8s_dir", type=Path, metavar="DIR", help="also keep the shards before they are compressed")
    p.add_argument("--tp", type=int, default=-1, help="ranks to compress for, if this process is alone; default: the world size")
    p.add_argument("--moe_ep", type=int, default=-1)
    p.add_argument("--moe_tp", type=int, default=-1)
    return p


def command(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    if args.multiprocess_num < 1:
        raise ValueError(f"--multiprocess_num {args.multiprocess_num} must be at least 1")
    source = folder_of(args.model_path)
    world = detect().size
    size = world if args.tp == -1 else args.tp
    if size < 1 or (world > 1 and size != world):
        raise ValueError(f"--tp {args.tp} disagrees with the world size {world} of the launcher; leave --tp out")
    grid = Grid.of(size, moe_ep=args.moe_ep, moe_tp=args.moe_tp)
    check_target(ModelConfig.load(source), source, args.save_directory, grid)
    with meet(source) as comm, Bars() as bar:
        said = compressed(comm, source, args.save_directory, grid, args.multiprocess_num, args.save_split_w8a8s_dir, bar)
    if said:
        print(said)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())

"""Compresses a W8A8S checkpoint: `torchrun --nproc-per-node N -m qtp.sparse_compressor --model_path A --save_directory B`.

Each rank reads its shard, compresses its weights and writes them; rank 0 adds what the folder needs beside them. Alone, with
--tp N, one process does it for all ranks.
"""

import argparse
import sys
from pathlib import Path

import torch

import collectives
from collectives.communicator import Communicator
from launch import mpi
from launch.detect import detect
from qtp.cli import Parser, run
from qtp.config import ModelConfig
from qtp.hub import folder_of
from qtp.layout.split import Grid
from qtp.reshard.__main__ import Bars
from qtp.reshard.compress import check_target, compress_part, finish
from qtp.reshard.reshard import GIB, Request, reshard
from qtp.weights.manifest import HeldFile, heard_files, told_files


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
    rendezvous = mpi.meet(detect())
    size = rendezvous.size if args.tp == -1 else args.tp
    if size < 1 or (rendezvous.size > 1 and size != rendezvous.size):
        raise ValueError(f"--tp {args.tp} disagrees with the world size {rendezvous.size} of the launcher; leave --tp out")
    if args.multiprocess_num < 1:
        raise ValueError(f"--multiprocess_num {args.multiprocess_num} must be at least 1")
    torch.set_num_threads(args.multiprocess_num)
    source, grid = folder_of(args.model_path), Grid.of(size, moe_ep=args.moe_ep, moe_tp=args.moe_tp)
    model = ModelConfig.load(source)
    check_target(model, source, args.save_directory, grid)
    comm = collectives.create("solo" if rendezvous.size == 1 else "gloo", rendezvous, torch.device("cpu"))
    try:
        comm.barrier()  # all have looked before one writes
        if comm.rank == 0 and args.save_split_w8a8s_dir is not None:
            with Bars() as bar:
                reshard(Request(source=source, target=args.save_split_w8a8s_dir, grid=grid, memory=GIB), bar)
        mine = range(size) if comm.size == 1 else range(comm.rank, comm.rank + 1)
        with Bars() as bar:
            files = [compress_part(model, source, args.save_directory, grid, rank, args.multiprocess_num, bar) for rank in mine]
        everyone = [file for told in gathered(comm, files) for file in told]
        if comm.rank == 0:
            before, after = finish(model, source, args.save_directory, grid, everyone)
            print(f"{args.save_directory}: {len(everyone)} parts; {before} bytes became {after} ({after / max(before, 1):.3f})")
        comm.barrier()
    finally:
        comm.close()
    return 0


def gathered(comm: Communicator, files: list[HeldFile]) -> list[list[HeldFile]]:
    """What every rank wrote, by rank. Every rank must call it."""
    text = bytearray(told_files(files))
    sizes = comm.all_gather(torch.tensor([len(text)])).tolist()
    row = torch.zeros(1, max(sizes), dtype=torch.uint8)
    row[0, : len(text)] = torch.frombuffer(text, dtype=torch.uint8)
    rows = comm.all_gather(row)
    return [heard_files(bytes(told[:size].tolist())) for told, size in zip(rows, sizes, strict=True)]


def main(argv: list[str] | None = None) -> int:
    return run(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())

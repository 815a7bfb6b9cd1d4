"""A checkpoint from any cut to any other: `python -m qtp.reshard --model A --save_directory B --tp N`.

    --format parts (default)   B/part{rank}-of-{N}/: what each of N ranks holds, to be run at that tp without reading more
    --format hf                B: whole tensors, as Hugging Face has them
    --verify                   proves B from what lies in it, and that it equals A; without --tp nothing is written, and without
                               --save_directory A itself is verified

A may be a Hugging Face folder (safetensors or .bin), parts, or a folder with MindFormers' names. Parts of W8A8SC are compressed
again for their new ranks; put together (--format hf) they are W8A8S.
"""

import argparse
import os
import sys
from math import inf
from pathlib import Path

from qtp.cli import Parser, byte_count, run
from qtp.config import DTYPES, ModelConfig
from qtp.hub import folder_of
from qtp.layout.split import Grid
from qtp.reshard.bars import Bars
from qtp.reshard.reshard import GIB, Request, open_source, reshard, verified


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="qtp.reshard", description="A checkpoint from any cut to any other.", allow_abbrev=False)
    p.add_argument("--model", "--model_path", required=True, metavar="DIR", help="a checkpoint, or parts")
    p.add_argument("--save_directory", type=Path, metavar="DIR", help="a new folder, or one of this command that was interrupted")
    p.add_argument("--tp", type=int, metavar="N", help="ranks to cut for; not needed with --format hf")
    p.add_argument("--moe_ep", type=int, default=-1)
    p.add_argument("--moe_tp", type=int, default=-1)
    p.add_argument("--format", choices=("parts", "hf"), default="parts")
    p.add_argument("--names", choices=("hf", "mindformers"), default="hf", help="what tensors are called in the result")
    p.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="what floats become; default: as they are stored")
    p.add_argument("--max_shard_size", type=byte_count, default=5 * 10**9, metavar="BYTES", help="of a file of --format hf: 5GB")
    p.add_argument("--max_memory", type=float, default=1.0, metavar="GIB", help="of the process in all (default: %(default)s)")
    p.add_argument("--workers", type=int, default=min(4, len(os.sched_getaffinity(0))), metavar="N", help="threads (%(default)s)")
    p.add_argument("--verify", action="store_true", help="check boxes, checksums and equality")
    return p


def command(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    source = folder_of(args.model)
    if not 0 < args.max_memory < inf:
        raise ValueError(f"--max-memory {args.max_memory} must be a number of GiB above 0")
    memory = int(args.max_memory * GIB)
    writes = args.tp is not None or args.format == "hf"
    if not writes and not args.verify:
        raise ValueError("--tp is missing: for how many ranks? (--format hf puts parts together, --verify alone writes nothing)")
    if writes:
        if args.save_directory is None:
            raise ValueError("--save_directory is missing: where to?")
        if args.format == "hf" and (args.tp or 1, args.moe_ep, args.moe_tp) != (1, -1, -1):
            raise ValueError("--format hf holds whole tensors and is cut for no ranks; leave --tp, --moe_ep and --moe_tp away")
        request = Request(
            source=source,
            target=args.save_directory,
            grid=Grid.of(args.tp if args.format == "parts" else 1, moe_ep=args.moe_ep, moe_tp=args.moe_tp),
            layout=args.format,
            names=args.names,
            dtype=None if args.dtype == "auto" else args.dtype,
            most=args.max_shard_size,
            memory=memory,
            workers=args.workers,
        )
        quantization = ModelConfig.load(source).quantization
        if args.format == "parts" and quantization is not None and quantization.word == "w8a8sc":
            return again(request)
        with Bars() as bar:
            outcome = reshard(request, bar)
        if outcome.kept:
            more = f" and {len(outcome.kept) - 1} more" if len(outcome.kept) > 1 else ""
            where = "whole, in part 0 alone" if args.format == "parts" else "as they are"
            print(f"warning: the model does not declare {outcome.kept[0]}{more}; kept {where}", file=sys.stderr)
        was = f"{outcome.written} of them written now" if outcome.written else "all of them there already"
        print(f"{args.save_directory}: {outcome.tensors} tensors, {outcome.bytes} bytes in {outcome.files} files, {was}")
    if args.verify:
        target = args.save_directory or source
        with Bars() as bar:
            if args.save_directory is None:
                parts = verified(target, None, memory, args.workers, bar)
            else:
                with open_source(source, ModelConfig.load(source).weight_files) as checkpoint:
                    parts = verified(target, checkpoint, memory, args.workers, bar)
        equal = f", and they equal those of {source}" if args.save_directory is not None else ""
        print(f"{target}: verified: {len(parts)} tensors are whole and have their checksums{equal}")
    return 0


def again(request: Request) -> int:
    """W8A8SC, which can be cut only where it is not compressed."""
    from qtp.reshard.compress import recompressed  # needs torch, which most reshards do without

    with Bars() as bar:
        before, after = recompressed(request, bar)
    print(f"{request.target}: {request.grid.size} parts; {before} bytes became {after}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())

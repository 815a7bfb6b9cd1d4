"""What the tests of the Ray launcher start. `python ray_ranks.py meet FOLDER` is a rank above 0; `python ray_ranks.py drive
ADDRESS FOLDER CODE` is a rank 0 whose ranks run CODE, until a line on its standard input tells it to stop."""

import json
import os
import sys
import threading
from pathlib import Path

import torch

import collectives
from collectives.rendezvous import Rendezvous
from launch import ray_cluster
from launch.detect import detect
from launch.local import die_with_parent


def meet(rendezvous: Rendezvous, folder: Path) -> None:
    """Sums a number of each rank over gloo and writes what this rank knows and got."""
    torch.set_num_threads(1)
    with collectives.create("gloo", rendezvous, torch.device("cpu")) as comm:
        sums = comm.all_reduce(torch.tensor([10.0**rendezvous.rank, 1.5]))
        told = {
            "sums": sums.tolist(),
            "local": [rendezvous.local_rank, rendezvous.local_size],
            "address": rendezvous.address,
            "cuda": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "npu": os.environ.get("ASCEND_RT_VISIBLE_DEVICES"),
            "parent": os.getppid(),
            "folder": os.getcwd(),
        }
        (folder / f"{rendezvous.rank}.json").write_text(json.dumps(told), encoding="utf-8")
        comm.barrier()


def drive(address: str | None, folder: Path, code: str) -> None:
    argv = [sys.executable, "-c", code]
    _, ranks = ray_cluster.start(3, argv, 60.0, address=address, resources={"CPU": 1.0})
    ends = [str(ranks.death(rank, 0.0)) for rank in (1, 2)]
    (folder / "started").write_text(json.dumps(ends), encoding="utf-8")
    sys.stdin.readline()
    ends = [str(ranks.death(rank, 0.0)) for rank in (1, 2)]
    ranks.stop(0.2)
    (folder / "stopped").write_text(json.dumps(ends), encoding="utf-8")
    sys.stdin.readline()


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "meet":
        die_with_parent()
        meet(detect(60.0), Path(rest[0]))
        sys.exit(7)
    assert threading.current_thread() is threading.main_thread()
    drive(rest[0] if rest[0] != "none" else None, Path(rest[1]), rest[2])

"""What one rank of tests/processes/test_quantized_processes.py does: the logits of many checkpoints, one after the other.

Arguments: a JSON file with [[folder, ids], ...], and the folder that rank 0 writes the logits to, as 0.pt, 1.pt, ...
"""

import json
import sys
from pathlib import Path

import torch

import collectives
from launch.detect import detect
from qtp.batch import make_batch
from qtp.config import EngineConfig
from qtp.llm import prepare
from qtp.worker.worker import Worker


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    rendezvous = detect()
    comm = collectives.create("shm", rendezvous, torch.device("cpu"))
    for number, (folder, ids) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        config, model = prepare(
            EngineConfig(model=folder, dtype="float32", communicator="shm", block_size=8, num_kv_blocks=len(ids))
        )
        worker = Worker(config, model, comm)
        batch = make_batch([(tuple(ids), 0, tuple(range(len(ids))))], config.block_size, comm.device)
        mine = worker.model.logits(worker.model.hidden(batch))
        widths = comm.all_gather(torch.tensor([mine.shape[1]])).tolist()
        padded = torch.nn.functional.pad(mine, (0, max(widths) - mine.shape[1]))
        parts = [part[:, :width] for part, width in zip(comm.all_gather(padded[None]), widths, strict=True)]
        if comm.rank == 0:
            torch.save(torch.cat(parts, dim=1), Path(sys.argv[2]) / f"{number}.pt")
    comm.close()


if __name__ == "__main__":
    main()

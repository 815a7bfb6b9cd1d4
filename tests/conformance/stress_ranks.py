"""One rank of a stress of shm: random collectives without a pause, each result compared bit by bit.

Arguments: rank, number of ranks, port, descriptor of its listener (rank 0), number of collectives, seconds at most. Ranks are
disturbed at random, each in its own way, so that who is first and who is last changes all the time. Ends with 0 if all was right.
"""

import random
import sys
import time

import torch

from collectives import Rendezvous, create
from collectives.loopback import _sum

POOL = 400_000
LENGTHS = (1, 2, 15, 16, 17, 63, 896, 4096, 8191, 8192, 8193, 16385, 43008, 43009, 65536, 131072, 200_003)


def main() -> None:
    torch.set_num_threads(1)
    rank, size, port, descriptor, count = (int(text) for text in sys.argv[1:6])
    limit = time.monotonic() + float(sys.argv[6])
    rendezvous = Rendezvous(
        rank=rank,
        size=size,
        local_rank=rank,
        local_size=size,
        port=port,
        listener=descriptor if rank == 0 else None,
        timeout=60.0,
    )
    comm = create("shm", rendezvous, torch.device("cpu"))
    pools = [torch.randn(POOL, generator=torch.Generator().manual_seed(r + 1)) for r in range(size)]
    pool_of = {dtype: [pool.to(dtype) for pool in pools] for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    pool_of[torch.int32] = [(pool * 1e6).to(torch.int32) for pool in pools]
    same, own = random.Random(7), random.Random(100 + rank)
    for turn in range(count):
        op = same.choice(("all_reduce",) * 5 + ("all_gather", "broadcast", "reduce_scatter", "all_to_all", "barrier"))
        dtype = same.choice(tuple(pool_of))
        length = same.choice(LENGTHS[:10] if same.random() < 0.97 else LENGTHS)
        start = same.randrange(POOL - length * (size if length < 20_000 else 1))
        inputs = [pool[start : start + length] for pool in pool_of[dtype]]
        mine = inputs[rank]
        disturbance = own.random()
        if disturbance < 0.01:
            time.sleep(own.random() * 2e-3)
        elif disturbance < 0.2:
            until = time.perf_counter() + own.random() * 30e-6
            while time.perf_counter() < until:
                pass
        if op == "all_reduce":
            found, expected = comm.all_reduce(mine.clone()), _sum(inputs)
        elif op == "all_gather":
            found, expected = comm.all_gather(mine), torch.cat(inputs)
        elif op == "broadcast":
            found, expected = comm.broadcast(mine.clone(), turn % size), inputs[turn % size]
        elif op == "reduce_scatter":
            part = length // size
            found = comm.reduce_scatter(mine[: part * size])
            expected = _sum([x[rank * part : (rank + 1) * part] for x in inputs])
        elif op == "all_to_all":
            found = torch.cat(comm.all_to_all([mine.roll(to) for to in range(size)]))
            expected = torch.cat([x.roll(rank) for x in inputs])
        else:
            comm.barrier()
            continue
        if not torch.equal(found, expected):
            wrong = int((found != expected).sum())
            sys.exit(f"rank {rank}: collective {turn}, {op} of {length} {dtype}: {wrong} of {found.numel()} elements are wrong")
        if turn % 500 == 499:
            over = torch.tensor([int(time.monotonic() > limit)], dtype=torch.int32)
            if int(comm.all_reduce(over)):
                sys.exit(f"rank {rank}: only {turn} collectives in {sys.argv[6]} s")
    comm.close()


if __name__ == "__main__":
    main()

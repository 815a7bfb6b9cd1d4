"""One rank: every collective is the identity."""

from collections.abc import Sequence

import torch
from torch import Tensor

from collectives.communicator import Communicator, check_all_to_all, check_ranks, check_sizes, check_src
from collectives.rendezvous import Rendezvous


class Solo(Communicator):
    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = 0, 1, device

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def captures(self, nbytes: int) -> bool:
        return True

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        check_sizes(x, dim, sizes, 0, 1)
        return x

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return x

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        check_src(src, 1)
        return x

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        check_all_to_all(parts, 1)
        return list(parts)

    def barrier(self) -> None:
        pass

    def split(self, ranks: Sequence[int]) -> Communicator:
        check_ranks(ranks, 1)
        return Solo(self.device)

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def create(rendezvous: Rendezvous, device: torch.device) -> Communicator:
    if rendezvous.size != 1:
        raise ValueError(f"communicator 'solo' serves one rank, not {rendezvous.size}; choose gloo or nccl")
    return Solo(device)

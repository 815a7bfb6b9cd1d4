"""Shared memory inside each host and another communicator between hosts, for CPU tensors.

One rank of each host, its leader, talks across. A sum is taken inside the hosts first, then among the leaders, in the order of
the hosts' first ranks; halves travel as float32 and are rounded once, at the end.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from collectives import shm, torch_group
from collectives.communicator import (
    Communicator,
    check_all_to_all,
    check_parts,
    check_ranks,
    check_sizes,
    check_src,
)
from collectives.network import machine_identity
from collectives.rendezvous import Rendezvous

# What a dtype is summed in: what every base communicator adds. Integers wrap alike in a wider one.
_SUMMED_IN = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
    torch.int8: torch.int32,
    torch.uint8: torch.int32,
    torch.int16: torch.int32,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
}


class Hierarchical(Communicator):
    """base: a communicator of all ranks, which belongs to this one from now on. hosts: the number of each rank's host, the same
    list on every rank; None: found out by asking every rank. timeout: seconds, for waits inside a host.

    Every rank of `base` must construct it at once. ValueError on every rank if a host cannot share memory.
    """

    def __init__(self, base: Communicator, timeout: float, hosts: Sequence[int] | None = None) -> None:
        self.rank, self.size, self.device = base.rank, base.size, base.device
        self._base, self._timeout, self.abortable = base, timeout, base.abortable
        exchange = shm.exchange_over(base)
        self._hosts = list(hosts) if hosts is not None else _hosts(exchange)
        if len(self._hosts) != self.size:
            raise ValueError(f"hosts {self._hosts} do not describe {self.size} ranks")
        groups: dict[int, list[int]] = {}
        for rank, number in enumerate(self._hosts):
            groups.setdefault(number, []).append(rank)
        self._groups = list(groups.values())  # the ranks of each host, by leader
        self._here = next(i for i, ranks in enumerate(self._groups) if self.rank in ranks)
        host = shm.connect(exchange, self.rank, self._groups[self._here], self.device, timeout)
        assert host is not None
        self._host = host
        self._leaders = base.split([ranks[0] for ranks in self._groups])

    def all_reduce(self, x: Tensor) -> Tensor:
        wide = _SUMMED_IN.get(x.dtype)
        if wide is None or not x.is_cpu:
            raise ValueError(f"communicator 'hierarchical' does not sum {x.dtype} on {x.device.type}".replace("torch.", ""))
        if self.size == 1 or not x.numel():
            return x
        if len(self._groups) == 1:
            return self._host.all_reduce(x)
        dense = x.to(wide, memory_format=torch.contiguous_format)
        with self._together():
            self._host.all_reduce(dense)
            if self._leaders is not None:
                self._leaders.all_reduce(dense)
            self._host.broadcast(dense, 0)
        return x if dense is x else x.copy_(dense)

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        check_sizes(x, dim, sizes, self.rank, self.size)
        if self.size == 1:
            return x
        lengths = [x.shape[dim]] * self.size if sizes is None else list(sizes)
        mine = x.movedim(dim, 0).contiguous()
        width = prod(mine.shape[1:]) * x.element_size()
        whole = self._gathered(_bytes(mine), [length * width for length in lengths])
        rows = whole.view(x.dtype).view(sum(lengths), *mine.shape[1:])
        return rows.movedim(0, dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        part = check_parts(x, dim, self.size)
        return self.all_reduce(x.clone()).narrow(dim, self.rank * part, part).contiguous()

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        check_src(src, self.size)
        if self.size == 1 or not x.numel():
            return x
        dense = x.contiguous()
        data = _bytes(dense)
        home = next(i for i, ranks in enumerate(self._groups) if src in ranks)
        with self._together():
            if home == self._here:
                self._host.broadcast(data, self._groups[home].index(src))
            if self._leaders is not None:
                self._leaders.broadcast(data, home)
            if home != self._here:
                self._host.broadcast(data, 0)
        return x if dense is x else x.copy_(dense)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        check_all_to_all(parts, self.size)
        return list(self.all_gather(torch.stack(list(parts))[None])[:, self.rank].unbind())

    def barrier(self) -> None:
        with self._together():
            self._host.barrier()
            if self._leaders is not None:
                self._leaders.barrier()
            self._host.barrier()

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        chosen = check_ranks(ranks, self.size)
        base = self._base.split(chosen)
        return None if base is None else Hierarchical(base, self._timeout, [self._hosts[rank] for rank in chosen])

    def abort(self) -> None:
        self._host.abort()
        if self._leaders is not None:
            self._leaders.abort()
        self._base.abort()

    def close(self) -> None:
        self._host.close()
        if self._leaders is not None:
            self._leaders.close()
        self._base.close()

    def _gathered(self, mine: Tensor, sizes: Sequence[int]) -> Tensor:
        """The bytes of all ranks, in rank order."""
        out = mine.new_empty(sum(sizes))
        if not out.numel():
            return out
        here = self._groups[self._here]
        with self._together():
            local = self._host.all_gather(mine, 0, [sizes[rank] for rank in here])
            if self._leaders is not None:
                out = self._leaders.all_gather(local, 0, [sum(sizes[rank] for rank in ranks) for ranks in self._groups])
            self._host.broadcast(out, 0)
        order = [rank for ranks in self._groups for rank in ranks]
        if order == sorted(order):
            return out
        pieces = dict(zip(order, torch.split(out, [sizes[rank] for rank in order]), strict=True))
        return torch.cat([pieces[rank] for rank in range(self.size)])

    @contextmanager
    def _together(self) -> Iterator[None]:
        """If one of the communicators fails, those who wait in the others learn of it."""
        try:
            yield
        except BaseException:
            self._host.abort()
            if self._leaders is not None:
                self._leaders.abort()
                self._leaders.close()
            raise


def over_gloo(rendezvous: Rendezvous, device: torch.device) -> Communicator:
    """Gloo between hosts."""
    if device.type != "cpu":
        raise ValueError(f"communicator 'hierarchical' works on cpu, not on device {device.type}; choose gloo")
    return Hierarchical(torch_group.gloo(rendezvous, device, chosen="hierarchical"), rendezvous.timeout)


def over_mpi(rendezvous: Rendezvous, device: torch.device) -> Communicator:
    """MPI between hosts."""
    from collectives import mpi

    return Hierarchical(mpi.create(rendezvous, device), rendezvous.timeout)


def _hosts(exchange: torch_group.Exchange) -> list[int]:
    """The number of each rank's host: two ranks are on one host if they see the same process ids."""
    names = [json.loads(blob) for blob in exchange(json.dumps(machine_identity()).encode())]
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name or f"alone {rank}", len(numbers)) for rank, name in enumerate(names)]


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor, for what moves bytes without looking at them."""
    return x.as_strided((x.numel(),), (1,)).view(torch.int8)  # a length of 1 may have any stride, which view minds

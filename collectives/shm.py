"""Shared memory between the ranks of one host, for CPU tensors. The work is done by native code: see native/group.hpp.

The segment has no name: rank 0 of a group makes it, the others open it through /proc by rank 0's process id, and the system
frees it with the last process that maps it, however that ends.
"""

import json
import os
import secrets
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from collectives.built import SHM
from collectives.communicator import (
    CollectiveError,
    Communicator,
    check_all_to_all,
    check_parts,
    check_ranks,
    check_sizes,
    check_src,
)
from collectives.network import machine_identity
from collectives.rendezvous import Rendezvous
from collectives.torch_group import Exchange, exchange

_native, why_not = SHM.module, SHM.why_not
_SUMMED = {
    dtype: number
    for number, dtype in enumerate(
        (
            torch.float32,
            torch.bfloat16,
            torch.float16,
            torch.float64,
            torch.int8,
            torch.int16,
            torch.int32,
            torch.int64,
            torch.uint8,
        )
    )
}
_SLOT_BYTES = 256 * 1024
_ONE_STEP_BYTES = 1024 * 1024  # over the square of the number of ranks; measured at 2
_PAGE = 4096
_LEAST_SLOT = 64 * 8  # bytes a rank, so that every rank has a piece of a chunk
_SPIN = 1.5e-3  # seconds of waiting before a rank sleeps, where each has a core of its own
_HEADER = struct.Struct("<16sII")


class Shm(Communicator):
    """Made by `create` or `connect`. Every rank adds in the order of the ranks, so the sums are those of `loopback`, bit for
    bit. Integers wrap."""

    def __init__(self, group: Any, rank: int, size: int, device: torch.device, timeout: float) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._group = group  # None where this rank is alone
        self._timeout = timeout
        self._ended = ""

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        code = _SUMMED.get(x.dtype)
        if code is None or not x.is_cpu:
            raise _refused(x)
        if x.is_contiguous():
            self._group.all_reduce(x.data_ptr(), x.numel(), code)
            return x
        dense = x.contiguous()
        self._group.all_reduce(dense.data_ptr(), dense.numel(), code)
        return x.copy_(dense)

    def sum_at(self, dtype: torch.dtype) -> tuple[Callable[[int, int, int], None], int] | None:
        return None if self.size == 1 or dtype not in _SUMMED else (self._group.all_reduce, _SUMMED[dtype])

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        check_sizes(x, dim, sizes, self.rank, self.size)
        if self.size == 1:
            return x
        dense = _on_cpu(x).contiguous()
        dim %= x.dim()
        lengths = [x.shape[dim]] * self.size if sizes is None else list(sizes)
        out = x.new_empty(*x.shape[:dim], sum(lengths), *x.shape[dim + 1 :])
        rows, inner = prod(x.shape[:dim]), prod(x.shape[dim + 1 :]) * x.element_size()
        self._group.all_gather(dense.data_ptr(), out.data_ptr(), rows, *[length * inner for length in lengths])
        return out

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        part = check_parts(x, dim, self.size)
        if self.size == 1:
            return x.clone()
        code = _SUMMED.get(x.dtype)
        if code is None or not x.is_cpu:
            raise _refused(x)
        whole = x.movedim(dim, 0).contiguous()
        out = x.new_empty(part, *whole.shape[1:])
        self._group.reduce_scatter(whole.data_ptr(), out.data_ptr(), out.numel(), code)
        return out.movedim(0, dim)

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        check_src(src, self.size)
        if self.size == 1:
            return x
        dense = _on_cpu(x).contiguous()
        self._group.broadcast(dense.data_ptr(), dense.numel() * dense.element_size(), src)
        return x if dense is x else x.copy_(dense)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        check_all_to_all(parts, self.size)
        if self.size == 1:
            return [parts[0].clone()]
        sent = torch.stack([_on_cpu(part) for part in parts])
        received = torch.empty_like(sent)
        self._group.all_to_all(sent.data_ptr(), received.data_ptr(), parts[0].numel() * sent.element_size())
        return list(received.unbind())

    def barrier(self) -> None:
        if self._ended:
            raise CollectiveError(f"shm: the communicator {self._ended}")
        if self._group is not None:
            self._group.barrier()

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        chosen = check_ranks(ranks, self.size)
        members = chosen if self.rank in chosen else []
        return connect(exchange_over(self), self.rank, members, self.device, self._timeout)

    def abort(self) -> None:
        if self._group is None:
            self._ended = self._ended or "was aborted"
        else:
            self._group.abort()

    def close(self) -> None:
        if self._group is None:
            self._ended = "is closed"
        else:
            self._group.close()


def create(rendezvous: Rendezvous, device: torch.device) -> Communicator:
    """All ranks of `rendezvous`, which must be on this host."""
    reason = why_not()
    if reason is not None:
        raise ValueError(f"communicator 'shm': {reason}")
    if device.type != "cpu":
        raise ValueError(f"communicator 'shm' works on cpu, not on device {device.type}")
    if rendezvous.local_size < rendezvous.size:
        raise ValueError(
            f"communicator 'shm' serves the ranks of one host, and only {rendezvous.local_size} of {rendezvous.size} are on this "
            "one; choose hierarchical or gloo"
        )
    members = range(rendezvous.size)
    comm = connect(exchange(rendezvous, "shm"), rendezvous.rank, members, device, rendezvous.timeout)
    assert comm is not None
    return comm


@dataclass(frozen=True, kw_only=True, slots=True)
class _Card:
    """What a rank tells the others before they share memory. descriptor, nonce: of the segment, from the one who made it.
    cores: those that it may run on, as bits. trouble: why it could not do its part."""

    pid: int
    machine: str
    cores: int
    descriptor: int = -1
    nonce: str = ""
    trouble: str = ""


def connect(exchange: Exchange, me: int, members: Sequence[int], device: torch.device, timeout: float) -> Shm | None:
    """A communicator among `members`, some of the ranks of `exchange`, of which this one is number `me`; None if it has no
    members. All ranks of the exchange must call it at once; several groups may come of it, but no rank is in two. ValueError on
    every rank if one of them cannot share memory."""
    size, leader = len(members), members[0] if members else me
    own = -1
    group: Any = None
    try:
        card = _Card(pid=os.getpid(), machine=machine_identity(), cores=_cores())
        if size > 1 and me == leader and why_not() is None:
            own, card = _made(size, card)
        cards = [_Card(**json.loads(blob)) for blob in exchange(json.dumps(_fields(card)).encode())]
        trouble = ""
        if size > 1:
            try:
                trouble = why_not() or ""
                group = None if trouble else _mapped(cards, me, members, own, timeout)
            except ValueError as error:
                trouble = str(error)
        troubles = [blob.decode() for blob in exchange(trouble.encode())]
        for rank, told in enumerate(troubles):
            if told:
                raise ValueError(
                    f"communicator 'shm': rank {rank}: {told if told.endswith('choose gloo') else f'{told}; choose gloo'}"
                )
        if group is not None:
            group.barrier()
    except BaseException:
        if group is not None:
            group.close()
        raise
    finally:
        if own >= 0:
            os.close(own)
    return Shm(group, members.index(me), size, device, timeout) if members else None


def exchange_over(comm: Communicator) -> Exchange:
    """An exchange by means of a communicator that is there already."""

    def gather(blob: bytes) -> list[bytes]:
        sizes = comm.all_gather(torch.tensor([len(blob)], dtype=torch.int64, device=comm.device)).tolist()
        padded = torch.tensor([list(blob.ljust(max(*sizes, 1), b"\0"))], dtype=torch.uint8).view(torch.int8)
        rows = comm.all_gather(padded.to(comm.device)).cpu().view(torch.uint8)
        return [bytes(row[:size].tolist()) for row, size in zip(rows, sizes, strict=True)]

    return gather


def _fields(card: _Card) -> dict[str, int | str]:
    return {name: getattr(card, name) for name in card.__slots__}


def _cores() -> int:
    return sum(1 << core for core in os.sched_getaffinity(0))


def _slot_bytes(size: int) -> int:
    needed = (size + 1) * _LEAST_SLOT
    return max(_SLOT_BYTES, -(-needed // _PAGE) * _PAGE)


def _made(size: int, card: _Card) -> tuple[int, _Card]:
    """A new segment's descriptor, and the card that tells of it."""
    slot = _slot_bytes(size)
    nonce = secrets.token_bytes(16)
    descriptor = -1
    try:
        descriptor = os.memfd_create("qtp-shm", os.MFD_CLOEXEC)
        os.posix_fallocate(descriptor, 0, _native.segment_bytes(size, slot))
        os.pwrite(descriptor, _HEADER.pack(nonce, size, slot), 0)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        return -1, _told(card, trouble=f"cannot make shared memory ({error})")
    return descriptor, _told(card, descriptor=descriptor, nonce=nonce.hex())


def _told(card: _Card, **changes: Any) -> _Card:
    return _Card(**{**_fields(card), **changes})


def _mapped(cards: Sequence[_Card], me: int, members: Sequence[int], own: int, timeout: float) -> Any:
    """The native group over the segment of the first member. ValueError, to be read after "rank N:", if there is none."""
    size, first, mine = len(members), cards[members[0]], cards[me]
    if first.trouble:
        raise ValueError(first.trouble if me == members[0] else f"rank {members[0]}: {first.trouble}")
    if first.machine != mine.machine:
        raise ValueError(
            f"it is not on the host of rank {members[0]} (or in another container), and shared memory does not reach that far"
        )
    slot = _slot_bytes(size)
    descriptor = own
    path = f"/proc/{first.pid}/fd/{first.descriptor}"
    try:
        if me != members[0]:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        header = os.pread(descriptor, _HEADER.size, 0)
        expected = _HEADER.pack(bytes.fromhex(first.nonce), size, slot)
        if header != expected or os.fstat(descriptor).st_size != _native.segment_bytes(size, slot):
            raise ValueError(f"found other memory than that of rank {members[0]} (pid {first.pid})")
        return _native.Group(
            descriptor,
            members.index(me),
            tuple(cards[rank].pid for rank in members),
            slot,
            _ONE_STEP_BYTES // size**2,
            timeout,
            _SPIN if _each_has_a_core([cards[rank].cores for rank in members]) else 0.0,
        )
    except OSError as error:
        raise ValueError(f"cannot share memory with rank {members[0]} (pid {first.pid}): {error}") from None
    finally:
        if descriptor not in (own, -1):
            os.close(descriptor)


def _each_has_a_core(cores: Sequence[int]) -> bool:
    union = 0
    for bits in cores:
        union |= bits
    return union.bit_count() >= len(cores)


def _on_cpu(x: Tensor) -> Tensor:
    if not x.is_cpu:
        raise _refused(x)
    return x


def _refused(x: Tensor) -> ValueError:
    if not x.is_cpu:
        return ValueError(f"communicator 'shm' works on cpu, not on device {x.device.type}")
    return ValueError(f"communicator 'shm' does not sum tensors of dtype {str(x.dtype).removeprefix('torch.')}")

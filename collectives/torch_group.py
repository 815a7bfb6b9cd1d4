"""Backends over torch.distributed: the one file that touches it. `gloo` and `nccl` are thin descriptions.

Process groups are built directly, not through the process-wide default group, so nothing here is global and a process may
hold several communicators.
"""

import itertools
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from collectives.communicator import (
    CollectiveError,
    Communicator,
    check_all_to_all,
    check_parts,
    check_ranks,
    check_sizes,
    check_src,
)
from collectives.network import own_address
from collectives.rendezvous import Rendezvous
from collectives.staged import Staged

Exchange = Callable[[bytes], list[bytes]]

_SOURCE = re.compile(r"^\[[^\]]*:\d+\] *")  # where in the library's source it was raised
_SLICE = timedelta(seconds=0.25)
_HALF = (torch.bfloat16, torch.float16)
_REFUSED_DTYPE = ("Invalid scalar type", "Unsupported data type")  # in the words of gloo and nccl, and of hccl


@dataclass(frozen=True, slots=True)
class Backend:
    """What differs between the process groups of torch.

    group(store, rank, size, rendezvous) builds one, abort(group) ends its work; device_type is where its tensors live; half_sum
    says whether it sums half precision well by itself (otherwise the sum is done in float32); scatters: has reduce_scatter and
    all_to_all; blocks: waiting for its work blocks the process, not a stream of the device; captures: a CUDA graph can hold it.
    """

    name: str
    device_type: str
    half_sum: bool
    scatters: bool
    blocks: bool
    group: Callable[[Any, int, int, Rendezvous], Any]
    abort: Callable[[Any], None] = lambda group: group.abort()
    captures: bool = False


class TorchGroup(Communicator):
    def __init__(self, backend: Backend, store: Any, rank: int, size: int, rendezvous: Rendezvous, device: torch.device) -> None:
        _check_device(backend, device)
        self.rank, self.size, self.device = rank, size, device
        self._backend, self._store, self._rendezvous = backend, store, rendezvous
        self._splits = 0
        self._aborted = threading.Event()
        self._left: Any = None  # work that goes on although the wait for it was left
        self._group = backend.group(store, rank, size, rendezvous)

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size == 1 or not x.numel():
            return x
        if x.is_contiguous() and (self._backend.half_sum or x.dtype not in _HALF):
            self._run(lambda: self._group.allreduce([x]))
            return x
        dense = x.to(torch.float32 if x.dtype in _HALF else x.dtype, memory_format=torch.contiguous_format, copy=True)
        self._run(lambda: self._group.allreduce([dense]))
        return x.copy_(dense)

    def captures(self, nbytes: int) -> bool:
        return self._backend.captures

    def check(self) -> None:
        if self._aborted.is_set():  # which ends kernels on the device, and what they leave is of no use
            raise CollectiveError(f"{self._backend.name}: the communicator was aborted")

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        check_sizes(x, dim, sizes, self.rank, self.size)
        if self.size == 1:
            return x
        width = x.shape[dim] if sizes is None else max(sizes)
        mine = x.movedim(dim, 0)
        if mine.shape[0] < width:
            mine = torch.cat([mine, mine.new_zeros(width - mine.shape[0], *mine.shape[1:])])
        mine = mine.contiguous()
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        if mine.numel():
            self._run(lambda: self._group.allgather([rows], [mine]))
        kept = [row[: sizes[i]] if sizes is not None else row for i, row in enumerate(rows)]
        return torch.cat(kept).movedim(0, dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        part = check_parts(x, dim, self.size)
        if self.size == 1 or not x.numel():
            return x.narrow(dim, self.rank * part, part).clone()
        if not self._backend.scatters:
            return self.all_reduce(x.clone()).narrow(dim, self.rank * part, part).contiguous()
        wide = torch.float32 if x.dtype in _HALF and not self._backend.half_sum else x.dtype
        whole = x.movedim(dim, 0).to(wide).contiguous()
        out = whole.new_empty(part, *whole.shape[1:])
        self._run(lambda: self._group._reduce_scatter_base(out, whole))
        return out.to(x.dtype).movedim(0, dim)

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        check_src(src, self.size)
        if self.size == 1 or not x.numel():
            return x
        dense = x.contiguous()
        options = dist.BroadcastOptions()
        options.rootRank = src
        self._run(lambda: self._group.broadcast([dense], options))
        return x if dense is x else x.copy_(dense)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        check_all_to_all(parts, self.size)
        if self.size == 1 or not parts[0].numel():
            return [p.clone() for p in parts]
        sent = torch.stack(list(parts))
        if not self._backend.scatters:
            return list(self.all_gather(sent[None])[:, self.rank].unbind())
        received = torch.empty_like(sent)
        self._run(lambda: self._group.alltoall_base(received, sent, [], []))
        return list(received.unbind())

    def barrier(self) -> None:
        self._run(lambda: self._group.barrier())

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        chosen = check_ranks(ranks, self.size)
        self._splits += 1
        if self.rank not in chosen:
            return None
        store = dist.PrefixStore(f"split/{self._splits}/{'-'.join(map(str, chosen))}", self._store)
        return TorchGroup(self._backend, store, chosen.index(self.rank), len(chosen), self._rendezvous, self.device)

    def abort(self) -> None:
        group = self._group
        self._aborted.set()
        if group is not None and not self._backend.blocks:
            self._backend.abort(group)

    def close(self) -> None:
        if self._left is not None:  # the group's destructor waits for it, with the interpreter in hand
            threading.Thread(target=_keep, args=(self._group, self._left), name="close", daemon=True).start()
        self._left = None
        self._group = None
        self._store = None

    def _run(self, start: Callable[[], Any]) -> None:
        if self._group is None:
            raise CollectiveError(f"{self._backend.name}: the communicator is closed")
        self.check()  # an abort holds a lock of nccl's groups until no graph holds their work, which this thread may have to free
        with _as_collective_error(self._backend.name):
            work = start()
            if self._backend.blocks:
                self._wait(work)
            elif work is not None:
                work.wait()

    def _wait(self, work: Any) -> None:
        """Waits for `work` in slices, so that an abort, or Ctrl-C, is noticed while peers are late."""
        try:
            while not self._aborted.is_set():
                try:
                    work.wait(_SLICE)
                    return
                except RuntimeError:
                    if work.is_completed():  # failed, or done just after the slice was over: this tells which
                        work.wait(_SLICE)
                        return
            raise CollectiveError(f"{self._backend.name}: the communicator was aborted")
        finally:
            if not work.is_completed():
                self._left = work


def _keep(group: Any, work: Any) -> None:
    """Holds a group until its work is done, which may last until the timeout if a peer hangs."""
    while not work.is_completed():
        time.sleep(_SLICE.total_seconds())


def _check_device(backend: Backend, device: torch.device) -> None:
    if device.type != backend.device_type:
        raise ValueError(f"communicator {backend.name!r} works on {backend.device_type}, not on device {device.type}")


@contextmanager
def _as_collective_error(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, CollectiveError):
        raise
    except RuntimeError as error:
        if any(words in str(error) for words in _REFUSED_DTYPE):  # the group looks at the dtype before it sends anything
            raise ValueError(f"communicator {name!r} does not carry tensors of this dtype") from None
        told = _SOURCE.sub("", str(error).splitlines()[0])
        raise CollectiveError(f"{name}: {told}") from None


def join(rendezvous: Rendezvous, backend: str) -> Any:
    """The store that all ranks share, once all of them are there. CollectiveError naming the missing ranks otherwise; ValueError
    on every rank if the names of their backends differ."""
    timeout = timedelta(seconds=rendezvous.timeout)
    serves = _serves(rendezvous)
    port, listener = _listening(rendezvous) if serves else (rendezvous.port, None)
    with _as_collective_error("store"):
        store = dist.TCPStore(
            rendezvous.address,
            port,
            is_master=serves,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener,
        )
        shared = dist.PrefixStore(f"qtp/{rendezvous.attempt}", store)
        if shared.add(f"here/{rendezvous.rank}", 1) > 1:
            raise ValueError(f"rank {rendezvous.rank} joined through this launcher before; construct one LLM a launch")
        try:
            shared.wait([f"here/{rank}" for rank in range(rendezvous.size)], timeout)
        except RuntimeError:
            missing = [rank for rank in range(rendezvous.size) if not shared.check([f"here/{rank}"])]
            raise CollectiveError(f"ranks {missing} did not join within {rendezvous.timeout:g} s") from None
    names = [name.decode() for name in _exchange_over(shared, "backend", rendezvous)(backend.encode())]
    if any(name != backend for name in names):
        told = "; ".join(f"rank {rank}: {name}" for rank, name in enumerate(names))
        raise ValueError(f"ranks chose different communicators ({told}); give every rank the same one")
    return shared


def exchange(rendezvous: Rendezvous, backend: str) -> Exchange:
    """Joins the ranks and returns what gathers a small blob of each of them, in rank order, as often as all ranks call it."""
    return _exchange_over(join(rendezvous, backend), "exchange", rendezvous)


def _listening(rendezvous: Rendezvous) -> tuple[int, int]:
    """The port and descriptor on which rank 0 serves the store: on the rendezvous's address alone, while a store that made its
    own socket would listen on all of the host's."""
    if rendezvous.listener is not None:
        return rendezvous.port, rendezvous.listener
    address, port = rendezvous.address, rendezvous.port
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        server = socket.create_server((address, port), family=family, backlog=max(rendezvous.size, 16))
    except OSError as error:
        raise ValueError(
            f"rank 0 cannot listen on {address}:{port} ({error.strerror}); set MASTER_ADDR to an address of its host, and "
            "MASTER_PORT to a free port of it"
        ) from None
    return server.getsockname()[1], server.detach()


def _serves(rendezvous: Rendezvous) -> bool:
    return rendezvous.rank == 0 and not rendezvous.served


def _exchange_over(store: Any, name: str, rendezvous: Rendezvous) -> Exchange:
    """The rank that serves the store is the last to leave each exchange, since it may end right after."""
    turns = itertools.count()
    timeout = timedelta(seconds=rendezvous.timeout)

    def gather(blob: bytes) -> list[bytes]:
        turn = next(turns)
        keys = [f"{name}/{turn}/{rank}" for rank in range(rendezvous.size)]
        done = [f"{key}/read" for key in keys]
        with _as_collective_error("store"):
            store.set(keys[rendezvous.rank], b"=" + blob)
            store.wait(keys, timeout)
            blobs = [bytes(store.get(key))[1:] for key in keys]
            store.set(done[rendezvous.rank], b"1")
            if _serves(rendezvous):
                store.wait(done, timeout)
        return blobs

    return gather


def _gloo_group(store: Any, rank: int, size: int, rendezvous: Rendezvous) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(rendezvous.address))]
    options._timeout = timedelta(seconds=rendezvous.timeout)
    with _as_collective_error("gloo"):
        return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl_group(store: Any, rank: int, size: int, rendezvous: Rendezvous) -> Any:
    if not dist.is_nccl_available():
        raise ValueError("communicator 'nccl' needs a torch build with CUDA; choose gloo")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=rendezvous.timeout)
    return dist.ProcessGroupNCCL(store, rank, size, options)


GLOO = Backend(name="gloo", device_type="cpu", half_sum=False, scatters=False, blocks=True, group=_gloo_group)
NCCL = Backend(name="nccl", device_type="cuda", half_sum=True, scatters=True, blocks=False, group=_nccl_group, captures=True)


def gloo(rendezvous: Rendezvous, device: torch.device, *, chosen: str = "gloo") -> Communicator:
    """Sockets between hosts and processes. It carries CPU tensors; those of another device go through host memory, copied by hand
    (`Staged`), so that ranks can share one. chosen: what the user called it, where it is part of another one."""
    host = torch.device("cpu")
    group = TorchGroup(GLOO, join(rendezvous, chosen), rendezvous.rank, rendezvous.size, rendezvous, host)
    return group if device.type == "cpu" else Staged(group, device)


def nccl(rendezvous: Rendezvous, device: torch.device) -> Communicator:
    """NVIDIA's library, for CUDA tensors; one rank a GPU. The caller has made `device` the current one. ValueError on every rank
    if two of them have the same: by its name, for where each rank is shown its own alone, all have the number 0."""
    _check_device(NCCL, device)
    return over_nccl(rendezvous, device, name_of_card(device))


def over_nccl(rendezvous: Rendezvous, device: torch.device, card: str) -> Communicator:
    """As `nccl`, of a rank whose card has the name `card`."""
    store, cards = _cards(rendezvous, "nccl", card)
    for rank, name in enumerate(cards):
        if (first := cards.index(name)) < rank:
            raise ValueError(
                f"communicator 'nccl' needs a card for each rank, and ranks {first} and {rank} have the same one; start fewer, "
                "or let them share it with gloo"
            )
    return TorchGroup(NCCL, store, rendezvous.rank, rendezvous.size, rendezvous, device)


def _cards(rendezvous: Rendezvous, chosen: str, card: str) -> tuple[Any, list[bytes]]:
    """The store that all ranks share, and the names of their cards."""
    store = join(rendezvous, chosen)
    return store, _exchange_over(store, "card", rendezvous)(card.encode())


def name_of_card(device: torch.device) -> str:
    """The same in every process, whatever number it knows the CUDA device by."""
    return str(torch.cuda.get_device_properties(device).uuid)


def nccl_or_gloo(rendezvous: Rendezvous, device: torch.device, chosen: str, card: str) -> Communicator:
    """NCCL if each rank tells the name of another `card`; otherwise gloo through host memory. chosen: as in `gloo`."""
    store, cards = _cards(rendezvous, chosen, card)
    if len(set(cards)) == rendezvous.size:
        return TorchGroup(NCCL, store, rendezvous.rank, rendezvous.size, rendezvous, device)
    group = TorchGroup(GLOO, store, rendezvous.rank, rendezvous.size, rendezvous, torch.device("cpu"))
    return Staged(group, device)


def _torch_npu() -> Any:
    try:
        return import_module("torch_npu")
    except ImportError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"communicator 'hccl' needs torch_npu ({told}); install the one for this torch or choose gloo") from None


def _hccl_group(store: Any, rank: int, size: int, rendezvous: Rendezvous) -> Any:
    """As torch_npu itself builds one for torch.distributed."""
    kind = _torch_npu()._C._distributed_c10d.ProcessGroupHCCL
    options = kind.Options()
    options.is_high_priority_stream = False
    options._timeout = timedelta(seconds=rendezvous.timeout)
    return kind(store, rank, size, options)


HCCL = Backend(
    name="hccl",
    device_type="npu",
    half_sum=False,  # not known to round once
    scatters=True,
    blocks=False,
    group=_hccl_group,
    abort=lambda group: group.abort_hccl_comm("the communicator was aborted"),
)


def hccl(rendezvous: Rendezvous, device: torch.device) -> Communicator:
    """Huawei's library through torch_npu, for tensors of Ascend NPUs; one rank an NPU. The caller has made `device` the current
    one. It does not add uint8, bool and float64, which are refused. This has not met hardware: it is checked against a stand-in
    for torch_npu that does what its sources say."""
    _torch_npu()
    return TorchGroup(HCCL, join(rendezvous, "hccl"), rendezvous.rank, rendezvous.size, rendezvous, device)

"""Small sums and gathers between the CUDA cards of one host by one kernel, over memory that they share (CUDA IPC); all else by
another communicator. What the kernel does is told in `cuda_ipc_kernel`.

Whether it is faster than NCCL, and up to which size, has not been measured on several cards.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from collectives import torch_group
from collectives.communicator import CollectiveError, Communicator
from collectives.cuda_driver import CudaDriver
from collectives.cuda_segment import connect
from collectives.rendezvous import Rendezvous
from collectives.wrapped import Wrapped

LIMIT = 512 * 1024
SUMMED = (torch.float32, torch.bfloat16, torch.float16, torch.int32)
_ALIGNED = 16


class CudaIpc(Wrapped):
    """Sums tensors of SUMMED dtypes up to `limit` bytes by itself, half precision in float32, in the order of the ranks: the bits
    are those of `loopback`, the same on every rank. Gathers equal shapes up to `limit` bytes in all. `inner`, which belongs to
    this one from now on, does the rest: NCCL where each rank has a card of its own, else `Staged`. Ranks that share a card take
    turns on it, which is right and slow.

    Nothing here waits for the device, so this can be part of a CUDA graph, and what goes wrong is seen later: a kernel
    that has waited for a peer for `timeout` seconds gives up, its sum is of no use, and the next operation here, `check` or
    `close` raises CollectiveError. `abort` ends kernels that wait. Calls must be in one order on the device: on one stream at a
    time. A graph must not be replayed once this is closed.

    Every rank of `inner` must construct it at once, with its device the current one. ValueError on every rank if one of them
    cannot share memory; `inner` is then still open. limit: a multiple of 4096.
    """

    def __init__(self, inner: Communicator, timeout: float, *, limit: int = LIMIT, driver: CudaDriver | None = None) -> None:
        super().__init__(inner)
        self._timeout, self._limit, self._driver = timeout, limit, driver
        self._ended = ""
        self._told = False  # of a wait that was given up
        self._segment = connect(inner, limit, driver) if self.size > 1 else None

    def all_reduce(self, x: Tensor) -> Tensor:
        self._check()
        if self.size == 1 or not x.numel():
            return x
        if x.device != self.device or x.dtype not in SUMMED or x.nbytes > self._limit:
            return self.inner.all_reduce(x)
        ready = x.is_contiguous() and x.data_ptr() % _ALIGNED == 0
        dense = x if ready else x.clone(memory_format=torch.contiguous_format)
        self._sum(dense)
        return x if ready else x.copy_(dense)

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        """By a sum of bits, of which each rank has its part and zeros elsewhere."""
        self._check()
        words = -(-x.nbytes // 4)
        if self.size == 1 or sizes is not None or not words or x.device != self.device or 4 * words * self.size > self._limit:
            return self.inner.all_gather(x, dim, sizes)
        mine = x.movedim(dim, 0)
        rows = torch.zeros(self.size, words, dtype=torch.int32, device=x.device)
        bits = rows.view(torch.uint8)[:, : x.nbytes]
        bits[self.rank].view(x.dtype).view(mine.shape).copy_(mine)
        self._sum(rows)
        return bits.contiguous().view(x.dtype).view(-1, *mine.shape[1:]).movedim(0, dim)

    def captures(self, nbytes: int) -> bool:
        return nbytes <= self._limit or self.inner.captures(nbytes)

    def check(self) -> None:
        self._check()
        self.inner.check()

    def abort(self) -> None:
        self._ended = self._ended or "was aborted"
        segment = self._segment
        if segment is not None:
            segment.abort()
        self.inner.abort()

    def close(self) -> None:
        """Waits for the device. CollectiveError, once all is released, if a peer was waited for in vain and nobody knows yet."""
        late = -1 if self._segment is None else self._segment.release()  # an abort still reaches what it waits for
        self._segment = None
        self.inner.close()
        aborted, self._ended = self._ended == "was aborted", self._ended or "is closed"
        if late >= 0 and not aborted and not self._told:
            raise self._late(late)

    def _sum(self, x: Tensor) -> None:
        from collectives.cuda_ipc_kernel import launch

        assert self._segment is not None
        launch(x, self._segment, self.rank, self.size, self._timeout)

    def _check(self) -> None:
        if self._ended:
            raise CollectiveError(f"cuda_ipc: the communicator {self._ended}")
        if self._segment is not None and (late := self._segment.late()) >= 0:
            self._told = True
            raise self._late(late)

    def _late(self, rank: int) -> CollectiveError:
        return CollectiveError(f"cuda_ipc: rank {rank} did not come within {self._timeout:g} s")

    def _before(self, op: str, tensors: Sequence[Tensor], choice: Any = None) -> None:
        self._check()

    def _around(self, child: Communicator) -> "CudaIpc":
        try:
            return CudaIpc(child, self._timeout, limit=self._limit, driver=self._driver)
        except BaseException:
            child.close()
            raise


def create(rendezvous: Rendezvous, device: torch.device) -> Communicator:
    """All ranks of `rendezvous`, which must be on this host. NCCL is the inner communicator, or gloo through host memory if two
    of them have the same card. The caller has made `device` the current one."""
    if device.type != "cuda":
        raise ValueError(f"communicator 'cuda_ipc' works on cuda, not on device {device.type}; choose shm or gloo")
    if find_spec("triton") is None:
        raise ValueError("communicator 'cuda_ipc': the package triton is not installed; pip install triton, or choose nccl")
    if rendezvous.local_size < rendezvous.size:
        raise ValueError(
            f"communicator 'cuda_ipc' serves the ranks of one host, and only {rendezvous.local_size} of {rendezvous.size} are on "
            "this one; choose nccl"
        )
    device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    inner = torch_group.nccl_or_gloo(rendezvous, device, "cuda_ipc", torch_group.name_of_card(device))
    try:
        return CudaIpc(inner, rendezvous.timeout)
    except BaseException:
        inner.close()
        raise

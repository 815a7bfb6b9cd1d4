"""MPI through mpi4py, over host buffers, for ranks that mpirun or srun started. mpi4py is imported here only, when first used.

Only the methods that take buffers are used: those with lower-case names pickle. MPI waits by spinning on a core, and a call
that waits for a peer cannot be ended from within: it has no timeout, `abort` only refuses later calls, and the end of a peer is
the launcher's to notice, which then ends all ranks.
"""

import atexit
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
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
from collectives.rendezvous import Rendezvous

_HALF = (torch.bfloat16, torch.float16)
_TYPES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.int8: "INT8_T",
    torch.int16: "INT16_T",
    torch.int32: "INT32_T",
    torch.int64: "INT64_T",
    torch.uint8: "UINT8_T",
}
_MOST = 2**31 - 1
_SMALL = 1 << 18  # bytes of all ranks together, up to which a sum goes by one all-gather
_PATIENCE = 1.0
_TICK = 0.01
_SEGMENT = "/dev/shm/mpich_shm_"


@dataclass(frozen=True, slots=True)
class Library:
    """module: mpi4py.MPI, with MPI initialised; ours: initialised here, so that its end is decided here, too."""

    module: Any
    ours: bool

    def finalize(self) -> None:
        """Finalises MPI, if it is ours and has not ended. All ranks must call it: it waits for them."""
        if self.ours and not self.module.Is_finalized():
            self.module.Finalize()


@cache
def library() -> Library:
    """Loads and initialises MPI, once a process. ValueError if it is not there.

    MPI is not finalised at exit by itself: a rank that fails must not wait for peers that wait for it. See `MpiGroup.close`.
    """
    ours = "mpi4py.MPI" not in sys.modules
    try:
        import mpi4py

        if ours:
            mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"MPI cannot be used ({told}); pip install 'qtp[mpi]' and an MPI library") from None
    return Library(MPI, ours)


class MpiGroup(Communicator):
    """A communicator of MPI's, for CPU tensors. root: this one's end is the end of MPI in this process, see `close`."""

    abortable = False

    def __init__(self, library: Library, comm: Any, *, root: bool) -> None:
        self.rank, self.size, self.device = comm.Get_rank(), comm.Get_size(), torch.device("cpu")
        self._library, self._mpi, self._comm, self._root = library, library.module, comm, root
        self._types = {dtype: getattr(self._mpi, name) for dtype, name in _TYPES.items()}
        self._failed = self._closed = False
        comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        if root and library.ours:
            atexit.register(self._at_exit)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums of floats among more than two ranks do not depend on the order in which an MPI library adds: each element is
        added in one place, or by every rank in rank order."""
        wide = self._summed_in(x.dtype)
        if self.size == 1 or not x.numel():
            return x
        _check_length("all_reduce", x.numel())
        dense = x.to(wide).contiguous()
        flat = dense.view(-1)
        if self.size == 2 or not wide.is_floating_point:
            self._run(lambda: self._comm.Allreduce(self._mpi.IN_PLACE, self._numbers(flat)))
        else:
            self._add_floats(flat)
        return x if dense is x else x.copy_(dense)

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        check_sizes(x, dim, sizes, self.rank, self.size)
        if self.size == 1:
            return x
        mine = x.movedim(dim, 0)
        rows = list(sizes) if sizes is not None else [mine.shape[0]] * self.size
        joined = mine.new_empty(sum(rows), *mine.shape[1:])
        row = joined[:1].numel() * joined.element_size()
        _check_length("all_gather", sum(rows) * row)
        if joined.numel():
            sent, received = _bytes(mine.contiguous()), _bytes(joined)
            self._run(
                lambda: self._comm.Allgatherv(self._raw(sent), self._parts(received, [n * row for n in rows], self._mpi.BYTE))
            )
        return joined.movedim(0, dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        part = check_parts(x, dim, self.size)
        wide = self._summed_in(x.dtype)
        if self.size == 1 or not x.numel():
            return x.narrow(dim, self.rank * part, part).clone()
        _check_length("reduce_scatter", x.numel())
        whole = x.movedim(dim, 0).to(wide).contiguous()
        out = whole.new_empty(part, *whole.shape[1:])
        sent, received = self._numbers(whole.view(-1)), self._numbers(out.view(-1))
        self._run(lambda: self._comm.Reduce_scatter_block(sent, received))
        return out.to(x.dtype).movedim(0, dim)

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        check_src(src, self.size)
        if self.size == 1 or not x.numel():
            return x
        _check_length("broadcast", x.numel() * x.element_size())
        dense = x.contiguous()
        self._run(lambda: self._comm.Bcast(self._raw(_bytes(dense)), src))
        return x if dense is x else x.copy_(dense)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        check_all_to_all(parts, self.size)
        if self.size == 1 or not parts[0].numel():
            return [p.clone() for p in parts]
        _check_length("all_to_all", self.size * parts[0].numel() * parts[0].element_size())
        sent = torch.stack(list(parts))
        received = torch.empty_like(sent)
        self._run(lambda: self._comm.Alltoall(self._raw(_bytes(sent)), self._raw(_bytes(received))))
        return list(received.unbind())

    def barrier(self) -> None:
        self._run(lambda: self._comm.Barrier())

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        chosen = check_ranks(ranks, self.size)
        color = 0 if self.rank in chosen else self._mpi.UNDEFINED
        comm = self._run(lambda: self._comm.Split(color, self.rank))
        return None if comm == self._mpi.COMM_NULL else MpiGroup(self._library, comm, root=False)

    def abort(self) -> None:
        """Later calls raise CollectiveError; the call that a rank is in goes on, and `close` is no longer orderly."""
        self._failed = True

    def close(self) -> None:
        """The communicator that `create` gave: if nothing has failed, this process then takes part in the end of MPI when it
        exits, and a rank above 0 waits there, asleep, until rank 0 exits as well: mpirun ends all ranks as soon as one exits
        without that. Otherwise it exits by itself, and mpirun ends the others."""
        if not self._closed and not self._root and not self._failed:
            self._comm.Free()
        self._closed = True

    def _at_exit(self) -> None:
        if self._failed or not self._closed or self._mpi.Is_finalized():
            return
        deadline = time.monotonic() + _PATIENCE
        try:
            ended = self._comm.Ibarrier()
            while not ended.Test():
                if self.rank == 0 and time.monotonic() > deadline:
                    return
                time.sleep(_TICK)
            self._library.finalize()
        except (self._mpi.Exception, KeyboardInterrupt):
            pass

    def _add_floats(self, flat: Tensor) -> None:
        if self.size * flat.nbytes <= _SMALL:
            rows = flat.new_empty(self.size, flat.numel())
            self._run(lambda: self._comm.Allgather(self._numbers(flat), self._numbers(rows)))
            flat.copy_(rows[0])
            for row in rows[1:]:
                flat.add_(row)
            return
        cuts = [flat.numel() * i // self.size for i in range(self.size + 1)]
        counts = [high - low for low, high in pairwise(cuts)]
        mine = flat.new_empty(counts[self.rank])
        self._run(lambda: self._comm.Reduce_scatter(self._numbers(flat), self._numbers(mine), counts))
        self._run(lambda: self._comm.Allgatherv(self._numbers(mine), self._parts(flat, counts, self._types[flat.dtype])))

    def _run(self, call: Callable[[], Any]) -> Any:
        if self._closed or self._failed:
            raise CollectiveError(f"mpi: the communicator {'is closed' if self._closed else 'has failed or was aborted'}")
        try:
            return call()
        except self._mpi.Exception as error:
            self._failed = True
            raise _failure(error) from None

    def _summed_in(self, dtype: torch.dtype) -> torch.dtype:
        wide = torch.float32 if dtype in _HALF else dtype
        if wide not in _TYPES:
            raise ValueError(f"communicator 'mpi' does not add tensors of {dtype}".replace("torch.", ""))
        return wide

    def _numbers(self, x: Tensor) -> list[Any]:
        return [x.numpy(), self._types[x.dtype]]  # no count: mpi4py would take it for that of one rank

    def _raw(self, x: Tensor) -> list[Any]:
        return [x.numpy(), self._mpi.BYTE]

    def _parts(self, x: Tensor, counts: Sequence[int], kind: Any) -> list[Any]:
        return [x.numpy(), counts, [0, *accumulate(counts[:-1])], kind]


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor. (One with a single element may have any stride.)"""
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


def _check_length(op: str, length: int) -> None:
    if length > _MOST:
        raise ValueError(f"{op}: {length} elements or bytes in one call, and communicator 'mpi' carries {_MOST}; cut the tensor")


def world(rank: int, size: int) -> tuple[Library, Any]:
    """MPI, and a communicator of its own for the ranks that the launcher started together with this one, which is `rank` of
    `size`. Messages on it are apart from those that the process exchanges by MPI itself. ValueError if MPI sees it otherwise."""
    mpi = library()
    if mpi.module.Is_finalized():
        raise ValueError("this process has finalised MPI before; construct one LLM a launch")
    everyone = mpi.module.COMM_WORLD
    if (rank, size) != (everyone.Get_rank(), everyone.Get_size()):
        raise ValueError(
            f"MPI says rank {everyone.Get_rank()} of {everyone.Get_size()}, the launcher rank {rank} of {size}; start the ranks "
            "with the mpirun, or srun --mpi, of the MPI library that mpi4py uses"
        )
    with naming_failures(mpi):
        comm = everyone.Dup()
        if mpi.ours:
            comm.Barrier()  # all have mapped what they share
            _unname_segments()
    return mpi, comm


def _unname_segments() -> None:
    """Takes away the names of the shared memory that MPICH has mapped here, as UCX does by itself: where the launcher kills the
    ranks nobody would, and the memory would be lost until the host starts again."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        _, _, path = line.partition(_SEGMENT)
        if path and "/" not in path and not path.endswith("(deleted)"):
            Path(_SEGMENT + path).unlink(missing_ok=True)


@contextmanager
def naming_failures(library: Library) -> Iterator[None]:
    """Turns what MPI raises into a CollectiveError."""
    try:
        yield
    except library.module.Exception as error:
        raise _failure(error) from None


def _failure(error: Any) -> CollectiveError:
    return CollectiveError(f"mpi: {' '.join(error.Get_error_string().split())}")


def create(rendezvous: Rendezvous, device: torch.device) -> Communicator:
    """Joins the ranks that mpirun, or srun with its MPI plugin, started. Host memory only."""
    if device.type != "cpu":
        raise ValueError(f"communicator 'mpi' works on host memory, not on device {device.type}; choose another one")
    try:
        mpi, comm = world(rendezvous.rank, rendezvous.size)
    except ValueError as error:
        raise ValueError(f"communicator 'mpi': {error}, or choose gloo") from None
    return MpiGroup(mpi, comm, root=True)

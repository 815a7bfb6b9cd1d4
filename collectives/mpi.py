"""MPI through mpi4py, over host buffers, for ranks that mpirun or srun started. mpi4py is imported here only, when first used.

Only the methods that take buffers are used: those with lower-case names pickle. MPI waits by spinning on a core, and a call
that waits for a peer cannot be ended from within: it has no timeout, `abort` only refuses later calls, and the end of a peer is
the launcher's to notice, which then ends all ranks.
"""

import atexit
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
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
_SMALL = 1 << 16  # bytes of all ranks together, up to which a sum goes by one all-gather
_PATIENCE = 1.0
_TICK = 0.01


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
    try:
        import mpi4py

        before = mpi4py.rc.finalize
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"MPI cannot be used ({told}); pip install 'qtp[mpi]' and an MPI library, or choose gloo") from None
    if MPI.Is_finalized():
        raise ValueError("MPI was finalised before by this process; construct the communicator first")
    ours = before is None and not getattr(library, "seen", False)
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    return Library(MPI, ours)

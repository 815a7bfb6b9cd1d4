"""Cores and threads of a rank."""

import os


def allowed_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(local_size: int) -> int:
    """Threads for each of `local_size` ranks on this host: the allowed cores shared out, at least one. OMP_NUM_THREADS is not
    asked: torchrun sets it to 1 by itself."""
    return max(1, allowed_cores() // local_size)

"""Which launcher started this process, if any: the only reader of what it says in the environment."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat

from collectives.rendezvous import Rendezvous

TOKEN = "QTP_TOKEN"
_LOOPBACK = "127.0.0.1"
_FIRST_PORT, _PORTS = 20011, 12007  # below the ports that systems choose by themselves; 12007 is prime
_PSEUDO_STEPS = 0xFFFFFF00  # from here on Slurm's ids of steps that srun did not start: batch, interactive, extern
_NODES = re.compile(r"(?:[^,\[\]]|\[\w+(?:[-,]\w+)*\])+")
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def detect(timeout: float = 300.0, environ: Mapping[str, str] = os.environ) -> Rendezvous:
    """The Rendezvous that the environment describes; a lone process is rank 0 of 1. Cheap and pure.

    In this order: torchrun (and what starts ranks in this repository, which speaks like it), mpirun of Open MPI, mpirun of MPICH
    and Intel MPI, a step of srun. MASTER_ADDR and MASTER_PORT say where the ranks meet, for every launcher. Without them srun's
    ranks meet on the first host of the step, at a port that follows from the job and the step; mpirun's have port 0 with a size
    above 1, and `launch.mpi.meet` completes that. Raises ValueError naming the variable that is malformed or missing.
    """
    if "WORLD_SIZE" in environ or "RANK" in environ:
        return _torchrun(timeout, environ)
    if "OMPI_COMM_WORLD_SIZE" in environ or "OMPI_COMM_WORLD_RANK" in environ:
        names = [f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        return _mpirun(timeout, environ, names)
    names = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
    if "PMI_SIZE" in environ and "MPI_LOCALRANKID" in environ:  # in an allocation of Slurm's as well, where mpirun uses srun
        return _mpirun(timeout, environ, names)
    if "SLURM_PROCID" in environ and _step(environ) is not None:
        return _srun(timeout, environ)
    if "PMI_SIZE" in environ:
        return _mpirun(timeout, environ, names)
    return Rendezvous(timeout=timeout, token=environ.get(TOKEN, ""))


def _torchrun(timeout: float, environ: Mapping[str, str]) -> Rendezvous:
    lone = _int(environ, "WORLD_SIZE") == 1
    ranks = {
        "RANK": _int(environ, "RANK"),
        "WORLD_SIZE": _int(environ, "WORLD_SIZE"),
        "LOCAL_RANK": _int(environ, "LOCAL_RANK", 0 if lone else None),
        "LOCAL_WORLD_SIZE": _int(environ, "LOCAL_WORLD_SIZE", 1 if lone else None),
    }
    rendezvous = _rendezvous(timeout, environ, ranks, environ.get("MASTER_ADDR", _LOOPBACK), _port(environ, 0 if lone else None))
    return replace(
        rendezvous,
        attempt=_int(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        served=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _mpirun(timeout: float, environ: Mapping[str, str], names: Sequence[str]) -> Rendezvous:
    ranks = {name: _int(environ, name) for name in names}
    _, size, _, local_size = ranks.values()
    address, port = environ.get("MASTER_ADDR"), _port(environ, 0)
    if size > local_size and port and address is None:
        raise ValueError("MASTER_PORT is set and MASTER_ADDR is not; set both, or neither and the ranks find an address by MPI")
    return _rendezvous(timeout, environ, ranks, address or _LOOPBACK, port)


def _srun(timeout: float, environ: Mapping[str, str]) -> Rendezvous:
    total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    ranks = {name: _int(environ, name) for name in ("SLURM_PROCID", total, "SLURM_LOCALID")}
    size = ranks[total]
    if size == 1:
        return Rendezvous(timeout=timeout, token=environ.get(TOKEN, ""))
    tasks = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in environ else "SLURM_TASKS_PER_NODE"
    ranks[tasks] = _tasks_of_this_node(environ, tasks, size)
    address = environ.get("MASTER_ADDR") or (_LOOPBACK if ranks[tasks] == size else _first_node(environ))
    port = _port(environ, 0) or _FIRST_PORT + (101 * _int(environ, "SLURM_JOB_ID") + (_step(environ) or 0)) % _PORTS
    return _rendezvous(timeout, environ, ranks, address, port)


def _rendezvous(timeout: float, environ: Mapping[str, str], ranks: Mapping[str, int], address: str, port: int) -> Rendezvous:
    """ranks: the variables of rank, size, local rank and local size, in this order, and their values."""
    rank, size, local_rank, local_size = ranks.values()
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        told = ", ".join(f"{name} {value}" for name, value in ranks.items())
        raise ValueError(f"environment variables {told} make no sense together; they must come from one launcher")
    return Rendezvous(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        address=address,
        port=port,
        token=environ.get(TOKEN, ""),
        timeout=timeout,
    )


def _step(environ: Mapping[str, str]) -> int | None:
    """The number of the step that srun started this process in; None outside of one, as in the script that sbatch runs."""
    for name in ("SLURM_STEP_ID", "SLURM_STEPID"):
        if name in environ:
            step = _int(environ, name)
            return step if step < _PSEUDO_STEPS else None
    return None


def _tasks_of_this_node(environ: Mapping[str, str], name: str, size: int) -> int:
    """From "2(x3),1", which is 2, 2, 2, 1 by node."""
    text, node = environ.get(name, ""), _int(environ, "SLURM_NODEID")
    found = [_TASKS.fullmatch(item) for item in text.split(",")]
    counts = list(chain.from_iterable(repeat(int(m[1]), min(int(m[2] or 1), size)) for m in found if m))
    if None in found or sum(counts) != size:
        raise _malformed(environ, name, f"the tasks of each node, {size} in all")
    if not 0 <= node < len(counts):
        raise _malformed(environ, "SLURM_NODEID", f"one of the {len(counts)} nodes of {name} {text!r}")
    return counts[node]


def _first_node(environ: Mapping[str, str]) -> str:
    """n01 of "n[01-03,7],gpu5"."""
    name = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environ else "SLURM_JOB_NODELIST"
    first = _NODES.match(environ.get(name, ""))
    rest = environ.get(name, "")[first.end() :] if first else "?"
    if first is None or (rest and not rest.startswith(",")):
        raise _malformed(environ, name, "a list of nodes like n[01-03,7],gpu5")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _port(environ: Mapping[str, str], default: int | None) -> int:
    port = _int(environ, "MASTER_PORT", default)
    if "MASTER_PORT" in environ and not 0 < port < 65536:
        raise _malformed(environ, "MASTER_PORT", "a port from 1 to 65535")
    return port


def _int(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise _malformed(environ, name, "a number") from None


def _malformed(environ: Mapping[str, str], name: str, expected: str) -> ValueError:
    found = f"is {environ[name]!r}, not {expected}" if name in environ else f"is missing; it is {expected}"
    return ValueError(
        f"environment variable {name} {found}; start the ranks with torchrun, mpirun or srun, or start one process with --tp N"
    )

"""Which launcher started this process, if any: the only reader of what it says in the environment."""

import os
from collections.abc import Mapping

from collectives.rendezvous import Rendezvous

TOKEN = "QTP_TOKEN"


def detect(timeout: float = 300.0, environ: Mapping[str, str] = os.environ) -> Rendezvous:
    """The Rendezvous that torchrun's variables (or those of `launch.local`, which are the same) describe; a lone process is
    rank 0 of 1. Raises ValueError naming the variable that is malformed or missing."""
    if "WORLD_SIZE" not in environ and "RANK" not in environ:
        return Rendezvous(timeout=timeout)
    size = _int(environ, "WORLD_SIZE")
    return Rendezvous(
        rank=_int(environ, "RANK"),
        size=size,
        local_rank=_int(environ, "LOCAL_RANK", 0 if size == 1 else None),
        local_size=_int(environ, "LOCAL_WORLD_SIZE", 1 if size == 1 else None),
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=_int(environ, "MASTER_PORT", 0 if size == 1 else None),
        attempt=_int(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        served=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        token=environ.get(TOKEN, ""),
        timeout=timeout,
    )


def _int(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        found = "is missing" if text is None else f"is {text!r}, not a number"
        raise ValueError(
            f"environment variable {name} {found}; start the ranks with torchrun, or start one process with --tp N"
        ) from None

"""Backends by name. A vendor adds one through the entry point group `qtp.collectives`, without touching this
repository. Imports no torch."""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from collectives.rendezvous import Rendezvous

if TYPE_CHECKING:
    import torch

    from collectives.communicator import Communicator

Factory = Callable[[Rendezvous, "torch.device"], "Communicator"]

_FACTORIES: dict[str, str] = {
    "solo": "collectives.solo:create",
    "shm": "collectives.shm:create",
    "gloo": "collectives.torch_group:gloo",
    "mpi": "collectives.mpi:create",
    "hierarchical": "collectives.hierarchical:over_gloo",
    "hierarchical+mpi": "collectives.hierarchical:over_mpi",
    "nccl": "collectives.torch_group:nccl",
    "cuda_ipc": "collectives.cuda_ipc:create",
    "hccl": "collectives.torch_group:hccl",
}


def available() -> list[str]:
    """The names that `create` knows."""
    return sorted({*_FACTORIES, *(point.name for point in entry_points(group="qtp.collectives"))})


def create(name: str, rendezvous: Rendezvous, device: "torch.device") -> "Communicator":
    """Joins the ranks of `rendezvous`; every rank must call it with the same name. ValueError if the name is unknown."""
    return _factory(name)(rendezvous, device)


def _factory(name: str) -> Factory:
    if name in _FACTORIES:
        module, _, function = _FACTORIES[name].partition(":")
        factory: Factory = getattr(import_module(module), function)
        return factory
    for point in entry_points(group="qtp.collectives"):
        if point.name == name:
            loaded: Factory = point.load()
            return loaded
    raise ValueError(f"communicator {name!r} is unknown; choose one of {', '.join(available())}")

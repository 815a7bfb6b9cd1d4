"""How ranks talk. Knows no model and no launcher; imports torch and the standard library."""

from typing import TYPE_CHECKING, Any

from collectives.rendezvous import Rendezvous

if TYPE_CHECKING:
    from collectives.communicator import CollectiveError, Communicator
    from collectives.registry import available, create

__all__ = ["CollectiveError", "Communicator", "Rendezvous", "available", "create"]

_HOMES = {
    "CollectiveError": "collectives.communicator",
    "Communicator": "collectives.communicator",
    "available": "collectives.registry",
    "create": "collectives.registry",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used, so that a Rendezvous can be made without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'collectives' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

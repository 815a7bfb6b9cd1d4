"""A communicator that counts what goes through it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from collectives.communicator import Communicator
from collectives.wrapped import Wrapped


@dataclass(frozen=True, slots=True)
class Call:
    """One collective: its name and the bytes of this rank's input tensors."""

    op: str
    bytes: int


class Traced(Wrapped):
    """Passes everything to `inner` and appends a `Call` to `calls`, in order. Communicators split off share the list."""

    def __init__(self, inner: Communicator, calls: list[Call] | None = None) -> None:
        super().__init__(inner)
        self.calls: list[Call] = [] if calls is None else calls

    def _before(self, op: str, tensors: Sequence[Tensor], choice: Any = None) -> None:
        if op != "split":
            self.calls.append(Call(op, sum(t.numel() * t.element_size() for t in tensors)))

    def _around(self, child: Communicator) -> "Traced":
        return Traced(child, self.calls)

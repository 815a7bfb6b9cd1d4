"""A communicator that shows how far its rank is, so that a rank that hangs can be told from those that wait for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.wrapped import Wrapped


@dataclass(slots=True)
class Pulse:
    """step: the plan that this rank runs, -1 between plans; entered: how many collectives it has entered so far, and steps it has
    started on the device. Written by the thread that works, read by the one that answers for it."""

    step: int = -1
    entered: int = 0


class Pulsed(Wrapped):
    """Passes everything to `inner` and counts it in `pulse`, which communicators split off share."""

    def __init__(self, inner: Communicator, pulse: Pulse) -> None:
        super().__init__(inner)
        self.pulse = pulse

    def sum_at(self, dtype: torch.dtype) -> tuple[Callable[[int, int, int], None], int] | None:
        inner = self.inner.sum_at(dtype)
        if inner is None:
            return None
        (add, code), pulse = inner, self.pulse

        def counted(address: int, count: int, code: int) -> None:
            pulse.entered += 1
            add(address, count, code)

        return counted, code

    def captures(self, nbytes: int) -> bool:
        return self.inner.captures(nbytes)

    def _before(self, op: str, tensors: Sequence[Tensor], choice: Any = None) -> None:
        self.pulse.entered += 1

    def _around(self, child: Communicator) -> "Pulsed":
        return Pulsed(child, self.pulse)

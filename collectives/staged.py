"""A communicator of host memory for the tensors of a device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.wrapped import Wrapped


class Staged(Wrapped):
    """Carries tensors of `device` through host memory: each is copied to the CPU, `inner` does its part there, and the result is
    copied back. The first copy waits for the work that was queued on the device's current stream before, the second one is queued
    behind it, and done when the call returns: so the order of the stream is kept, and nothing else need wait.

    For ranks that share a device, which its own library refuses, and for devices without one. Waiting for the host, it cannot be
    part of a CUDA graph. Communicators split off go through host memory too.
    """

    def __init__(self, inner: Communicator, device: torch.device) -> None:
        super().__init__(inner)
        self.device = device

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(self.inner.all_reduce(self._on_host(x)))

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        return self._on_device(self.inner.all_gather(self._on_host(x), dim, sizes))

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return self._on_device(self.inner.reduce_scatter(self._on_host(x), dim))

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return x.copy_(self.inner.broadcast(self._on_host(x), src))

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [self._on_device(part) for part in self.inner.all_to_all([self._on_host(part) for part in parts])]

    def _on_host(self, x: Tensor) -> Tensor:
        """A copy also where x is there already: `inner` may write to it."""
        return x.to("cpu", copy=True)

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(self.device)

    def _before(self, op: str, tensors: Sequence[Tensor], choice: Any = None) -> None:
        pass

    def _around(self, child: Communicator) -> "Staged":
        return Staged(child, self.device)

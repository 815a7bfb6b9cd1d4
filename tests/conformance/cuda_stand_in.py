"""What stands for a card and its driver where there is none: memory that processes share, and Triton's interpreter, which waits
for flags as a card does. To be imported before `collectives.cuda_ipc_kernel`."""

import ctypes
import mmap
import os
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import triton_helper

from collectives import cuda_ipc_kernel
from collectives.cuda_driver import HANDLE_BYTES, CudaDriver, DriverError, Words

LIMIT = 3 * 4096  # programs are slow here
_HANDLE = struct.Struct("<qqq")

if triton_helper.DEVICE.type == "cpu":
    cuda_ipc_kernel._clock = lambda polls: time.monotonic_ns()


class StandIn(CudaDriver):
    """fails: the method that the driver refuses."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.held: dict[int, tuple[mmap.mmap, int]] = {}

    def allocate(self, size: int) -> int:
        self._refuse("allocate")
        descriptor = os.memfd_create("segment")
        os.ftruncate(descriptor, size)
        return self._mapped(descriptor, size)

    def free(self, address: int) -> None:
        _, descriptor = self.held.pop(address)
        os.close(descriptor)  # the memory itself lives on: a sum that came too late must not end the test

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def handle(self, address: int) -> bytes:
        self._refuse("handle")
        memory, descriptor = self.held[address]
        return _HANDLE.pack(os.getpid(), descriptor, len(memory)).ljust(HANDLE_BYTES, b"\0")

    def open(self, handle: bytes) -> int:
        self._refuse("open")
        pid, descriptor, size = _HANDLE.unpack_from(handle)
        return self._mapped(os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR), size)

    def close(self, address: int) -> None:
        self.free(address)

    def allocate_words(self, count: int) -> tuple[int, Words]:
        self._refuse("allocate_words")
        words = (ctypes.c_int32 * count)()
        return ctypes.addressof(words), words

    def free_words(self, words: Words) -> None: ...

    def synchronize(self) -> None: ...

    def _mapped(self, descriptor: int, size: int) -> int:
        memory = mmap.mmap(descriptor, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.held[address] = memory, descriptor
        _KEPT.append(memory)
        return address

    def _refuse(self, method: str) -> None:
        if method == self.fails:
            raise DriverError(f"{method}: not today (801)")


_KEPT: list[mmap.mmap] = []

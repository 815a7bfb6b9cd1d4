"""The few calls of NVIDIA's driver by which processes share memory of cards. CUDA Driver API: Memory Management, cuIpc*.

The driver library comes with every working card, whatever CUDA torch was built for, and memory that it allocates itself is known
to be one allocation, which torch's allocator does not promise.
"""

import ctypes
from typing import Any, TypeAlias

import torch

HANDLE_BYTES = 64
_UNIT = 2 << 20  # less would lie in a block with what else the process holds, and share that too
_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_EVERYWHERE = 3  # CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP

Words: TypeAlias = "ctypes.Array[ctypes.c_int32]"


class DriverError(RuntimeError):
    """A call failed: its name and what the driver says."""


class _Handle(ctypes.Structure):
    _fields_ = (("data", ctypes.c_ubyte * HANDLE_BYTES),)


class CudaDriver:
    """Memory of `device`, by its addresses. Every method may be called in any thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverError(str(error)) from None

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of zeros."""
        address = ctypes.c_uint64()
        whole = -(-size // _UNIT) * _UNIT
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(whole))
        self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(whole))
        self._call("cuCtxSynchronize")
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def write(self, address: int, data: bytes) -> None:
        """There when this returns."""
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)))

    def handle(self, address: int) -> bytes:
        """What another process opens the memory at `address`, made by `allocate`, with."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle.data)

    def open(self, handle: bytes) -> int:
        """The address, for `device`, of another process's memory on this or another card of the host."""
        address = ctypes.c_uint64()
        given = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, ctypes.c_uint(_PEER_ACCESS))
        return address.value

    def close(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def allocate_words(self, count: int) -> tuple[int, Words]:
        """The address, for `device`, of `count` int32 in the host's memory, zeros, and themselves."""
        address = ctypes.c_void_p()
        size = count * ctypes.sizeof(ctypes.c_int32)
        self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_uint(_EVERYWHERE))
        assert address.value is not None
        words = (ctypes.c_int32 * count).from_address(address.value)
        ctypes.memset(words, 0, size)
        seen = ctypes.c_uint64()
        self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(seen), address, ctypes.c_uint(0))
        return seen.value, words

    def free_words(self, words: Words) -> None:
        self._call("cuMemFreeHost", ctypes.c_void_p(ctypes.addressof(words)))

    def synchronize(self) -> None:
        """Returns when the device has done all that this process gave it to do."""
        torch.cuda.synchronize(self._device)

    def _call(self, name: str, *args: Any) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().query()  # the runtime makes the device's context the thread's
            code = getattr(self._library, name)(*args)
        if code:
            told = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(told))
            raise DriverError(f"{name}: {(told.value or b'unknown error').decode()} ({code})")

"""To be imported before triton: kernels run on a CUDA device if there is one, and else in Triton's interpreter, on the CPU."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_FLOATS = {
    tl.float32: torch.float32,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
_convert = interpreter._convert_float


def _rounded(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """As a GPU converts floats: to the nearest, half to even. Triton 3.6's interpreter cuts off, and loses carries."""
    if source not in _FLOATS or target not in _FLOATS:
        return _convert(data, source, target, rounding)
    bits = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(f"int{source.primitive_bitwidth}"))
    floats = bits.view(_FLOATS[source]).to(torch.float32)
    if target == tl.float8e4nv:
        floats = floats.clamp(-448.0, 448.0)  # cvt.satfinite
    there = floats.to(_FLOATS[target]).view(getattr(torch, f"int{target.primitive_bitwidth}"))
    return there.numpy().view(f"uint{target.primitive_bitwidth}").reshape(np.shape(data))


interpreter._convert_float = _rounded

_np_dtype = cache(interpreter._get_np_dtype)


def _element_dtype(kind: Any) -> Any:
    """What Triton's own makes a table of all types for at each call, a twelfth of the time."""
    return np.dtype(np.uint64) if kind.scalar.is_ptr() else _np_dtype(kind.scalar)


interpreter._get_np_dtype = _element_dtype


class _Watched:
    """The interpreter's memory: an IndexError for what lies outside of the memory of the tensors that the kernel was given. Else
    that would be no error here, and on a card only where nothing else lies by chance.

    Not so where kernels know tensors by address: what those of experts read, and all of cuda_ipc's."""

    def __init__(self) -> None:
        self.held: list[tuple[int, int]] = []  # where they begin and end
        self.reads = self.writes = False

    def hold(self, kernel: Any, given: Iterable[Any]) -> None:
        self.writes = "cuda_ipc" not in kernel.__module__
        self.reads = self.writes and "table_ptr" not in kernel.__code__.co_varnames
        storages = [x.untyped_storage() for x in given if isinstance(x, torch.Tensor)]
        self.held = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]

    def _check(self, place: Any, mask: Any, size: int) -> None:
        inside = ~np.asarray(mask, bool)
        for first, end in self.held:
            inside = inside | ((place >= first) & (place <= end - size))
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} of {inside.size} places are outside of what the kernel was given")

    def load(self, place: Any, mask: Any, other: Any, dtype: Any) -> Any:
        if self.reads:
            self._check(place, mask, np.dtype(dtype).itemsize)
        return _memory.load(place, mask, other, dtype)

    def store(self, place: Any, value: Any, mask: Any) -> Any:
        if self.writes:
            self._check(place, mask, value.itemsize)
        return _memory.store(place, value, mask)

    def atomic_rmw(self, op: Any, place: Any, value: Any, mask: Any, sem: Any) -> Any:
        if self.writes:
            self._check(place, mask, value.itemsize)
        return _memory.atomic_rmw(op, place, value, mask, sem)

    def __getattr__(self, name: str) -> Any:
        return getattr(_memory, name)


_memory = interpreter._interpreter
_watched = interpreter._interpreter = _Watched()

_run, _patch, _one_at_a_time = interpreter.GridExecutor.__call__, interpreter._patch_lang, RLock()
_patched: dict[int, Any] = {}


def _alone(self: Any, *args: Any, **kwargs: Any) -> None:
    """Ranks that are threads take turns: the interpreter holds the place in the grid in one place for all."""
    with _one_at_a_time:
        _watched.hold(self.fn, (*args, *kwargs.values()))
        try:
            _run(self, *args, **kwargs)
        finally:
            _patched.clear()


def _patch_once(fn: Any) -> Any:
    """Once a kernel and module. Each call of a function within it would do the same anew, which takes a quarter of the time."""
    module = id(fn.__globals__)
    if module not in _patched:
        _patched[module] = _patch(fn)
    return _patched[module]


interpreter.GridExecutor.__call__, interpreter._patch_lang = _alone, _patch_once


@contextmanager
def poison() -> Iterator[None]:
    """Meanwhile memory that nobody wrote is NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # on a card cuBLAS would ask for a setting of its own
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def few_programs(patch: pytest.MonkeyPatch) -> None:
    """Kernels for one token in larger pieces: each program takes milliseconds in the interpreter."""
    from qtp.attention import triton_backend
    from qtp.kernels.triton import experts, linear, quantized

    patch.setattr(triton_backend, "_PROGRAMS", 6)
    patch.setattr(linear, "_blocks", lambda rows, columns, gated: (16, 64, 4))
    patch.setattr(quantized, "_one", lambda outputs, gated: (16, 64))
    patch.setattr(experts, "_GATE_UP", experts._Rows(64, 256, 4))
    patch.setattr(experts, "_DOWN", experts._Rows(32, 256, 4))

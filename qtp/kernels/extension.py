"""The extension module of the kernels, if it was built. Imports no torch."""

from collectives.built import Extension

_KERNELS = Extension("qtp.kernels._native", 4, "compiled arithmetic")

native, why_not = _KERNELS.module, _KERNELS.why_not

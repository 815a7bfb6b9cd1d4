"""The native code. Everything else about the package is in pyproject.toml.

Each extension is optional: where it cannot be compiled the installation goes on without it, and what needs it says so when it is
asked for. No instruction set is named here: the code chooses at run time.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

COMPILE = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
    "-Wno-uninitialized",  # gcc 12 warns of its own header for gathers
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
]


def native(name: str, folder: str) -> Extension:
    """The extension module `name` from all C++ files in `folder`."""
    files = sorted(path.as_posix() for path in Path(folder).iterdir())
    return Extension(
        name,
        sources=[file for file in files if file.endswith(".cpp")],
        depends=[file for file in files if file.endswith((".hpp", ".inl"))],
        language="c++",
        extra_compile_args=COMPILE,
        optional=True,
    )


setup(
    ext_modules=[
        native("collectives._native", "collectives/native"),
        native("qtp.kernels._native", "qtp/kernels/native"),
    ]
    if sys.platform == "linux"
    else []
)

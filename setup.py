"""The native code. Everything else about the package is in pyproject.toml.

Each extension is optional: where it cannot be compiled the installation goes on without it, and what needs it says so when it is
asked for. No instruction set is named here: the code chooses at run time.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


class BuildExt(build_ext):
    """Compiles the files of an extension side by side: they are all that takes time."""

    def build_extension(self, ext: Extension) -> None:
        one = self.compiler.compile

        def every(sources: list[str], **how: Any) -> list[str]:
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                compile_one = partial(one, **how)
                return [obj for objs in pool.map(lambda source: compile_one([source]), sources) for obj in objs]

        self.compiler.compile = every
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = one


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        native("collectives._native", "collectives/native"),
        native("qtp.kernels._native", "qtp/kernels/native"),
    ]
    if sys.platform == "linux"
    else [],
)

"""Native code that may not have been built. Imports no torch, so that a launcher can ask before anything is loaded."""

import sys
from importlib import import_module
from typing import Any


class Extension:
    """The extension module `name`, whose INTERFACE must be `interface`; `use`: what it is for, in a few words. module: None
    where it was not built or does not load."""

    def __init__(self, name: str, interface: int, use: str) -> None:
        self._interface, self._use = interface, use
        self.module: Any = None
        self._missing = ""
        try:
            self.module = import_module(name)
        except ModuleNotFoundError:
            pass
        except ImportError as error:
            self._missing = f" so that it loads ({error})"

    def why_not(self) -> str | None:
        """Why it cannot be used in this installation, in one line with the way out; None if it can."""
        if sys.platform != "linux":
            return f"{self._use} needs Linux, not {sys.platform}"
        if self.module is None:
            return (
                f"the native code was not built{self._missing}; install a C++ compiler and the Python headers (g++, "
                "python3-dev), run pip install again and look at its output (pip install -v)"
            )
        if self._interface != self.module.INTERFACE:
            return "the native code is older or newer than this Python code; run pip install again"
        return None


SHM = Extension("collectives._native", 1, "shared memory between ranks")

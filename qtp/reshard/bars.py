"""Progress bars of a tool that moves bytes."""

import sys
import threading
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


class Bars:
    """Progress bars on a terminal's stderr, one after the other. Threads may share them."""

    def __enter__(self) -> Callable[[int, str], Callable[[int], None]]:
        self._open: list[Any] = []
        self._lock = threading.Lock()
        return self._next if sys.stderr.isatty() else lambda total, what: lambda count: None

    def _next(self, total: int, what: str) -> Callable[[int], None]:
        bar = tqdm(total=total, unit="B", unit_scale=True, desc=what, leave=False)
        self._open.append(bar)

        def told(count: int) -> None:
            with self._lock:
                bar.update(count)

        return told

    def __exit__(self, *exc: object) -> None:
        for bar in self._open:
            bar.close()

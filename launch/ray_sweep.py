"""`python ray_sweep.py FOLDER`: waits for the end of its standard input, which is that of the process that started a Ray cluster
in FOLDER, and then sees to the end of what is left of the cluster. Ray's own processes mostly end by themselves, but its agents
first wait for an answer of a server that is gone."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_MOMENT = 1.0
_PAUSE = 0.25
_TIMES = 12


def writers(folder: str, proc: Path = Path("/proc")) -> Iterator[int]:
    """Processes, other than this one, that have a file in `folder` open for writing, be it deleted by now."""
    for process in proc.glob("[0-9]*"):
        try:
            for link in (process / "fd").iterdir():
                if os.readlink(link).startswith(f"{folder}/") and _writes(process / "fdinfo" / link.name):
                    if int(process.name) != os.getpid():
                        yield int(process.name)
                    break
        except OSError:  # it has ended, or is not ours
            pass


def _writes(info: Path) -> bool:
    flags = next(text for text in info.read_text(encoding="ascii").splitlines() if text.startswith("flags:"))
    return int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY


def main(folder: str) -> None:
    sys.stdin.buffer.read()
    time.sleep(_MOMENT)
    for _ in range(_TIMES):
        for pid in writers(folder):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_PAUSE)


if __name__ == "__main__":
    main(sys.argv[1])

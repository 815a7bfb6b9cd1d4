"""What a reshard has done so far, in a file beside it: after a kill the same command goes on from there.

The first line is the request; each further one is a job whose bytes have all been written, with the checksums of its boxes. A
last line without an end is one that was being written.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any

from qtp.reshard.folder import put
from qtp.weights.manifest import JOURNAL, VERSION


class Journal:
    """request: what was asked for; done: job -> checksums. Threads may share it."""

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        """Opens the journal of a folder, or begins it. Raises ValueError if it is of another request."""
        self.done: dict[str, list[str]] = {}
        self._path = folder / JOURNAL
        self._lock = threading.Lock()
        if not self._path.exists():
            put(self._path, json.dumps({"version": VERSION, **request}).encode() + b"\n")
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            head, *lines = [json.loads(line) for line in whole.splitlines()]
            self.done = {line["job"]: line["xxh3"] for line in lines}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self._path}: damaged; delete the folder {folder} and start again") from None
        differing(folder, head, {"version": VERSION, **request}, "an unfinished reshard")
        self._file = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW)
        os.ftruncate(self._file, len(whole))
        os.lseek(self._file, 0, os.SEEK_END)

    def add(self, job: str, sums: list[str]) -> None:
        line = memoryview(json.dumps({"job": job, "xxh3": sums}).encode() + b"\n")
        with self._lock:
            while line:
                line = line[os.write(self._file, line) :]

    def close(self) -> None:
        os.close(self._file)

    def remove(self) -> None:
        self._path.unlink()


def differing(folder: Path, was: dict[str, Any], asked: dict[str, Any], what: str) -> None:
    """Raises ValueError if what a folder holds is not what is asked for now."""
    for key in asked:
        if was.get(key) != asked[key]:
            if key in ("source", "state"):
                told = "of another source, or the source has changed since"
            else:
                told = f"with {key} {_said(was.get(key))}, not {_said(asked[key])}"
            raise ValueError(f"{folder}: holds {what} {told}; repeat that command, choose another folder or delete this one")


def _said(value: Any) -> str:
    return ", ".join(f"{k} {n}" for k, n in value.items()) if isinstance(value, dict) else str(value)

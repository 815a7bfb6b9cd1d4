"""What runs inside the Ray actor of a rank: a `Keeper`, which holds the rank's resources and its process."""

import os
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any

_BACKLOG = 1 << 20
_LAST_MOMENT = 1.0
_HANDED_ON = ("PYTHONPATH", "NCCL_", "HCCL_", "GLOO_")


class Keeper:
    """The child process of one rank, to be made an actor by `ray.remote`; its methods run in threads, several at a time.

    Text, numbers, and lists and dictionaries of these cross from and to rank 0. They travel as Ray moves all arguments and
    results, and so does this class (by its name: every node has this package); nothing of ours is pickled.

    The child's standard input is a pipe of the actor, so the child sees its end when the actor ends (`die_with_parent`).
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._size = 0
        self._code: int | None = None

    def place(self) -> dict[str, Any]:
        """host; devices: the ids of the accelerators that Ray gave this actor, by the name of the resource."""
        import ray

        ids: dict[str, list[str]] = ray.get_runtime_context().get_accelerator_ids()
        return {"host": socket.gethostname(), "devices": {name: list(found) for name, found in ids.items()}}

    def start(self, argv: Sequence[str], variables: Mapping[str, str], folder: str) -> dict[str, Any]:
        """Starts the child in `folder`, where this node has it, with `variables` over the actor's own; "" unsets one. Returns
        its pid, or the error."""
        environ = {name: value for name, value in {**os.environ, **variables}.items() if value or name not in variables}
        try:
            self._child = subprocess.Popen(
                list(argv),
                env=environ,
                cwd=folder if os.path.isdir(folder) else None,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            return {"error": f"{error.strerror or error}: {error.filename or argv[0]}"}
        reader = threading.Thread(target=self._read, args=(self._child,), daemon=True)
        reader.start()
        threading.Thread(target=self._wait, args=(self._child, reader), daemon=True).start()
        return {"pid": self._child.pid}

    def news(self, patience: float) -> dict[str, Any]:
        """output: what the child has printed since the last call, whole lines, waiting up to `patience` seconds for some;
        code: how it ended, as subprocess has it, with the last output; None before."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._code is not None, patience)
            output, self._lines, self._size = "".join(self._lines), [], 0
            self._changed.notify_all()
            return {"output": output, "code": self._code}

    def kill(self) -> None:
        """Ends the child at once, even one that is stopped."""
        if self._child is not None:
            self._child.kill()

    def _read(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        while line := child.stdout.readline(_BACKLOG):
            with self._changed:
                self._changed.wait_for(lambda: self._size < _BACKLOG)  # a child that floods waits for its reader
                self._lines.append(line.decode(errors="backslashreplace"))
                self._size += len(line)
                self._changed.notify_all()

    def _wait(self, child: subprocess.Popen[bytes], reader: threading.Thread) -> None:
        code = child.wait()
        reader.join(_LAST_MOMENT)  # a grandchild may hold the pipe for longer
        with self._changed:
            self._code = code
            self._changed.notify_all()


def handed_on() -> dict[str, str]:
    """Variables of rank 0's process that the other ranks need too, wherever they run: where modules are, and the knobs of the
    libraries that ranks talk over."""
    return {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)}


def visible_devices(variable: str) -> list[str] | None:
    """The accelerators that `variable` (CUDA_VISIBLE_DEVICES or its like) leaves to this process; None: all."""
    text = os.environ.get(variable)
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]

"""Ranks 1 to N-1 as child processes of a lone process, which becomes rank 0."""

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from collectives.rendezvous import Rendezvous
from launch.affinity import unbound
from launch.detect import TOKEN
from launch.watch import RankDied

ADDRESS = "127.0.0.1"
_LAST_MOMENT = 2.0


@dataclass(frozen=True, slots=True)
class LocalRanks:
    """The children, rank 1 first."""

    children: tuple[subprocess.Popen[bytes], ...]

    def check(self) -> None:
        """Raises RankDied naming the first child that has ended."""
        for rank in range(1, len(self.children) + 1):
            death = self.death(rank)
            if death is not None:
                raise death

    def death(self, rank: int, patience: float = 0.0) -> RankDied | None:
        """How the child with `rank` ended, waiting up to `patience` seconds for it to; None if it has not."""
        child = self.children[rank - 1]
        try:
            code = child.wait(patience)
        except subprocess.TimeoutExpired:
            return None
        return RankDied(rank, socket.gethostname(), child.pid, f"ended with {how_it_ended(code)}")

    def kill(self, rank: int) -> None:
        """Ends the child with `rank` at once, even one that is stopped."""
        self.children[rank - 1].kill()

    def stop(self, grace: float) -> None:
        """Leaves the children `grace` seconds, in all, to end by themselves, then kills the rest. None is left afterwards, not
        even when this is interrupted."""
        deadline = time.monotonic() + grace
        try:
            for child in self.children:
                try:
                    child.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    child.kill()
        finally:
            for child in self.children:
                child.kill()
                child.wait()
                if child.stdin is not None:
                    child.stdin.close()


def start(size: int, argv: Sequence[str], timeout: float) -> tuple[Rendezvous, LocalRanks]:
    """Starts `size` - 1 children with the command `argv` and torchrun's environment variables, and returns rank 0's
    Rendezvous. The port is the system's choice and is held open from the start, so concurrent runs cannot take it.

    A child sees end of file on its standard input when its parent ends, however that happens: see `die_with_parent`.
    """
    listener = socket.create_server((ADDRESS, 0), backlog=max(size, 16))
    port = listener.getsockname()[1]
    token = new_token()
    children = []
    for rank in range(1, size):
        environ = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": ADDRESS,
            "MASTER_PORT": str(port),
            TOKEN: token,
        }
        for left in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
            environ.pop(left, None)
        out = sys.stderr.fileno() if _has_fd(sys.stderr) else None
        with unbound():
            children.append(subprocess.Popen(list(argv), env=environ, stdin=subprocess.PIPE, stdout=out))
    rendezvous = Rendezvous(
        size=size, local_size=size, address=ADDRESS, port=port, listener=listener.detach(), token=token, timeout=timeout
    )
    return rendezvous, LocalRanks(tuple(children))


def new_token() -> str:
    """A secret for one run, 32 hexadecimal digits."""
    return secrets.token_hex(16)


def die_with_parent() -> None:
    """In a child of `start`: ends this process when the parent is gone, after a moment for its last words."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        time.sleep(_LAST_MOMENT)
        os._exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def _has_fd(stream: object) -> bool:
    try:
        return stream.fileno() >= 0  # type: ignore[attr-defined, no-any-return]
    except (AttributeError, OSError, ValueError):
        return False


def how_it_ended(code: int) -> str:
    """A process's return code, as subprocess has it, in words."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"

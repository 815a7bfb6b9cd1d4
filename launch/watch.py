"""Who is alive, and what is said when someone is not."""

import hashlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")

_FLUSH = 0.5
_AFTERMATH = 10


class RankDied(RuntimeError):
    """A rank is gone: its rank, host, process id and the cause, in one line. `details` holds its own traceback, if it had
    the time to send one; user_error: the cause is a mistake of the user's, which needs no traceback; hangs: its process is
    still there."""

    def __init__(
        self, rank: int, host: str, pid: int, cause: str, *, details: str = "", user_error: bool = False, hangs: bool = False
    ) -> None:
        super().__init__(f"rank {rank} (host {host}, pid {pid}): {cause}")
        self.rank, self.host, self.pid, self.cause = rank, host, pid, cause
        self.details, self.user_error, self.hangs = details, user_error, hangs


class Started(Protocol):
    """The ranks above 0 that a launcher of ours started."""

    def check(self) -> None:
        """Raises RankDied naming the first rank that has ended."""

    def death(self, rank: int, patience: float = 0.0) -> RankDied | None:
        """How `rank` ended, waiting up to `patience` seconds for it to; None if it has not."""

    def kill(self, rank: int) -> None:
        """Ends `rank` at once, even one that is stopped."""

    def stop(self, grace: float) -> None:
        """Leaves the ranks `grace` seconds, in all, to end by themselves, then kills the rest. None is left afterwards."""


@dataclass(frozen=True, slots=True)
class Sign:
    """What rank 0 knows of a rank. silent: seconds since it last gave a sign of life; entered: collectives it has entered."""

    rank: int
    host: str
    pid: int
    silent: float
    entered: int


class StallDetector:
    """Finds the rank that hangs: one that gives no sign of life for `timeout` seconds, at any time, or, when during a step no
    rank enters a collective for `timeout` seconds, the one that has entered fewest, for which all others wait.

    Time is counted in the caller's ticks, not by a clock: a watcher that was itself stopped accuses nobody.
    """

    def __init__(self, timeout: float, tick: float) -> None:
        self._timeout, self._tick = timeout, tick
        self._last: tuple[object, ...] | None = None
        self._still = 0.0

    def look(self, step: int | None, signs: Sequence[Sign]) -> RankDied | None:
        """To be called once a tick with the number of the step that rank 0 runs (None between steps) and a Sign of every rank."""
        dumb = max(signs, key=lambda sign: sign.silent)
        state = (step, *(sign.entered for sign in signs))
        moved = step is None or state != self._last
        self._still = 0.0 if moved else self._still + self._tick
        self._last = state
        waited = f"for {self._timeout:g} s (--stall-timeout)"
        if dumb.silent >= self._timeout or (self._still >= self._timeout and dumb.silent >= self._timeout / 2):
            return RankDied(dumb.rank, dumb.host, dumb.pid, f"hangs: it gave no sign of life {waited}", hangs=True)
        if self._still < self._timeout:
            return None
        late = min(signs, key=lambda sign: sign.entered)
        most = max(sign.entered for sign in signs)
        where = (
            f"{most - late.entered} collectives behind the others"
            if most > late.entered
            else "inside the same collective as all others"
        )
        return RankDied(late.rank, late.host, late.pid, f"hangs: no progress in step {step} {waited}, {where}", hangs=True)


def run_while(call: Callable[[], T], check: Callable[[], None], every: float = 0.05) -> T:
    """Runs a blocking `call` in a thread and returns its result or raises what it raises. Meanwhile `check` runs every
    `every` seconds; what `check` raises is raised at once, and the call is left behind to run into its own timeout."""
    result: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:  # handed over to the caller's thread
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True, name="joining").start()
    while not done.wait(every):
        check()
    if errors:
        for _ in range(_AFTERMATH):  # a rank's connections are gone a moment before it is
            check()
            time.sleep(every)
        raise errors[0]
    return result[0]


def last_words(death: RankDied) -> None:
    """On stderr: the dead rank's own traceback, if there is one, then the one line."""
    details = death.details.rstrip() + "\n" if death.details else ""
    print(f"{details}error: {death}", file=sys.stderr, flush=True)


def speaks(run: str) -> socket.socket | None:
    """Which of several processes on a host speaks, when each of them has noticed the same: the first one to call this with the
    same secret `run`, and as long as it keeps what it got. None for the others. Nothing is left behind."""
    name = "\0qtp-" + hashlib.sha256(f"last words of {run}".encode()).hexdigest()[:32]
    place = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        place.bind(name)
    except OSError:
        place.close()
        return None
    return place


def kill(pid: int) -> None:
    """Ends a process of this host at once."""
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def within(seconds: float, call: Callable[[], object]) -> None:
    """Runs `call` in a thread of its own and waits at most so long for it: for what another thread, or a reader that does not
    read, may hold up for ever."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


def leave(code: int) -> None:
    """Ends this process at once, whatever its threads are in, with nothing run at exit."""
    within(_FLUSH, _flush)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass

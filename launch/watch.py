"""Who is alive, and what is said when someone is not."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class RankDied(RuntimeError):
    """A rank is gone: its rank, host, process id and the cause, in one line. `details` holds its own traceback, if it had
    the time to send one; user_error: the cause is a mistake of the user's, which needs no traceback."""

    def __init__(self, rank: int, host: str, pid: int, cause: str, *, details: str = "", user_error: bool = False) -> None:
        super().__init__(f"rank {rank} (host {host}, pid {pid}): {cause}")
        self.rank, self.host, self.pid, self.cause = rank, host, pid, cause
        self.details, self.user_error = details, user_error


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
        check()
        raise errors[0]
    return result[0]

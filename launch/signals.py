"""SIGINT and SIGTERM: what rank 0 does with them, and the other ranks."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from launch.watch import leave

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 3.0
_AFTERTHOUGHT = 0.7
_HEAD_START = 0.3
_BURST = 0.5  # Ctrl-C under torchrun comes twice: from the terminal and, at once, from torchrun


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM has arrived: `signum`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextmanager
def listening(arrived: Callable[[int, int], None], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While in it, each SIGINT or SIGTERM (several within half a second are one) runs `handler` in the main thread, as soon as
    that runs Python code, and `arrived(signum, count)` in a thread of its own at once, even while the main thread is inside a
    call that does not return. A signal that is ignored stays so. Signals are a matter of the main thread: in any other one this
    does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def listen() -> None:
        count, last = 0, -_BURST
        while signum := os.read(reading, 1):
            if signum[0] in _SIGNALS and time.monotonic() - last >= _BURST:
                count, last = count + 1, time.monotonic()
                arrived(signum[0], count)
        os.close(reading)

    handled = [-_BURST]

    def once(signum: int, frame: FrameType | None) -> None:
        if time.monotonic() - handled[0] >= _BURST:
            handled[0] = time.monotonic()
            handler(signum, frame)

    heard = [signum for signum in _SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, once) for signum in heard}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True, name="signals").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for signum, old in before.items():
            signal.signal(signum, old)
        os.close(writing)


@contextmanager
def interrupting() -> Iterator[None]:
    """Rank 0's way: the first signal raises Interrupted in the main thread, so that everything is closed in order; the next one
    raises it again, which cuts the closing short. Where the main thread does not come to it within a few seconds, or at the
    next signal, the process ends at once; the ranks that it started notice and end too.

    SIGTERM waits for a moment first: launchers send it when another rank has died, and then that death is what counts."""
    handled = threading.Event()
    postponed: list[threading.Timer] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGTERM and not postponed:
            postponed.append(threading.Timer(_AFTERTHOUGHT, signal.pthread_kill, [threading.main_thread().ident, signum]))
            postponed[0].daemon = True
            postponed[0].start()
            return
        handled.set()
        raise Interrupted(signum)

    def arrived(signum: int, count: int) -> None:
        if count == 1:
            threading.Thread(target=force, args=(signum,), daemon=True).start()
        elif not handled.is_set() and not postponed:
            leave(128 + signum)

    def force(signum: int) -> None:
        if not handled.wait(_PATIENCE):
            leave(128 + signum)

    try:
        with listening(arrived, handler):
            try:
                yield
            finally:
                handled.set()
                for timer in postponed:
                    timer.cancel()
    except Interrupted:  # the process is about to end, and one more press would only disturb that
        for signum in _SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        raise


@contextmanager
def leaving(told: Callable[[str], None]) -> Iterator[None]:
    """The other ranks' way: rank 0 got the signal as well and decides, so this rank waits for its word. If none comes within a
    few seconds, `told` is called with the cause and the process ends; at the second signal it ends at once, but for a moment in
    which rank 0 hears it too, so that it does not take this end for a death."""

    def handler(signum: int, frame: FrameType | None) -> None:
        pass

    def arrived(signum: int, count: int) -> None:
        if count == 1:
            threading.Thread(target=later, args=(signum,), daemon=True).start()
        else:
            done.wait(_HEAD_START)
            leave(128 + signum)

    def later(signum: int) -> None:
        if not done.wait(_PATIENCE):
            told(f"ended by {signal.Signals(signum).name}")
            leave(128 + signum)

    done = threading.Event()
    with listening(arrived, handler):
        try:
            yield
        finally:
            done.set()

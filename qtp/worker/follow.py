"""A rank above 0, from joining to the end of the run."""

import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace

from collectives.communicator import CollectiveError, Communicator
from collectives.network import machine_identity
from collectives.pulse import Pulse, Pulsed
from collectives.rendezvous import Rendezvous
from launch.affinity import describe
from launch.signals import leaving
from launch.watch import RankDied, kill, last_words, leave, speaks, within
from qtp.config import EngineConfig, ModelConfig
from qtp.wire.channel import LOST, Follower, SocketFollower
from qtp.wire.frames import Closed
from qtp.wire.messages import Failure, Hello, Pong, StepPlan, Stop
from qtp.worker.joining import communicator, fingerprint, hear_endpoint, share_cores, use_cores
from qtp.worker.worker import Worker

_LOST_PATIENCE = 1.5
_STOP_PATIENCE = 2.0
_WAIT_FOR_WORD = 4.0


def follow(config: EngineConfig, model: ModelConfig, rendezvous: Rendezvous) -> int:
    """Serves rank 0 until it says stop. Returns the exit code of this process: 0 after a Stop, 2 for the user's mistakes,
    otherwise 1; the reason has then been told to rank 0, or stands on stderr if this rank has not joined it.

    The process itself ends, with 1, if rank 0 is gone or gives no sign of life, or the main thread does not come back when it
    should. One rank of the host then says so; a rank 0 that hangs on this host is killed if config.on_death is 'exit'."""
    try:
        return _Following(config, model, rendezvous).run()
    except (Closed, CollectiveError, ValueError) as error:
        print(f"rank {rendezvous.rank}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


class _Following:
    """One rank's life: what the thread that works and the one that hears rank 0 share."""

    def __init__(self, config: EngineConfig, model: ModelConfig, rendezvous: Rendezvous) -> None:
        self._config, self._model = config, model
        self._pulse = Pulse()
        self._timers: list[threading.Timer] = []
        self._back = threading.Event()
        self._comm = communicator(config, rendezvous)
        self._cores = share_cores(config, self._comm)
        use_cores(self._cores)
        digest = fingerprint(config, model)  # may take its time, so before rank 0 counts on this one
        port, token = hear_endpoint(self._comm)
        self._token = rendezvous.token or token
        hello = Hello(
            rank=rendezvous.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            fingerprint=digest,
            machine=machine_identity(),
        )
        self._follower = SocketFollower(rendezvous.address, port, hello, rendezvous.timeout, self._token)
        self._follower.hear(
            pong=lambda: Pong(step=self._pulse.step, entered=self._pulse.entered),
            stopping=self._stopping,
            lost=self._lost,
            stall_timeout=config.stall_timeout,
        )

    def run(self) -> int:
        comm = Pulsed(self._comm, self._pulse)
        try:
            with leaving(lambda cause: tell(self._follower, comm.rank, cause)):
                return serve(self._config, self._model, comm, self._follower, self._pulse, describe(self._cores))
        finally:
            self._follower.close()
            comm.close()
            self._back.set()
            for timer in self._timers:
                timer.cancel()

    def _lost(self, cause: str) -> None:
        """Rank 0 is gone: says so, unless another rank of this host does, and sees to the end of this process."""
        zero = self._follower.welcome
        death = RankDied(0, zero.host, zero.pid, cause)
        self._word = speaks(self._token)
        if self._word is not None and self._comm.abortable:
            within(_LOST_PATIENCE, lambda: last_words(death))
        elif self._word is not None:  # such a launcher ends all ranks in a moment
            last_words(death)
        if cause != LOST and self._config.on_death == "exit" and zero.machine == machine_identity() != "":
            kill(zero.pid)
        self._later(_LOST_PATIENCE, leave, 1)
        self._comm.abort()

    def _stopping(self) -> None:
        """Rank 0 said stop. The thread that works is about to hear it, unless it is in a collective that rank 0 gave up."""
        self._later(_STOP_PATIENCE / 4, self._comm.abort)
        self._later(_STOP_PATIENCE, leave, 0)

    def _later(self, seconds: float, call: Callable[..., None], *args: int) -> None:
        """Calls it unless the thread that works has come back by then."""
        timer = threading.Timer(seconds, call, args)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()
        if self._back.is_set():
            timer.cancel()


def serve(config: EngineConfig, model: ModelConfig, comm: Communicator, follower: Follower, pulse: Pulse, cores: str = "") -> int:
    """Reads this rank's weights and runs rank 0's plans until it says stop; the exit code, as in `follow`. cores: what it runs
    on, in words."""
    worker = None
    try:
        worker = Worker(config, model, comm)
        follower.send(replace(worker.ready, cores=cores))
        while True:
            message = follower.receive()
            if isinstance(message, Stop):
                return 0
            assert isinstance(message, StepPlan), message
            pulse.step = message.step
            worker.follow(message)
            pulse.entered += 1  # a step may have been one graph, with collectives that nobody counts
            pulse.step = -1
    except Closed:
        return 1
    except CollectiveError as error:  # another rank is the cause, and tells; rank 0 ends this one
        return _await_end(follower, comm.rank, str(error))
    except Exception as error:
        if isinstance(error, ValueError):
            tell(follower, comm.rank, str(error), user_error=True)
            return 2
        tell(follower, comm.rank, f"{type(error).__name__}: {error}", details=traceback.format_exc())
        return 1
    finally:
        if worker is not None:
            worker.close()


def tell(follower: Follower, rank: int, cause: str, *, details: str = "", user_error: bool = False) -> None:
    """Tells rank 0 why this rank ends, or stderr if rank 0 is gone too."""
    try:
        follower.send(Failure(rank=rank, cause=cause, details=details, user_error=user_error))
    except Closed:
        print(f"rank {rank}: {cause}", file=sys.stderr)


def _await_end(follower: Follower, rank: int, cause: str) -> int:
    """Waits for rank 0's word after a failed collective, and tells it if none comes: then this rank alone has met it."""

    def give_up() -> None:
        tell(follower, rank, cause)

    timer = threading.Timer(_WAIT_FOR_WORD, give_up)
    timer.daemon = True
    timer.start()
    try:
        while not isinstance(follower.receive(), Stop):
            pass
        return 0
    except Closed:
        return 1
    finally:
        timer.cancel()

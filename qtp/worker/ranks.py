"""Rank 0 of a run: it brings the other ranks to life, runs steps on all of them, and sees to the end of all when one is gone.

Order on every rank: communicator, control channel (who am I), weights, ready, steps; see `follow` for the other ranks' side.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from collectives.communicator import CollectiveError, Communicator
from collectives.loopback import Loopback, loopback
from collectives.network import machine_identity
from collectives.pulse import Pulse, Pulsed
from collectives.rendezvous import Rendezvous
from launch.affinity import describe, threads_per_rank
from launch.signals import Interrupted
from launch.watch import RankDied, Sign, StallDetector, Started, kill, last_words, leave, run_while, within
from qtp.config import EngineConfig, ModelConfig
from qtp.wire.channel import LOST, Leader, SocketLeader, tick_of
from qtp.wire.messages import Ready, StepPlan, StepResult, Stop, Welcome
from qtp.wire.queues import QueueFollower, QueueLeader
from qtp.worker.follow import serve
from qtp.worker.joining import communicator, fingerprint, share_cores, tell_endpoint, token_of, use_cores, use_device
from qtp.worker.worker import Worker

log = logging.getLogger("qtp")

_WAIT_FOR_CAUSE = 3.0
_GRACE = 5.0
_GRACE_AFTER_DEATH = 1.0
_PATIENCE = 2.0
_PATIENCE_OF_A_LIBRARY = 60.0
_MOMENT = 0.3

Progress = Callable[[int], None]


class Ranks:
    """Rank 0 of a run, which it brings to life: an `engine.Executor`.

    Under a launcher (rendezvous.size > 1) the other ranks call `follow` themselves; `started` are those of a lone process, from
    `launching.launch`, which this object stops. For the communicator 'loopback' it makes them, as threads. Raises ValueError for
    the user's mistakes and RankDied, naming rank, host, pid and cause, when another rank is gone or hangs: from the call that
    runs, or the next one. With config.on_death 'exit' the process says so and ends with 1, even while no call runs. `close` ends
    all ranks; it is also called when starting fails.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        rendezvous: Rendezvous,
        started: Started | None = None,
        progress: Progress = lambda count: None,
    ) -> None:
        assert rendezvous.rank == 0
        self._config = config
        self.worker: Worker | None = None
        self._started = started
        self._channel: Leader | None = None
        self._comm: Communicator | None = None
        self._threads: list[threading.Thread] = []
        self._undo: Callable[[], None] = lambda: None
        self._pulse = Pulse()
        self._step = -1  # the last one begun
        self._cause: RankDied | None = None
        self._free = threading.Event()  # set while no call runs
        self._closing = threading.RLock()
        try:
            self._start(config, model, rendezvous, progress)
        except BaseException:
            self.close()
            raise
        finally:
            self._free.set()

    @property
    def ahead(self) -> int:
        """As `Worker.ahead`."""
        return self.worker.ahead if self.worker is not None else 0

    def execute(self, plan: StepPlan) -> StepResult:
        """Raises ValueError once closed. A step that fails or is interrupted leaves ranks that disagree, so it closes them."""
        with self._running(plan.step) as worker:
            self._send(plan)
            result = worker.execute(plan)
            self._pulse.entered += 1  # as other ranks count it (`serve`)
            return result

    def begin(self, plan: StepPlan) -> None:
        """As `Worker.begin`, where there is `ahead`; raises as `execute`."""
        self._step = plan.step
        with self._running(plan.step) as worker:
            self._send(plan)
            worker.begin(plan)
            self._pulse.entered += 1

    def finish(self) -> StepResult:
        """As `Worker.finish`; raises as `execute`."""
        with self._running(self._step) as worker:
            return worker.finish()

    def _send(self, plan: StepPlan) -> None:
        if (channel := self._channel) is not None:
            channel.send(plan)

    @contextmanager
    def _running(self, step: int) -> Iterator[Worker]:
        """While rank 0 works on `step`, or waits for it."""
        worker = self.worker
        if worker is None or not self.alive:
            raise self._cause or ValueError("this LLM is closed, by close() or by a step that failed; construct it anew")
        self._free.clear()
        try:
            with self._naming_the_cause():
                self._pulse.step = step
                yield worker
        except BaseException:
            self.close()
            raise
        finally:
            self._pulse.step = -1
            self._free.set()

    @property
    def alive(self) -> bool:
        """Whether steps can run."""
        return self._comm is not None

    def close(self) -> None:
        """Tells the other ranks to stop, and waits for those that this process started. Harmless when repeated."""
        with self._closing:
            channel, self._channel = self._channel, None  # first, so that the watch takes what follows for no death
            if channel is not None:
                within(_PATIENCE, lambda: _say_stop(channel))
                channel.close()
            if self.worker is not None:
                self.worker.close()
            if self._comm is not None:  # before waiting: a rank in the midst of a collective ends with it
                self._comm.close()
                self._comm = None
            self.worker = None  # weights and KV cache go with it
            if self._started is not None:
                self._started.stop(grace=0.0 if channel is None else _GRACE if self._cause is None else _GRACE_AFTER_DEATH)
                self._started = None
            for thread in self._threads:
                thread.join()
            self._threads = []
            self._undo()
            self._undo = lambda: None

    def _start(self, config: EngineConfig, model: ModelConfig, rendezvous: Rendezvous, progress: Progress) -> None:
        if config.communicator == "loopback":
            self._start_threads(config, model, use_device(config, rendezvous))
            cores = "a thread of this process"
        else:
            check = self._started.check if self._started is not None else lambda: None
            comm = run_while(lambda: communicator(config, rendezvous), check)
            self._comm = Pulsed(comm, self._pulse) if config.tp > 1 else comm
            share = run_while(lambda: share_cores(config, comm), check)
            cores, self._undo = describe(share), use_cores(share)
            if config.tp > 1:
                self._channel = channel = run_while(lambda: _listen(comm, rendezvous, fingerprint(config, model)), check)
                threading.Thread(target=self._watch, args=(channel, comm), daemon=True, name="watch").start()

        def reading(count: int) -> None:
            self._raise_death()
            progress(count)

        with self._naming_the_cause():
            self._raise_death()
            self.worker = Worker(config, model, self._the_comm, reading)
        self.ready: list[Ready] = [replace(self.worker.ready, cores=cores)]
        if self._channel is not None:
            with self._naming_the_cause():
                self.ready += self._channel.ready()

    @property
    def _the_comm(self) -> Communicator:
        assert self._comm is not None, "closed"
        return self._comm

    def _start_threads(self, config: EngineConfig, model: ModelConfig, device: torch.device) -> None:
        comms: list[Loopback] = loopback(config.tp, device, config.timeout)
        channel = QueueLeader(config.tp)
        self._comm, self._channel = comms[0], channel
        for comm, follower in zip(comms[1:], channel.followers, strict=True):
            thread = threading.Thread(target=_follow_in_thread, args=(config, model, comm, follower), daemon=True)
            thread.start()
            self._threads.append(thread)
        before = torch.get_num_threads()
        torch.set_num_threads(config.threads or threads_per_rank(config.tp))
        self._undo = lambda: torch.set_num_threads(before)

    def _raise_death(self) -> None:
        channel = self._channel
        death = channel.failure(0) if channel is not None else None
        if death is not None:
            raise death

    @contextmanager
    def _naming_the_cause(self) -> Iterator[None]:
        """Turns a failed collective, or a device's error after one, into the death that caused it, if another rank tells or shows
        one; likewise SIGTERM, which launchers send when a rank has died."""
        try:
            yield
        except Interrupted as interrupted:
            channel = self._channel
            death = channel.failure(0) if channel is not None and interrupted.signum == signal.SIGTERM else None
            if death is None:
                raise
            self._cause = self._in_full(death)
            raise (self._cause or death) from None
        except (RankDied, CollectiveError, torch.AcceleratorError):
            death = self._cause = self._death()
            if death is None:
                raise
            raise (ValueError(f"rank {death.rank}: {death.cause}") if death.user_error else death) from None

    def _death(self) -> RankDied | None:
        """The first death among the other ranks that can be found out within a few seconds, if any."""
        channel = self._channel
        return self._in_full(channel.failure(_WAIT_FOR_CAUSE)) if channel is not None else self._cause

    def _in_full(self, death: RankDied | None) -> RankDied | None:
        """How a child ended says more than that its connection was lost; what it told itself says most."""
        started = self._started
        if started is not None and death is not None and death.cause == LOST:
            return started.death(death.rank, _WAIT_FOR_CAUSE) or death
        return death

    def _watch(self, channel: SocketLeader, comm: Communicator) -> None:
        """In a thread of its own: asks all ranks for signs of life, and when one is gone or hangs sees to the end of all."""
        tick = tick_of(self._config.stall_timeout) if self._config.stall_timeout else 1.0
        detector = StallDetector(self._config.stall_timeout or float("inf"), tick)
        host, pid = socket.gethostname(), os.getpid()
        while (death := channel.failure(tick)) is None:
            if self._channel is not channel:
                return  # closed
            channel.ping()
            step = self._pulse.step
            signs = [Sign(0, host, pid, 0.0, self._pulse.entered), *channel.signs(tick)]
            stalled = detector.look(step if step >= 0 else None, signs)
            if stalled is not None:
                channel.report(stalled)
        if self._channel is channel:
            self._end(channel, comm, death)

    def _end(self, channel: SocketLeader, comm: Communicator, death: RankDied) -> None:
        """A rank is gone or hangs. The call that runs, freed from its collective, raises the death; where none runs, or it does
        not come back, this thread does what is left to do."""
        if not comm.abortable and (death.hangs or death.cause == LOST):
            # The call cannot be freed, and such a launcher ends all ranks, silently, as soon as it notices.
            last_words(death)
            leave(1)
        if death.hangs and death.rank > 0:
            self._kill(channel, death)
        threading.Thread(target=comm.abort, daemon=True).start()  # a device's library may take its time
        exits = self._config.on_death == "exit"
        if not self._free.wait(_PATIENCE if exits else _PATIENCE_OF_A_LIBRARY):
            full = self._in_full(death) or death
            if not self._free.is_set():
                _say_and_leave(channel, full)
        if self._free.wait(_MOMENT) and self.alive:  # no call has noticed
            threading.Event().wait(_MOMENT)
            if self._free.is_set() and self.alive:
                self._cause = self._in_full(death) or death
                if exits and self._free.is_set():
                    _say_and_leave(channel, self._cause)
                log.error("error: %s", self._cause)
                self.close()

    def _kill(self, channel: SocketLeader, death: RankDied) -> None:
        started = self._started
        if started is not None:
            started.kill(death.rank)
        elif channel.machine(death.rank) == machine_identity() != "":
            kill(death.pid)


def _say_and_leave(channel: SocketLeader, death: RankDied) -> None:
    """Ends this process, with as many of these steps as nobody holds up."""
    within(_MOMENT, lambda: last_words(death))
    within(_MOMENT, lambda: _say_stop(channel))  # so that nobody else has a last word
    leave(2 if death.user_error else 1)


def _say_stop(channel: Leader) -> None:
    try:
        channel.send(Stop())
    except RankDied:
        pass


def _listen(comm: Communicator, rendezvous: Rendezvous, fingerprint: str) -> SocketLeader:
    """Opens the control channel on the rendezvous's address and tells the others, over the communicator, where it is."""
    token, told = token_of(rendezvous)
    welcome = Welcome(host=socket.gethostname(), pid=os.getpid(), machine=machine_identity())
    try:
        leader = SocketLeader(rendezvous.address, rendezvous.size, token, fingerprint, welcome)
    except OSError as error:
        raise ValueError(
            f"rank 0 cannot listen on {rendezvous.address} ({error.strerror}); set MASTER_ADDR to an address of its host"
        ) from None
    try:
        tell_endpoint(comm, leader.port, told)
        leader.accept(rendezvous.timeout)
    except BaseException:
        leader.close()
        raise
    return leader


def _follow_in_thread(config: EngineConfig, model: ModelConfig, comm: Loopback, follower: QueueFollower) -> None:
    if serve(config, model, comm, follower, Pulse()) != 0:
        comm.close()
    follower.close()

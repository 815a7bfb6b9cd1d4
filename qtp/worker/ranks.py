"""Bringing all ranks of a run to life and running steps on them: rank 0's side (`Ranks`) and the others' (`follow`).

Order on every rank: communicator, control channel (who am I), weights, ready, steps.
"""

import hashlib
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

import collectives
from collectives.communicator import CollectiveError, Communicator
from collectives.loopback import Loopback, loopback
from collectives.rendezvous import Rendezvous
from launch import local
from launch.affinity import threads_per_rank
from launch.watch import RankDied, run_while
from qtp.config import EngineConfig, ModelConfig
from qtp.weights.store import Store
from qtp.wire.channel import LOST, Closed, Follower, Leader, QueueFollower, QueueLeader, SocketFollower, SocketLeader
from qtp.wire.messages import Failure, Hello, Ready, StepPlan, StepResult, Stop
from qtp.worker.worker import Worker

_ENDPOINT_BYTES = 64
_WAIT_FOR_CAUSE = 3.0
_GRACE = 5.0

Progress = Callable[[int], None]


class Ranks:
    """Rank 0 of a run, which it brings to life: an `engine.Executor`.

    Under a launcher (rendezvous.size > 1) the other ranks call `follow` themselves; a lone process starts its own, as child
    processes or, for the communicator 'loopback', as threads. Raises ValueError for the user's mistakes and RankDied, naming
    rank, host, pid and cause, when another rank is gone. `close` ends all ranks; it is also called when starting fails.
    """

    def __init__(
        self, config: EngineConfig, model: ModelConfig, rendezvous: Rendezvous, progress: Progress = lambda count: None
    ) -> None:
        assert rendezvous.rank == 0
        self._children: local.LocalRanks | None = None
        self._channel: Leader | None = None
        self._comm: Communicator | None = None
        self._threads: list[threading.Thread] = []
        try:
            self._start(config, model, rendezvous, progress)
        except BaseException:
            self.close()
            raise

    def execute(self, plan: StepPlan) -> StepResult:
        """Raises ValueError once closed. A step that fails or is interrupted leaves ranks that disagree, so it closes them."""
        if not self.alive:
            raise ValueError("this LLM is closed, by close() or by a step that failed; construct it anew")
        try:
            with self._naming_the_cause():
                if self._channel is not None:
                    self._channel.send(plan)
                return self.worker.execute(plan)
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether steps can run."""
        return self._comm is not None

    def close(self) -> None:
        """Tells the other ranks to stop, and waits for those that this process started. Harmless when repeated."""
        told = self._channel is not None
        if self._channel is not None:
            try:
                self._channel.send(Stop())
            except RankDied:
                pass
            self._channel.close()
            self._channel = None
        if self._comm is not None:  # before waiting: a rank in the midst of a collective ends with it
            self._comm.close()
            self._comm = None
        if self._children is not None:
            self._children.stop(grace=_GRACE if told else 0.0)
            self._children = None
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _start(self, config: EngineConfig, model: ModelConfig, rendezvous: Rendezvous, progress: Progress) -> None:
        if config.communicator == "loopback":
            self._start_threads(config, model)
        else:
            if rendezvous.size < config.tp:
                argv = [sys.executable, "-m", "qtp.worker", json.dumps(asdict(config))]
                rendezvous, self._children = local.start(config.tp, argv, config.timeout)
            check = self._children.check if self._children is not None else lambda: None
            use_threads(config, rendezvous)
            self._comm = run_while(lambda: communicator(config, rendezvous), check)
            if config.tp > 1:
                self._channel = run_while(lambda: _listen(self._the_comm, rendezvous, fingerprint(config, model)), check)
        with self._naming_the_cause():
            self.worker = Worker(config, model, self._the_comm, progress)
        self.ready: list[Ready] = [self.worker.ready]
        if self._channel is not None:
            with self._naming_the_cause():
                self.ready += self._channel.ready()

    @property
    def _the_comm(self) -> Communicator:
        assert self._comm is not None, "closed"
        return self._comm

    def _start_threads(self, config: EngineConfig, model: ModelConfig) -> None:
        comms: list[Loopback] = loopback(config.tp, torch.device(config.device), config.timeout)
        channel = QueueLeader(config.tp)
        for comm, follower in zip(comms[1:], channel.followers, strict=True):
            thread = threading.Thread(target=_follow_in_thread, args=(config, model, comm, follower), daemon=True)
            thread.start()
            self._threads.append(thread)
        self._comm, self._channel = comms[0], channel

    @contextmanager
    def _naming_the_cause(self) -> Iterator[None]:
        """Turns a failed collective into the death that caused it, if another rank tells or shows one."""
        try:
            yield
        except (RankDied, CollectiveError):
            death = self._death()
            if death is None:
                raise
            raise (ValueError(f"rank {death.rank}: {death.cause}") if death.user_error else death) from None

    def _death(self) -> RankDied | None:
        """The first death among the other ranks that can be found out within a few seconds, if any. How a child ended says
        more than that its connection was lost; what it told itself says most."""
        death = self._channel.failure(_WAIT_FOR_CAUSE) if self._channel is not None else None
        if self._children is not None and death is not None and death.cause == LOST:
            return self._children.death(death.rank, _WAIT_FOR_CAUSE) or death
        return death


def communicator(config: EngineConfig, rendezvous: Rendezvous) -> Communicator:
    device = torch.device(config.device)
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if rendezvous.local_size > found:
            raise ValueError(
                f"{rendezvous.local_size} ranks on this host need as many GPUs, and it has {found}; use --device cpu"
            )
        device = torch.device("cuda", rendezvous.local_rank)
        torch.cuda.set_device(device)
    return collectives.create(config.communicator, rendezvous, device)


def use_threads(config: EngineConfig, rendezvous: Rendezvous) -> None:
    """Sets this process's threads: config.threads, or its share of the allowed cores."""
    torch.set_num_threads(config.threads or threads_per_rank(rendezvous.local_size))


def fingerprint(config: EngineConfig, model: ModelConfig) -> str:
    """A digest of all that must be the same on every rank: the settings, the model's config and the weight files (their headers,
    sizes and a sample). Where the folder lies and what only concerns one host is left out."""
    settings = {**asdict(config), "model": "", "threads": 0}
    with Store(Path(config.model)) as store:
        content = f"{settings}{replace(model, moe=None)}{_moe_text(model)}{store.fingerprint()}"
    return hashlib.sha256(content.encode()).hexdigest()


def _moe_text(model: ModelConfig) -> str:
    return "" if model.moe is None else f"{replace(model.moe, layers=frozenset())}{sorted(model.moe.layers)}"


def follow(config: EngineConfig, model: ModelConfig, rendezvous: Rendezvous) -> int:
    """A rank above 0, from joining to the end of the run. Returns the exit code of its process: 0 after a Stop, 2 for the
    user's mistakes, otherwise 1; the reason has then been told to rank 0, or stands on stderr if rank 0 was not there yet."""
    use_threads(config, rendezvous)
    try:
        comm = communicator(config, rendezvous)
        follower = _connect(comm, rendezvous, fingerprint(config, model))
    except (Closed, CollectiveError, ValueError) as error:
        print(f"rank {rendezvous.rank}: {error}", file=sys.stderr)
        return 1
    try:
        return _serve(config, model, comm, follower)
    finally:
        follower.close()
        comm.close()


def _serve(config: EngineConfig, model: ModelConfig, comm: Communicator, follower: Follower) -> int:
    try:
        worker = Worker(config, model, comm)
        follower.send(worker.ready)
        while True:
            message = follower.receive()
            if isinstance(message, Stop):
                return 0
            assert isinstance(message, StepPlan), message
            worker.execute(message)
    except Closed:
        return 1
    except Exception as error:
        user = isinstance(error, ValueError)
        cause = str(error) if user else f"{type(error).__name__}: {error}"
        if not isinstance(error, CollectiveError):  # then another rank is the cause, and tells
            _tell(follower, Failure(rank=comm.rank, cause=cause, details="" if user else traceback.format_exc(), user_error=user))
        return 2 if user else 1


def _tell(follower: Follower, failure: Failure) -> None:
    try:
        follower.send(failure)
    except Closed:
        print(f"rank {failure.rank}: {failure.cause}", file=sys.stderr)


def _follow_in_thread(config: EngineConfig, model: ModelConfig, comm: Loopback, follower: QueueFollower) -> None:
    if _serve(config, model, comm, follower) != 0:
        comm.close()
    follower.close()


def _listen(comm: Communicator, rendezvous: Rendezvous, fingerprint: str) -> Leader:
    """Opens the control channel on the rendezvous's address and tells the others, over the communicator, where it is."""
    token = rendezvous.token or local.new_token()
    try:
        leader = SocketLeader(rendezvous.address, rendezvous.size, token, fingerprint)
    except OSError as error:
        raise ValueError(
            f"rank 0 cannot listen on {rendezvous.address} ({error.strerror}); set MASTER_ADDR to an address of its host"
        ) from None
    text = f"{leader.port}:{'' if rendezvous.token else token}".encode()
    comm.broadcast(torch.tensor(list(text.ljust(_ENDPOINT_BYTES)), dtype=torch.uint8, device=comm.device))
    leader.accept(rendezvous.timeout)
    return leader


def _connect(comm: Communicator, rendezvous: Rendezvous, fingerprint: str) -> Follower:
    told = comm.broadcast(torch.zeros(_ENDPOINT_BYTES, dtype=torch.uint8, device=comm.device))
    port, _, token = bytes(told.tolist()).decode().strip().partition(":")
    hello = Hello(
        rank=rendezvous.rank, host=socket.gethostname(), pid=os.getpid(), token=rendezvous.token or token, fingerprint=fingerprint
    )
    return SocketFollower(rendezvous.address, int(port), hello, rendezvous.timeout)

"""Ranks as Ray actors in a placement group, on a cluster that runs or one of this run's own. This process becomes rank 0.

The actor of rank 0 only holds the resources of this process, on this process's node. Every other actor keeps one child
process, which gets the same command and variables as a child of `launch.local`; see `Keeper`.
"""

import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collectives.errors import CollectiveError
from collectives.rendezvous import Rendezvous
from launch.detect import TOKEN
from launch.local import how_it_ended, new_token
from launch.ray_connect import Node, amounts, join, line
from launch.ray_keeper import Keeper, handed_on, visible_devices
from launch.watch import RankDied

_VISIBLE = {"GPU": "CUDA_VISIBLE_DEVICES", "NPU": "ASCEND_RT_VISIBLE_DEVICES"}
_PIN = 0.001  # of the resource "node:IP", of which every node has 1
_ANSWER = 5.0
_ROOM = 20.0
_SLICE = 0.5
_NEWS = 10.0


class RayRanks:
    """The ranks above 0: a `Started`. A thread of its own hears from their actors, and passes what the ranks print on to
    stderr."""

    def __init__(self, ray: Any, keepers: Sequence[Any], who: Sequence[tuple[str, int]], closing: ExitStack) -> None:
        self._ray, self._keepers, self._who = ray, keepers, who
        self._ended: dict[int, str] = {}
        self._changed = threading.Condition()
        self._listener = threading.Thread(target=self._listen, daemon=True, name="ray-ranks")
        self._listener.start()
        closing.callback(self._kill_all)
        self._close = weakref.finalize(self, closing.close)  # at exit finalizers run newest first: a user of this one's before it

    def check(self) -> None:
        """Raises RankDied naming the first rank that has ended."""
        for rank in range(1, len(self._keepers) + 1):
            death = self.death(rank)
            if death is not None:
                raise death

    def death(self, rank: int, patience: float = 0.0) -> RankDied | None:
        """How `rank` ended, waiting up to `patience` seconds for it to; None if it has not. The pid is that of its process, not
        of its actor."""
        with self._changed:
            if not self._changed.wait_for(lambda: rank in self._ended, patience):
                return None
            return RankDied(rank, *self._who[rank - 1], self._ended[rank])

    def kill(self, rank: int) -> None:
        """Ends `rank` at once, even one that is stopped."""
        keeper = self._keepers[rank - 1]
        try:
            self._ray.get(keeper.kill.remote(), timeout=_ANSWER)
        except self._ray.exceptions.RayError:
            self._ray.kill(keeper)

    def stop(self, grace: float) -> None:
        """Leaves the ranks `grace` seconds, in all, to end by themselves, then kills the rest, gives all resources back, and
        ends the connection, and the cluster, that `start` made. Nothing is left afterwards, not even when this is
        interrupted."""
        try:
            self._wait(grace)
        finally:
            self._close()

    def _wait(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: len(self._ended) == len(self._keepers), seconds)

    def _kill_all(self) -> None:
        if self._ray.is_initialized():
            for rank, keeper in enumerate(self._keepers, 1):
                if rank not in self._ended:
                    keeper.kill.remote()
        self._wait(_ANSWER)
        self._listener.join(_ANSWER)

    def _listen(self) -> None:
        ray = self._ray
        waiting = {keeper.news.remote(_NEWS): rank for rank, keeper in enumerate(self._keepers, 1)}
        while waiting and ray.is_initialized():
            ready, _ = ray.wait(list(waiting), timeout=_SLICE)
            for call in ready:
                rank = waiting.pop(call)
                try:
                    news = ray.get(call)
                except ray.exceptions.RayError as error:
                    self._end(rank, f"its Ray actor is gone ({line(error)})")
                    continue
                print(news["output"], end="", file=sys.stderr, flush=True)
                if news["code"] is None:
                    waiting[self._keepers[rank - 1].news.remote(_NEWS)] = rank
                else:
                    self._end(rank, f"ended with {how_it_ended(news['code'])}")
        for rank in waiting.values():
            self._end(rank, "Ray was shut down")

    def _end(self, rank: int, cause: str) -> None:
        with self._changed:
            self._ended[rank] = cause
            self._changed.notify_all()


def start(
    size: int, argv: Sequence[str], timeout: float, *, address: str | None, resources: Mapping[str, float]
) -> tuple[Rendezvous, RayRanks]:
    """Starts ranks 1 to `size` - 1 with the command `argv` and torchrun's environment variables, and returns rank 0's
    Rendezvous, whose port is the system's choice and is held open from the start.

    address: HOST:PORT of a running cluster, one of whose nodes this process is on, or "auto", as Ray means it; None: a cluster
    of this host for this run, or the one that this process has connected to by ray.init. resources: of each rank, by Ray's names
    ("CPU", "GPU", "NPU"); of accelerators one or none. The ranks of a node are numbered in a row, those of this process's node
    first. A rank's LOCAL_RANK is the index of its device among those that the ranks of its node see.

    Raises ValueError for the user's mistakes, among them more ranks than the cluster has room for within 20 s; CollectiveError
    when actors do not come to life within `timeout` seconds. Nothing is left then.

    Must be called in a thread that outlives the run: a cluster that Ray starts ends with the thread that started it.
    """
    for name in _VISIBLE:
        if resources.get(name, 0) not in (0, 1):
            raise ValueError(f"{name} {resources[name]:g} for a rank: a rank works on one whole device; ask for {name} 1")
    try:
        import ray
        import ray.util
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ValueError(f"launcher 'ray' needs Ray ({error}); pip install 'qtp[ray]', or choose --launcher local") from None
    with ExitStack() as cleanup:
        node = join(ray, cleanup, size, address, resources)
        group, order = _reserve(ray, cleanup, node, size, resources, timeout)
        with _as_collective_error(ray, timeout):
            keepers = [_keeper(ray, group, bundle, resources) for bundle in order.bundles]
            cleanup.callback(_release, ray, keepers)
            places = ray.get([keeper.place.remote() for keeper in keepers], timeout=timeout)
            devices = _devices(places, order, resources)
            listener, port = _listen_on(node.address, size)
            cleanup.callback(listener.close)
            common = {
                **handed_on(),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": node.address,
                "MASTER_PORT": str(port),
                TOKEN: (token := new_token()),
                "TORCHELASTIC_USE_AGENT_STORE": "",
                "TORCHELASTIC_RESTART_COUNT": "",
            }
            folder = str(Path.cwd())
            calls = []
            for rank in range(1, size):
                local = {"RANK": rank, "LOCAL_RANK": order.local_ranks[rank], "LOCAL_WORLD_SIZE": order.local_sizes[rank]}
                variables = {**common, **{name: str(number) for name, number in local.items()}, **devices[rank]}
                calls.append(keepers[rank].start.remote(list(argv), variables, folder))
            started = ray.get(calls, timeout=timeout)
        for rank, told in enumerate(started, 1):
            if "error" in told:
                raise ValueError(
                    f"rank {rank} cannot be started on host {places[rank]['host']} ({told['error']}); "
                    "every node of the Ray cluster needs the same Python environment at the same path"
                )
        who = [(place["host"], told["pid"]) for place, told in zip(places[1:], started, strict=True)]
        rendezvous = Rendezvous(
            size=size,
            local_size=order.local_sizes[0],
            address=node.address,
            port=port,
            listener=listener.detach(),
            token=token,
            timeout=timeout,
        )
        return rendezvous, RayRanks(ray, keepers[1:], who, cleanup.pop_all())


@dataclass(frozen=True, slots=True)
class _Order:
    """By rank: its bundle in the placement group, its node's id, and its number among the ranks of its node."""

    bundles: Sequence[int]
    nodes: Sequence[str]

    @property
    def local_ranks(self) -> list[int]:
        return [self.nodes[:rank].count(node) for rank, node in enumerate(self.nodes)]

    @property
    def local_sizes(self) -> list[int]:
        return [self.nodes.count(node) for node in self.nodes]


def _reserve(
    ray: Any, cleanup: ExitStack, node: Node, size: int, resources: Mapping[str, float], timeout: float
) -> tuple[Any, _Order]:
    bundles = [{**resources, node.name: _PIN}, *(dict(resources) for _ in range(1, size))]
    total = ray.cluster_resources()
    fits = all(total.get(name, 0) >= size * amount for name, amount in resources.items())
    deadline = time.monotonic() + (min(_ROOM, timeout) if fits or not node.own else 0.0)
    group = ray.util.placement_group(bundles, strategy="PACK")
    cleanup.callback(_give_back, ray, group)
    while not group.wait(_SLICE):
        if time.monotonic() >= deadline:
            raise ValueError(
                f"{size} ranks with {amounts(resources, resources)} each do not fit into the Ray cluster, which has "
                f"{amounts(total, resources)}, of these free {amounts(ray.available_resources(), resources)}; "
                "start fewer ranks, ask for less, or add nodes"
            )
    at = ray.util.placement_group_table(group)["bundles_to_node_id"]
    first = {home: min(bundle for bundle in at if at[bundle] == home) for home in at.values()}
    order = sorted(at, key=lambda bundle: (first[at[bundle]], bundle))
    return group, _Order(order, [at[bundle] for bundle in order])


def _keeper(ray: Any, group: Any, bundle: int, resources: Mapping[str, float]) -> Any:
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, bundle)
    options = {
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": resources.get("GPU", 0),
        "resources": others,
        "max_concurrency": 4,
        "scheduling_strategy": strategy,
    }
    return ray.remote(Keeper).options(**options).remote()


def _devices(places: Sequence[dict[str, Any]], order: _Order, resources: Mapping[str, float]) -> list[dict[str, str]]:
    """By rank, the variable that shows it the devices of all ranks of its node, in the order of LOCAL_RANK: what Ray gave the
    node's actors. Rank 0, which runs already, uses the first device it sees, so that one must be its own."""
    told: list[dict[str, str]] = [{} for _ in places]
    for name, variable in _VISIBLE.items():
        if not resources.get(name):
            continue
        given: dict[str, list[str]] = {}
        for node, place in zip(order.nodes, places, strict=True):
            given.setdefault(node, []).extend(place["devices"][name])
        mine, seen = given[order.nodes[0]], visible_devices(variable)
        used = "0" if seen is None else next(iter(seen), "none")
        if used not in mine:
            raise ValueError(
                f"Ray gave the ranks of this node {name} {', '.join(mine)}, and rank 0, this process, would use {used}; "
                f"set {variable}={','.join(mine)} for this command"
            )
        mine.sort(key=lambda device: device != used)
        for rank, node in enumerate(order.nodes):
            told[rank][variable] = ",".join(given[node])
    return told


def _listen_on(address: str, size: int) -> tuple[socket.socket, int]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listener = socket.create_server((address, 0), family=family, backlog=max(size, 16))
    except OSError as error:
        raise ValueError(
            f"rank 0 cannot listen on {address} ({error.strerror}), the address of its Ray node; start the node with "
            "--node-ip-address and an address of its host"
        ) from None
    return listener, listener.getsockname()[1]


def _release(ray: Any, keepers: Sequence[Any]) -> None:
    if ray.is_initialized():
        for keeper in keepers:
            ray.kill(keeper)


def _give_back(ray: Any, group: Any) -> None:
    if ray.is_initialized():
        ray.util.remove_placement_group(group)


@contextmanager
def _as_collective_error(ray: Any, timeout: float) -> Iterator[None]:
    try:
        yield
    except ray.exceptions.GetTimeoutError:
        raise CollectiveError(f"Ray's actors did not come to life within {timeout:g} s") from None
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise CollectiveError(f"Ray: {line(error)}") from None

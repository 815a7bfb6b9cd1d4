"""This process's way into a Ray cluster, and back out of it."""

import atexit
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from typing import Any

from launch import ray_sweep
from launch.local import ADDRESS

_ANSWER = 5.0
_STORE_BYTES = 80 << 20  # Ray's least is 75 MiB; nothing large goes through it
_LONGEST_FOLDER = 45  # bytes: Ray puts a socket into it, whose path may have 107


@dataclass(frozen=True, slots=True)
class Node:
    """This process's node: what it is called among Ray's resources, and where rank 0 listens. own: the cluster is this run's
    alone."""

    name: str
    address: str
    own: bool


def join(ray: Any, cleanup: ExitStack, size: int, address: str | None, resources: Mapping[str, float]) -> Node:
    """Connects as `ray_cluster.start` says; `cleanup` undoes it. ValueError where rank 0's own node is not enough for it."""
    own = address is None and not ray.is_initialized()
    if own:
        _begin_cluster(ray, cleanup, num_cpus=max(ceil(size * resources.get("CPU", 0)), 1))
    elif not ray.is_initialized():
        assert address is not None
        _connect(ray, cleanup, address)
    elif address not in (None, "auto", at := ray.get_runtime_context().gcs_address):
        raise ValueError(f"ray_address {address!r}: this process is already connected to the Ray cluster at {at}; leave it out")
    here = ray.get_runtime_context().get_node_id()
    found = next(node for node in ray.nodes() if node["NodeID"] == here)
    ip, totals = found["NodeManagerAddress"], found["Resources"]
    lacking = [name for name, amount in resources.items() if totals.get(name, 0) < amount]
    if lacking:
        raise ValueError(
            f"rank 0 is this process and needs {amounts(resources, lacking)}, and its node ({ip}) has "
            f"{amounts(totals, lacking)}; run this command on a node that has as much, or ask for less"
        )
    return Node(f"node:{ip}", ADDRESS if own else ip, own)


def _begin_cluster(ray: Any, cleanup: ExitStack, num_cpus: int) -> None:
    """Ray's usual port, dashboard and folder are left to others. Ray lets in whoever knows the token in ~/.ray, which it makes
    if there is none; it sends no usage statistics from a cluster that was started like this."""
    place = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="qtp-ray-", dir=place if len(place) + 17 <= _LONGEST_FOLDER else "/tmp")
    sweeper = subprocess.Popen(
        [sys.executable, "-I", ray_sweep.__file__, folder],  # for when this process cannot
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def sweep() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        sweeper.kill()
        sweeper.communicate()

    cleanup.callback(sweep)
    _init(
        ray,
        cleanup,
        address="local",
        num_cpus=num_cpus,
        object_store_memory=_STORE_BYTES,
        include_dashboard=False,
        _temp_dir=folder,
    )


def _connect(ray: Any, cleanup: ExitStack, address: str) -> None:
    way_out = "start one with `ray start --head`, or leave --ray-address out for one of this run's own"
    if "://" in address:
        raise ValueError(f"ray_address {address!r}: rank 0 must be on a node of the cluster; run there, with HOST:PORT (6379)")
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"ray_address {address!r} must be HOST:PORT of a Ray cluster's head, or auto")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
        except OSError as error:
            raise ValueError(f"no Ray cluster answers at {address} ({error.strerror or error}); {way_out}") from None
    try:
        _init(ray, cleanup, address=address)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if "AuthenticationError" in "".join(traceback.format_exception(error)):
            way_out = "set RAY_AUTH_MODE=token, and have its token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        raise ValueError(
            f"cannot connect to the Ray cluster at {address} as one of its nodes ({line(error)}); {way_out}"
        ) from None


def _init(ray: Any, cleanup: ExitStack, **options: Any) -> None:
    """ray.init, undone with `cleanup`, or at the interpreter's end where that comes first, but not before finalizers that are
    newer than this. Ray's handler of SIGTERM is not kept."""
    cleanup.callback(_shut_down, ray)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    atexit.unregister(ray.shutdown)


def _shut_down(ray: Any) -> None:
    ray.shutdown()
    atexit.register(ray.shutdown)


def amounts(have: Mapping[str, float], names: Iterable[str]) -> str:
    """Such as 'CPU 2, GPU 0.5'."""
    return ", ".join(f"{name} {have.get(name, 0):g}" for name in names)


def line(error: BaseException) -> str:
    """The first line of what an error says that says anything."""
    return next((said for text in str(error).splitlines() if (said := text.strip())), type(error).__name__)

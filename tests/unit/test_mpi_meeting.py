"""How mpirun's ranks find each other: what rank 0 and the others do, over a stand-in for MPI's messages, and over mpiexec."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collectives.rendezvous import Rendezvous
from launch import mpi

ROOT = Path(__file__).parents[2]
MPIEXEC = Path(sys.executable).parent / "mpiexec"
SIZE = 3


class Talk:
    """Broadcast and gather among threads."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.told: Any = None
        self.rows: list[bytes] = [b""] * size

    def of(self, rank: int) -> Any:
        return _TalkOf(self, rank)


class _TalkOf:
    def __init__(self, all_of_them: Talk, rank: int) -> None:
        self.all, self.rank = all_of_them, rank

    def broadcast(self, told: Any = None) -> Any:
        if self.rank == 0:
            self.all.told = json.dumps(told)
        self.all.barrier.wait()
        heard = json.loads(self.all.told)
        self.all.barrier.wait()
        return heard

    def gather(self, mine: bytes) -> list[bytes]:
        self.all.rows[self.rank] = mine
        self.all.barrier.wait()
        rows = list(self.all.rows)
        self.all.barrier.wait()
        return rows


def together(address: str | None) -> list[Any]:
    """What each rank finds, or its ValueError."""
    talk = Talk(SIZE)
    found: list[Any] = ["hangs"] * SIZE

    def run(rank: int) -> None:
        try:
            found[rank] = mpi._serve(talk.of(0), SIZE, address) if rank == 0 else mpi._look(talk.of(rank), address is not None)
        except ValueError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True, name=f"rank {rank}") for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def listens_and_nobody_waits(found: list[Any], address: str) -> None:
    """All ranks found the same, rank 0 has the listener of it, and the next who calls is the first one served."""
    assert {(place.address, place.port, place.token) for place in found} == {(address, found[0].port, found[0].token)}
    assert [place.listener is None for place in found] == [False, True, True]
    with socket.socket(fileno=found[0].listener) as listener:
        assert listener.getsockname() == (address, found[0].port)
        with socket.create_connection((address, found[0].port), 5) as call:
            accepted, caller = listener.accept()
            accepted.close()
            assert caller == call.getsockname()


def test_at_an_address_that_is_sure_nobody_tries() -> None:
    listens_and_nobody_waits(together("127.0.0.1"), "127.0.0.1")


def test_tokens_are_fresh() -> None:
    first, second = together("127.0.0.1")[0], together("127.0.0.1")[0]
    for place in (first, second):
        socket.close(place.listener)
    assert len(first.token) == 32
    assert first.token != second.token


def test_the_first_address_that_all_reach_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "_candidates", lambda: ["198.51.100.9", "127.0.0.2", "127.0.0.3", "127.0.0.4"])
    call = mpi._call
    monkeypatch.setattr(mpi, "_call", blind(call, "127.0.0.2"))
    listens_and_nobody_waits(together(None), "127.0.0.3")


def blind(call: Callable[..., Any], address: str) -> Callable[..., Any]:
    """`call`, which one of the ranks cannot make to `address`."""
    lock, made = threading.Lock(), []

    def attempt(place: tuple[str, int], nonce: bytes) -> Any:
        with lock:
            first = place[0] == address and not made
            if first:
                made.append(place)
        return None if first else call(place, nonce)

    return attempt


def test_another_host_with_the_same_address_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, something else listens, as behind the bridges of containers."""
    monkeypatch.setattr(mpi, "_PATIENCE", 0.3)
    monkeypatch.setattr(mpi, "_candidates", lambda: ["127.0.0.2", "127.0.0.3"])
    call = mpi._call
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        elsewhere = stranger.getsockname()
        monkeypatch.setattr(mpi, "_call", lambda place, nonce: call(elsewhere if place[0] == "127.0.0.2" else place, nonce))
        listens_and_nobody_waits(together(None), "127.0.0.3")


def test_callers_without_the_nonce_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "_PATIENCE", 0.3)
    monkeypatch.setattr(mpi, "_candidates", lambda: ["127.0.0.2", "127.0.0.3"])
    call = mpi._call
    monkeypatch.setattr(mpi, "_call", lambda place, nonce: call(place, b"x" * 16 if place[0] == "127.0.0.2" else nonce))
    listens_and_nobody_waits(together(None), "127.0.0.3")


def test_where_none_is_reached_every_rank_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "_candidates", lambda: ["127.0.0.2", "127.0.0.3"])
    monkeypatch.setattr(mpi, "_call", lambda place, nonce: None)
    for error in together(None):
        assert isinstance(error, ValueError)
        assert str(error).startswith(
            "the ranks reach none of 127.0.0.2, 127.0.0.3; set MASTER_ADDR to an address of rank 0's host"
        )


def test_an_address_of_another_host_is_refused_on_every_rank() -> None:
    first, *others = together("198.51.100.9")
    assert str(first) == "rank 0 cannot listen on '198.51.100.9'; set MASTER_ADDR to an address of its host"
    assert all(isinstance(error, ValueError) and "MASTER_ADDR" in str(error) for error in others)


def test_candidates_are_addresses_of_this_host_that_others_may_reach() -> None:
    for address in mpi._candidates():
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
        assert not address.startswith(("127.", "169.254.", "fe80"))
        assert address != "::1"


@pytest.mark.parametrize("rendezvous", [Rendezvous(), Rendezvous(size=2, address="n1", port=77)])
def test_ranks_that_know_where_to_meet_load_nothing(rendezvous: Rendezvous) -> None:
    told = f"{rendezvous.size}, {rendezvous.address!r}, {rendezvous.port}"
    code = (
        "import sys; from launch import mpi; from collectives.rendezvous import Rendezvous\n"
        f"r = Rendezvous(**dict(zip(('size', 'address', 'port'), ({told}))))\n"
        "assert mpi.meet(r) is r\nmpi.part()\n"
        "print({'mpi4py', 'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


def test_over_mpiexec(tmp_path: Path) -> None:
    """Every rank finds the same place, twice; MPI is over after `part`, so rank 0 outlives the others."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys, time\nfrom pathlib import Path\n"
        "from launch.detect import detect\nfrom launch import mpi\n"
        "r = mpi.meet(detect())\nassert mpi.meet(detect()) == r\n"
        "mpi.part()\nmpi.part()\n"
        "told = [r.rank, r.size, r.local_size, r.address, r.port, r.listener is None, r.token]\n"
        "if r.rank == 0:\n    time.sleep(2)\n"
        "Path(sys.argv[1], str(r.rank)).write_text(json.dumps(told))\n"
        "sys.exit(5 if r.rank == 0 else 0)\n"
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "RANK", "WORLD_SIZE", "QTP_TOKEN"))}
    done = subprocess.run(
        [MPIEXEC, "-n", "3", sys.executable, script, tmp_path],
        env={**environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stderr) == (5, "")
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    port, token = told[0][4], told[0][6]
    assert port > 0
    assert len(token) == 32
    assert told == [[rank, 3, 3, "127.0.0.1", port, rank > 0, token] for rank in range(3)]

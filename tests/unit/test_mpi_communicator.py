"""The communicator 'mpi' among processes that mpiexec starts, beyond what the conformance suite asks of it, and what becomes of
the ways in which they end."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mpi_ranks.py")
MPIEXEC = Path(sys.executable).parent / "mpiexec"


def mpiexec(size: int, what: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [MPIEXEC, "-n", str(size), sys.executable, SCRIPT, what, folder]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL)


def run(size: int, what: str, folder: Path) -> list[dict[str, str]]:
    """What each rank reports."""
    done = mpiexec(size, what, folder)
    assert (done.returncode, done.stderr) == (0, ""), done
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_get_the_same_bits(size: int, tmp_path: Path) -> None:
    assert run(size, "same_bits", tmp_path) == [{"bad": ""}] * size


def test_refusals_are_one_line_on_every_rank(tmp_path: Path) -> None:
    for rank, told in enumerate(run(2, "refused", tmp_path)):
        assert not any("\n" in text for text in told.values())
        assert told["device"].startswith("ValueError: communicator 'mpi' works on host memory, not on device meta")
        assert told["rank"].startswith(f"ValueError: communicator 'mpi': MPI says rank {rank} of 2, the launcher rank 0 of 3; ")
        assert told["rank"].endswith(", or choose gloo")
        for op, name in (
            ("long sum", "all_reduce"),
            ("long scatter", "reduce_scatter"),
            ("long broadcast", "broadcast"),
            ("long exchange", "all_to_all"),
        ):
            assert told[op].startswith(f"ValueError: {name}: ")
            assert "carries 2147483647" in told[op]
        assert told["bool"] == "ValueError: communicator 'mpi' does not add tensors of bool"
        assert told["complex"] == "ValueError: communicator 'mpi' does not add tensors of complex64"
        assert told["still works"] == "[4.0, 4.0]"
        assert told["bool gathered"] == "[True, True, True, False]"
        assert told["aborted"] == "CollectiveError: mpi: the communicator has failed or was aborted"
        assert told["closed"] == "CollectiveError: mpi: the communicator is closed"


def alone(what: str, folder: Path) -> dict[str, str]:
    done = subprocess.run([sys.executable, SCRIPT, what, folder], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, ""), done
    told: dict[str, str] = json.loads((folder / "0.json").read_text(encoding="utf-8"))
    return told


def test_without_mpi4py_one_line_names_the_way_out(tmp_path: Path) -> None:
    told = alone("no_mpi", tmp_path)["told"]
    assert told.startswith("ValueError: communicator 'mpi': MPI cannot be used (")
    assert told.endswith("pip install 'qtp[mpi]' and an MPI library, or choose gloo")
    assert "\n" not in told


def test_ranks_that_mpirun_did_not_start(tmp_path: Path) -> None:
    told = alone("lone", tmp_path)
    assert told["one"] == "[2.5, 2.5]"
    assert "start the ranks with the mpirun, or srun --mpi, of the MPI library that mpi4py uses" in told["two"]
    assert "MPI says rank 0 of 1, the launcher rank 1 of 2" in told["two"]


def test_ranks_that_are_done_wait_asleep_for_rank_0(tmp_path: Path) -> None:
    """Had they just exited, mpiexec would have killed rank 0 and called it a success."""
    results = run(3, "late", tmp_path)
    assert [result["done"] for result in results] == ["yes"] * 3
    began = time.monotonic()
    done = mpiexec(2, "late", tmp_path)
    assert done.returncode == 0
    assert time.monotonic() - began > 4.0


def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    began = time.monotonic()
    done = mpiexec(2, "raises", tmp_path)
    assert done.returncode == 1
    assert "rank 1 is broken" in done.stderr
    assert time.monotonic() - began < 60
    assert list(tmp_path.iterdir()) == []


def test_rank_0_does_not_wait_long_for_one_that_does_not_come_to_its_end(tmp_path: Path) -> None:
    began = time.monotonic()
    assert mpiexec(2, "busy", tmp_path).returncode == 0
    assert time.monotonic() - began < 50
    assert json.loads((tmp_path / "0.json").read_text(encoding="utf-8")) == {"done": "yes"}


def test_a_program_may_use_mpi_itself(tmp_path: Path) -> None:
    for told in run(2, "theirs", tmp_path):
        assert told == {"ours": "[3.0, 3.0, 3.0]", "own": "[30.0, 30.0, 30.0]"}

"""The suite, and that of sums along a tree, on every backend whose ranks are processes: gloo, shm, hierarchical with several
pretended hosts, cuda_ipc, and mpi where the machine has it. 4 processes a backend run all cases and all failures, and report.

cuda_ipc runs on cards with --device cuda, which ranks may share, and else in Triton's interpreter. That a peer was killed is for
the launcher to tell it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from communicator_cases import PROCESS_SIZES
from device_helper import CHOSEN
from ranks import cases_of

PROCESSES = 4
SCRIPT = Path(__file__).with_name("ranks.py")
MPIEXEC = Path(sys.executable).with_name("mpiexec")
FAILURES = ("silent", "aborted", "gone")

# name -> (the numbers of ranks to try for each wrapper, the failures)
BACKENDS: dict[str, tuple[dict[str, tuple[int, ...]], tuple[str, ...]]] = {
    "gloo": (PROCESS_SIZES | {"staged": (2, 3)}, FAILURES),
    "shm": (PROCESS_SIZES, FAILURES),
    "hierarchical": ({"plain": (1, 2), "checked": (2,)}, FAILURES),
    "hierarchical/0011": ({"plain": (3, 4), "checked": (3,), "tree": (3, 4)}, FAILURES),
    "hierarchical/0102": ({"plain": (3, 4), "tree": (4,)}, FAILURES),
    "hierarchical/0112": ({"plain": (4,)}, FAILURES),
    "hierarchical/0123": ({"plain": (2,)}, ()),
    "cuda_ipc": ({"plain": (1,), "ipc": (2, 3), "checked": (2,)}, ("silent", "aborted")),
}
MPI: dict[str, tuple[dict[str, tuple[int, ...]], tuple[str, ...]]] = {
    "mpi": (PROCESS_SIZES, ()),
    "hierarchical+mpi/0011": ({"plain": (4,)}, ()),
    "hierarchical+mpi/0102": ({"plain": (3,)}, ()),
}
if MPIEXEC.exists() and find_spec("mpi4py") is not None:
    BACKENDS |= MPI

Report = list[dict[str, str]]


@pytest.fixture(scope="module")
def report_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """What each of 4 processes reports of a backend, with the time of the last one's end in "ended"; run when first asked for."""
    reports: dict[str, Report] = {}
    failures: dict[str, BaseException] = {}

    def get(backend: str) -> Report:
        if backend in failures:
            pytest.fail(f"an earlier test of {backend} shows why its ranks failed")
        if backend not in reports:
            try:
                reports[backend] = run(backend, tmp_path_factory.mktemp("ranks"))
            except BaseException as error:
                failures[backend] = error
                raise
        return reports[backend]

    return get


def run(backend: str, folder: Path) -> Report:
    sizes, scenes = BACKENDS[backend]
    spec = {"backend": backend, "sizes": sizes, "scenes": scenes, "count": PROCESSES, "folder": str(folder)}
    spec["device"] = CHOSEN.name
    command = [sys.executable, str(SCRIPT)]
    if "mpi" in backend:
        spec |= {"ports": [], "descriptors": []}
        command = [str(MPIEXEC), "-n", str(PROCESSES), *command]
        listeners: list[socket.socket] = []
    else:
        count = len({n for tried in sizes.values() for n in tried}) + len(scenes)
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        spec |= {"ports": [s.getsockname()[1] for s in listeners], "descriptors": [s.fileno() for s in listeners]}
    process = subprocess.Popen(
        [*command, json.dumps(spec)],
        pass_fds=[s.fileno() for s in listeners],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for listener in listeners:
        listener.close()
    try:
        said, errors = process.communicate(timeout=200)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    codes = [process.returncode] * PROCESSES if "mpi" in backend else json.loads(said or "[]")
    expected = [0] * PROCESSES
    if "gone" in scenes:
        expected[-1] = -9
    report = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(PROCESSES)]
    failed = [text for results in report for text in results.values() if text.startswith("Traceback")]
    assert not failed or all("/" in name for results in report for name in results), failed
    assert failed or codes == expected, errors
    if "gone" in scenes and not failed:
        report[-1]["ended"] = (folder / "0.time").read_text(encoding="utf-8")
    return report


@pytest.mark.parametrize(
    ("backend", "wrapper", "size", "case"),
    [
        (b, w, n, case)
        for b, (sizes, _) in BACKENDS.items()
        for w, tried in sizes.items()
        for n in tried
        for case in cases_of(w, CHOSEN.name)
    ],
)
def test_backend(backend: str, wrapper: str, size: int, case: str, report_of: Callable[[str], Report]) -> None:
    told = [results.get(f"{size}/{wrapper}/{case}", "not run: an earlier case failed") for results in report_of(backend)[:size]]
    assert told == ["ok"] * size, "\n".join(told)


def with_failure(scene: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", [name for name, (_, scenes) in BACKENDS.items() if scene in scenes])


@with_failure("silent")
def test_a_silent_peer_ends_in_a_timeout(backend: str, report_of: Callable[[str], Report]) -> None:
    for results in report_of(backend)[:-1]:
        assert results["silent"].startswith("ok "), results["silent"]
        assert 2.0 < float(results["silent took"]) < 10.0
        if backend == "shm":
            assert "shm: ranks [3] did not come within 4 s" in results["silent"]
        if backend == "cuda_ipc":
            assert results["silent"].endswith("cuda_ipc: rank 3 did not come within 4 s")


@with_failure("aborted")
def test_an_abort_ends_the_wait_within_a_second(backend: str, report_of: Callable[[str], Report]) -> None:
    for results in report_of(backend)[:-1]:
        assert results["aborted"].startswith("ok "), results["aborted"]
        assert "abort" in results["aborted"] or "closed" in results["aborted"] or "eset" in results["aborted"]
        assert 0.2 < float(results["aborted took"]) < 2.0
        assert float(results["closing aborted took"]) < 1.0


@with_failure("gone")
def test_a_killed_peer_ends_the_wait(backend: str, report_of: Callable[[str], Report]) -> None:
    report = report_of(backend)
    for results in report[:-1]:
        told, seconds, text = results["gone"].split(" ", 2)
        assert told == "ok", results["gone"]
        assert float(seconds) - float(report[-1]["ended"]) < 2.0, results["gone"]
        if backend == "shm":
            assert float(seconds) - float(report[-1]["ended"]) < 0.5
            assert text.startswith("shm: rank 3 (pid ")
            assert text.endswith(") has ended")


@with_failure("silent")
def test_a_closed_communicator_says_so(backend: str, report_of: Callable[[str], Report]) -> None:
    for results in report_of(backend)[:-1]:
        assert results["closed"].startswith("ok "), results
        assert "closed" in results["closed"] or "abort" in results["closed"] or "failed" in results["closed"]

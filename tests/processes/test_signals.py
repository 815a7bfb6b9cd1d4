"""SIGINT and SIGTERM, once and twice, to a run of two ranks: it ends in order, quickly, with the exit code of that signal, and
nothing of it is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
RUN = ["-m", "qtp.run_pa", "--model", "qtp/demo/dense", "--tp", "2", "--load_tokenizer", "False"]
LONG = ["--input_ids", *["5,6"] * 40, "--max_output_length", "1900", "--ignore_eos"]  # a minute, as one sequence fits at a time
STARTS = {
    "local": [sys.executable, *RUN, *LONG],
    "torchrun": [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", *RUN, *LONG],
}


def heard() -> None:
    """In a child: signals do what they do by default, even if these tests run in the background, where SIGINT is ignored."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)


class Running:
    """A run in a process group of its own, with the signals that a terminal would leave it."""

    def __init__(self, argv: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                argv,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=heard,
            )
        self.pids: set[int] = set()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, holds: Callable[[], bool], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self.text
            assert self.process.poll() is None, self.text
            time.sleep(0.05)
        self.pids = {self.process.pid, *(p.pid for p in psutil.Process(self.process.pid).children(recursive=True))}

    def left(self) -> list[int]:
        return [pid for pid in self.pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]

    def end(self) -> None:
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture
def running(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    run = Running(STARTS[request.param], tmp_path / "log")
    run.until(lambda: "rank 1: read" in run.text)
    time.sleep(0.5)  # in the midst of steps
    yield run
    run.end()


@pytest.mark.parametrize("running", STARTS, indirect=True)
@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_all_ends_all(running: Running, name: str, presses: int) -> None:
    """As Ctrl-C in a terminal and `kill` on a group do."""
    signum, before = signal.Signals[name], time.monotonic()
    for press in range(presses):
        if press:
            time.sleep(0.6)
        try:
            os.killpg(running.process.pid, signum)
        except ProcessLookupError:
            assert press == 1  # it was over by then
    code = running.process.wait(30)
    assert time.monotonic() - before < 20.0, running.text  # torchrun itself kills after 30
    local = "torchrun" not in str(running.process.args)
    assert code == 128 + signum if local else code != 0, running.text
    deadline = time.monotonic() + 3.0
    while running.left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running.left() == []
    if local:
        assert "Traceback" not in running.text
        assert running.text.rstrip().splitlines()[-1] == f"ended by {name}"
    assert "qtp/" not in running.text, "no traceback through qtp"


@pytest.mark.parametrize("running", ["local"], indirect=True)
def test_sigterm_to_rank_0_alone_ends_all(running: Running) -> None:
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(15) == 143, running.text
    assert running.left() == []


@pytest.mark.parametrize("running", ["local"], indirect=True)
def test_sigterm_to_another_rank_alone_is_told_as_its_death(running: Running) -> None:
    (child,) = [pid for pid in running.pids if pid != running.process.pid]
    os.kill(child, signal.SIGTERM)
    assert running.process.wait(15) == 1, running.text
    assert running.left() == []
    last = running.text.rstrip().splitlines()[-1]
    assert last.startswith("error: rank 1 (host ")
    assert last.endswith(f", pid {child}): ended by SIGTERM")


def test_a_main_thread_that_never_comes_back_does_not_hold_the_process() -> None:
    """SIGINT while the main thread is in a call that ignores it: ended after a few seconds, and at once when pressed again."""
    code = (
        "import ctypes; from launch.signals import interrupting\n"
        "libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "with interrupting():\n"
        "    print('in', flush=True)\n"
        "    libc.pthread_mutex_lock(mutex), libc.pthread_mutex_lock(mutex)\n"
    )
    for presses, limit in ((1, 5.0), (2, 2.0)):
        child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, preexec_fn=heard)
        assert child.stdout is not None
        assert child.stdout.readline() == b"in\n"
        time.sleep(0.2)
        before = time.monotonic()
        child.send_signal(signal.SIGINT)
        if presses == 2:
            time.sleep(0.7)
            child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
        assert time.monotonic() - before < limit
        child.stdout.close()

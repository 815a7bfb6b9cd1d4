"""What happens to all ranks when one of them dies, fails or hangs: a short cut of scripts/kill_matrix.py, which runs every cell,
and the sides of it that the matrix does not see."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from batching_helper import checkpoint

from launch.watch import RankDied
from qtp import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from kill_matrix import BY_LAUNCHER, Cell, cells, run_cell

SHORT = [
    Cell("kill", 1, "decode", "shm", "local"),
    Cell("kill", 0, "prefill", "shm", "torchrun"),
    Cell("kill", 1, "loading", "gloo", "torchrun"),
    Cell("kill", 0, "idle", "gloo", "local"),
    Cell("raise", 1, "loading", "shm", "local"),
    Cell("raise", 0, "decode", "gloo", "torchrun"),
    Cell("raise", 1, "idle", "shm", "torchrun"),
    Cell("stop", 1, "decode", "shm", "local"),
    Cell("stop", 0, "prefill", "gloo", "local"),
    Cell("stop", 1, "idle", "shm", "local"),
    Cell("kill", 1, "decode", "mpi", "mpirun"),
    Cell("raise", 1, "prefill", "mpi", "mpirun"),
    Cell("stop", 1, "decode", "mpi", "mpirun"),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def test_the_short_cut_is_part_of_the_matrix() -> None:
    assert set(SHORT) <= set(cells())
    assert len(set(cells())) == 3 * 2 * 4 * 5


@pytest.mark.parametrize("cell", SHORT, ids=str)
def test_all_end_and_one_line_says_why(cell: Cell) -> None:
    outcome = run_cell(cell)
    assert outcome.problem in ("", BY_LAUNCHER), outcome.output


def llm(**choices: object) -> LLM:
    return LLM(str(checkpoint("dense")), tp=2, dtype="float32", block_size=8, num_kv_blocks=60, load_tokenizer=False, **choices)


def child_of(model: LLM) -> int:
    (pid,) = [p.pid for p in psutil.Process().children() if p.pid in [c.pid for c in model.ranks._started.children]]  # type: ignore
    return pid


def test_an_idle_llm_outlives_every_timeout() -> None:
    """The collectives' timeout and the stall timeout are both over while nothing is asked."""
    timeout = 10.0
    with llm(communicator="shm", timeout=timeout, stall_timeout=1.0) as one, llm(communicator="gloo", timeout=timeout) as other:
        before = [model.generate([[1, 2, 3]], GREEDY)[0].outputs for model in (one, other)]
        time.sleep(timeout + 1.0)
        assert [model.generate([[1, 2, 3]], GREEDY)[0].outputs for model in (one, other)] == before


def test_a_library_hears_of_a_death_at_once_and_raises_at_the_next_call(caplog: pytest.LogCaptureFixture) -> None:
    """The program that uses the LLM lives on."""
    with llm() as model:
        assert model.generate([[1, 2, 3]], GREEDY)
        pid = child_of(model)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5.0
        while model.ranks.alive and time.monotonic() < deadline:
            time.sleep(0.02)
        line = f"rank 1 (host {socket.gethostname()}, pid {pid}): ended with signal 9"
        assert not model.ranks.alive
        assert f"error: {line}" in caplog.text
        for _ in range(2):
            with pytest.raises(RankDied) as caught:
                model.generate([[1, 2, 3]], GREEDY)
            assert str(caught.value) == line
    assert not psutil.pid_exists(pid)


def test_a_rank_that_hangs_in_a_step_is_killed_and_named() -> None:
    with llm(stall_timeout=1.0) as model:
        assert model.generate([[1, 2, 3]], GREEDY)
        pid = child_of(model)
        os.kill(pid, signal.SIGSTOP)
        before = time.monotonic()
        with pytest.raises(RankDied, match=rf"rank 1 \(host .*, pid {pid}\): hangs: .* for 1 s") as caught:
            model.generate([[1, 2, 3]], GREEDY)
        assert caught.value.hangs
        assert 0.5 < time.monotonic() - before < 6.0
    assert not psutil.pid_exists(pid)


def test_a_run_that_was_itself_stopped_goes_on() -> None:
    """Ctrl-Z and fg: rank 0 and the other rank are stopped for longer than the stall timeout, and nobody accuses anybody."""
    code = (
        "import sys; from qtp import LLM, SamplingParams\n"
        f"with LLM({str(checkpoint('dense'))!r}, tp=2, load_tokenizer=False, num_kv_blocks=60, block_size=8, dtype='float32',"
        " stall_timeout=1.0) as llm:\n"
        "    for turn in range(3):\n"
        "        out = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))\n"
        "        print(len(out[0].outputs[0].token_ids), flush=True); sys.stdin.readline()\n"
    )
    run = psutil.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, cwd=Path(__file__).parents[2], start_new_session=True)
    try:
        assert run.stdout.readline() == b"200\n"
        os.killpg(run.pid, signal.SIGSTOP)
        run.stdin.write(b"\n")
        run.stdin.flush()
        time.sleep(3.0)
        os.killpg(run.pid, signal.SIGCONT)
        assert run.stdout.readline() == b"200\n"
        run.stdin.write(b"\n\n")
        run.stdin.flush()
        assert run.stdout.readline() == b"200\n"
        assert run.wait(30) == 0
    finally:
        if run.is_running():
            for process in [*run.children(recursive=True), run]:
                process.kill()
            run.wait()

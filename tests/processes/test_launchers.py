"""The same tokens under mpirun and srun as by one process, runs at once, and mistakes under each launcher in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
from launchers_helper import BIN, ROOT, clean, expected, flags, free_port, run, srun, tokens

RUN = [sys.executable, "-m", "qtp.run_pa"]
MPIEXEC = str(BIN / "mpiexec")


@pytest.fixture(scope="module")
def theirs() -> list[list[int]]:
    return expected()


def without_mpi4py(folder: Path) -> dict[str, str]:
    """An environment in which mpi4py cannot be imported."""
    (folder / "mpi4py.py").write_text("raise ImportError('not here')\n")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("communicator", ["mpi", "gloo"])
def test_mpirun(communicator: str, theirs: list[list[int]], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run([MPIEXEC, "-n", "3", *RUN, *flags(out), "--communicator", communicator])
    assert done.returncode == 0, done.stderr
    assert tokens(out) == theirs
    assert done.stdout.count("Answer[") == 2, "rank 0 alone prints, and all of it"
    assert f"float32 on cpu, communicator {communicator}," in done.stderr


def test_mpirun_with_an_address_needs_no_mpi4py(theirs: list[list[int]], tmp_path: Path) -> None:
    out, port = tmp_path / "out.jsonl", free_port()
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = run([MPIEXEC, "-n", "2", *RUN, *flags(out), "--communicator", "gloo"], **given, **without_mpi4py(tmp_path))
    assert done.returncode == 0, done.stderr
    assert tokens(out) == theirs


def test_mpirun_with_neither_names_both_ways_out(tmp_path: Path) -> None:
    done = run([MPIEXEC, "-n", "2", *RUN, *flags(tmp_path / "out.jsonl")], **without_mpi4py(tmp_path))
    assert done.returncode == 2
    first = done.stderr.splitlines()[0]
    assert first.startswith("error: ranks started by mpirun find each other by MPI: MPI cannot be used (not here)")
    assert "pip install 'qtp[mpi]'" in first
    assert first.endswith("or set MASTER_ADDR and MASTER_PORT")


def test_a_script_goes_on_after_its_llm_under_mpirun(tmp_path: Path) -> None:
    """Other ranks that are done must not take rank 0 with them, for longer than anything that ends stragglers waits."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nfrom qtp import LLM, SamplingParams\n"
        f"with LLM({str(ROOT / 'qtp/demo/moe')!r}, tp=2, communicator='mpi') as llm:\n"
        "    print(len(llm.generate([[5, 6]], SamplingParams(max_tokens=3))[0].outputs[0].token_ids), 'tokens')\n"
        "time.sleep(6)\nprint('and on')\nsys.exit(7)\n"
    )
    done = run([MPIEXEC, "-n", "2", sys.executable, script], PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (7, "3 tokens\nand on\n"), done.stderr


@pytest.mark.parametrize(("communicator", "flag"), [("mpi", "--model"), ("gloo", "--model"), ("mpi", "--output")])
def test_a_rank_that_fails_alone_ends_all_under_mpirun(communicator: str, flag: str, tmp_path: Path) -> None:
    """Rank 1 cannot read the model, or not write; rank 0 could wait for it for ever."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom qtp.run_pa import main\n"
        "arguments = sys.argv[1:]\n"
        f"if os.environ['PMI_RANK'] == '1':\n    arguments[arguments.index('{flag}') + 1] = '/nowhere/at/all'\n"
        "sys.exit(main(arguments))\n"
    )
    chosen = ["--communicator", communicator]
    done = run([MPIEXEC, "-n", "2", sys.executable, script, *flags(tmp_path / "out.jsonl"), *chosen], 60, PYTHONPATH=str(ROOT))
    assert done.returncode == 2, done.stderr
    assert "rank 1: error: " in done.stderr
    assert "/nowhere" in done.stderr


def test_srun(theirs: list[list[int]], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    code, told = srun(3, [*RUN, *flags(out), "--communicator", "gloo"])
    assert code == 0, told
    assert tokens(out) == theirs


def test_a_world_size_that_disagrees_is_one_line(tmp_path: Path) -> None:
    line = "error: tp 3 disagrees with the world size 2 of the launcher; start 3 ranks, or leave tp out"
    wrong = [*RUN, *flags(tmp_path / "out.jsonl"), "--tp", "3"]
    done = run([MPIEXEC, "-n", "2", *wrong])
    assert (done.returncode, done.stderr.splitlines()) == (2, [line])
    code, told = srun(2, wrong)
    assert (code, told) == (2, [line + "\n", ""])
    done = run([BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", *wrong[2:]])
    assert done.returncode != 0
    assert [text for text in done.stderr.splitlines() if text.startswith("error: ") or "disagrees" in text] == [line]


def test_nonsense_in_the_environment_is_one_line(tmp_path: Path) -> None:
    done = run([*RUN, *flags(tmp_path / "out.jsonl")], SLURM_PROCID="0", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="two")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("error: environment variable SLURM_STEP_NUM_TASKS is 'two', not a number; ")


def test_eight_runs_at_once(theirs: list[list[int]], tmp_path: Path) -> None:
    outs = [tmp_path / f"{i}.jsonl" for i in range(8)]
    runs = [
        subprocess.Popen(
            [*RUN, "--tp", "2", "--threads", "1", *flags(out)],
            cwd=ROOT,
            env=clean(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for out in outs
    ]
    try:
        told = [one.communicate(timeout=270)[1] for one in runs]
    finally:
        for one in runs:
            one.kill()
            one.wait()
    assert [one.returncode for one in runs] == [0] * 8, told
    assert [tokens(out) for out in outs] == [theirs] * 8

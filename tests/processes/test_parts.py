"""run_pa, LLM and plan on parts: the tokens of the whole checkpoint, each rank from its own part; all else is refused before
anything is served."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qtp import plan, run_pa
from qtp.reshard import __main__ as reshard
from tests.models_helper import open_llm, run

ROOT = Path(__file__).parents[2]
DENSE, MOE = ROOT / "qtp/demo/dense", ROOT / "qtp/demo/moe"
IDS = ["--load_tokenizer", "False", "--input_ids", "5,6,7", "--max_output_length", "8"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("parts") / "cut"
    assert reshard.main(["--model", str(MOE), "--save_directory", str(target), "--tp", "4", "--moe_ep", "2"]) == 0
    return target


def test_run_pa_on_parts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut"
    assert reshard.main(["--model", str(DENSE), "--save_directory", str(cut), "--tp", "2"]) == 0
    flags = ["--tp", "2", "--max_output_length", "8", "--input_texts", "def mean(data):"]
    capfd.readouterr()
    assert run_pa.main(["--model", str(DENSE), "--communicator", "loopback", *flags]) == 0
    out, _ = capfd.readouterr()
    assert "Answer[0]" in out
    command = [sys.executable, "-m", "qtp.run_pa", "--model", str(cut), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, out), done.stderr
    with open_llm(DENSE, 2, dtype="bfloat16") as llm:
        read = {(str(ready.rank), str(ready.bytes_read)) for ready in llm.ranks.ready}
    assert set(re.findall(r"rank (\d+): read (\d+) bytes", done.stderr)) == read


def test_experts_in_parts_give_the_same_logprobs(parts: Path) -> None:
    with open_llm(MOE, 4, moe_ep=2) as llm:
        theirs = run(llm, [5, 6, 7, 8], [9, 10], 6)
    with open_llm(parts, 4, moe_ep=2) as llm:
        ours = run(llm, [5, 6, 7, 8], [9, 10], 6)
    assert ours[0].equal(theirs[0])
    assert ours[1] == theirs[1]


def test_another_grid_is_told_a_command_that_works(parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for main, flags in ((run_pa.main, IDS), (plan.main, [])):
        capfd.readouterr()
        assert main(["--model", str(parts), "--tp", "2", *flags]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith(
            f"error: {parts}: was cut for tp 4, moe_ep 2, moe_tp 2, not for tp 2, moe_ep 2, moe_tp 1; run python"
        )
    command = shlex.split(line.partition("; run python ")[2])
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    target = command[command.index("--save_directory") + 1]
    capfd.readouterr()
    assert plan.main(["--model", target, "--tp", "2", "--memory", "1"]) == 0
    assert plan.main(["--model", str(parts), "--tp", "4", "--moe_ep", "2", "--memory", "1"]) == 0


@pytest.mark.parametrize("how", ["missing", "truncated", "unfinished"])
def test_parts_that_are_not_whole(how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut"
    assert reshard.main(["--model", str(DENSE), "--save_directory", str(cut), "--tp", "2"]) == 0
    part = cut / "part1-of-2/model.safetensors"
    if how == "missing":
        part.unlink()
    elif how == "truncated":
        part.write_bytes(part.read_bytes()[:-2])
    else:
        (cut / "qtp_manifest.json").unlink()
    capfd.readouterr()
    assert run_pa.main(["--model", str(cut), "--tp", "2", *IDS]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert str(cut if how == "unfinished" else part) in line
    assert {"missing": "is missing", "truncated": "truncated", "unfinished": "unfinished reshard"}[how] in line

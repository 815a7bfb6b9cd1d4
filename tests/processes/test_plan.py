"""qtp.plan says what a run then holds, from config and headers alone, and says no where it cannot fit."""

import subprocess
import sys
from pathlib import Path

import pytest

from qtp import LLM, plan
from qtp.config import ModelConfig
from qtp.layout.split import Grid
from qtp.resolve import shares

ROOT = Path(__file__).parents[2]
DENSE, MOE = ROOT / "qtp/demo/dense", ROOT / "qtp/demo/moe"


def run(capfd: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    capfd.readouterr()
    code = plan.main([str(arg) for arg in argv])
    out, err = capfd.readouterr()
    assert err == ""
    return code, out


@pytest.mark.parametrize(("folder", "tp", "flags"), [(DENSE, 3, {}), (MOE, 4, {}), (MOE, 6, {"moe_ep": 3, "moe_tp": 2})])
def test_the_plan_is_what_the_ranks_then_hold(
    capfd: pytest.CaptureFixture[str], folder: Path, tp: int, flags: dict[str, int]
) -> None:
    argv = [part for name, value in flags.items() for part in (f"--{name}", value)]
    code, out = run(capfd, "--model", folder, "--tp", tp, "--memory", 1, *argv)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.split() and line.split()[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(tp))
    with LLM(str(folder), tp=tp, communicator="loopback", block_size=16, num_kv_blocks=4, **flags) as llm:
        assert [int(row[-2]) for row in rows] == [ready.weight_bytes for ready in llm.ranks.ready]
        cache = llm.ranks.worker.cache
        assert int(rows[0][-1]) * 4 * 16 == 2 * cache.keys.numel() * cache.keys.element_size()
    layers = llm.model_config.num_layers
    assert f"{1 + 2 * layers} all_reduce of T x {2 * llm.model_config.hidden_size} bytes" in out


def test_it_says_no_where_it_cannot_fit(capfd: pytest.CaptureFixture[str]) -> None:
    code, out = run(capfd, "--model", DENSE, "--memory", 0.001)
    assert code == 1
    assert "no: the weights and a step's working memory alone do not fit" in out
    model = ModelConfig.load(DENSE)
    (share,) = shares(model, Grid.of(1), "bfloat16")
    fixed, kv = (
        share.weight_bytes + plan.working_bytes(model, share, "bfloat16", plan.STEP_TOKENS),
        2048 * share.kv_bytes_per_token,
    )
    code, out = run(capfd, "--model", DENSE, "--memory", (fixed + 0.5 * kv) / 2**30, "--max-len", 2048)
    assert code == 1
    assert "no: one sequence of 2048 tokens does not fit; raise --tp or --memory, or lower --max-len to 1024 or less" in out
    code, out = run(capfd, "--model", DENSE, "--memory", (fixed + 2.5 * kv) / 2**30, "--max-len", 2048)
    assert code == 0
    assert "sequences of 2048 tokens at once: 2" in out


def test_it_imports_no_torch() -> None:
    code = (
        f"import sys; from qtp import plan; plan.main(['--model', {str(MOE)!r}, '--tp', '4']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "yes: it fits" in done.stdout

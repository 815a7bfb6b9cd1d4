"""What a command has imported by when: nothing slow before the user's mistakes are told and the other ranks are on their way."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from collectives import Rendezvous
from qtp import llm
from qtp.config import EngineConfig

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "qtp" / "demo" / "dense"
SLOW = "sorted({n.split('.')[0] for n in sys.modules} & {'torch', 'numpy', 'transformers', 'tqdm', 'jinja2', 'tokenizers'})"


def told(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["qtp.run_pa", "qtp.plan", "qtp.llm", "qtp.worker.launching", "qtp.worker.__main__"])
def test_commands_begin_without_slow_imports(module: str) -> None:
    assert told(f"import {module}, sys; print({SLOW})") == "[]"


@pytest.mark.parametrize("flags", ["--model /nowhere", f"--model {DEMO} --dtype int8", f"--model {DEMO} --input_ids 1,x"])
def test_a_mistake_is_told_without_slow_imports(flags: str) -> None:
    argv = f"{flags} --tp 2 --load_tokenizer 0".split()
    assert told(f"import sys; from qtp.run_pa import main; print(main({argv}), {SLOW})") == "2 []"


@pytest.mark.parametrize("communicator", ["auto", "shm", "gloo"])
def test_the_other_ranks_are_started_before_torch_is_loaded(communicator: str) -> None:
    code = (
        "import sys; from qtp import LLM, llm; llm.launch = lambda config: sys.exit(print('torch' in sys.modules))\n"
        f"LLM({str(DEMO)!r}, tp=2, load_tokenizer=False, device='cpu', communicator={communicator!r})"
    )
    assert told(code) == "False"


def test_ranks_are_stopped_when_rank_0_cannot_import_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[float] = []
    started = SimpleNamespace(stop=lambda grace: stopped.append(grace))
    config, model = llm.prepare(EngineConfig(model=str(DEMO), tp=2))
    monkeypatch.setattr(llm, "launch", lambda config: (Rendezvous(size=2, local_size=2), started))
    monkeypatch.setitem(sys.modules, "qtp.worker.ranks", None)
    with pytest.raises(ImportError):
        llm.LLM.prepared(config, model, None, progress=False)
    assert stopped == [0.0]

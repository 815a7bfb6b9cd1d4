"""The native code is optional: without a compiler the build succeeds, and what needs it says what is missing and the way out."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from collectives import shm
from qtp.kernels import extension

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the build needs of the tree, with nothing built in it."""
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path / file)
    for folder in ("collectives", "launch", "qtp"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__", "demo"))
    return tmp_path


def build(folder: Path, **environ: str) -> str:
    """Builds in place, and returns what was printed."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def ask(folder: Path, code: str) -> str:
    """What `code` prints where the copy is what is imported: an editable installation would lend it its own native code."""
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    done = subprocess.run(
        [sys.executable, "-c", alone + code], cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_this_installation_has_it() -> None:
    assert shm.why_not() is None
    assert extension.why_not() is None


def test_without_a_compiler_the_build_succeeds_and_what_needs_it_says_why_not(copy: Path) -> None:
    printed = build(copy, CC="/nowhere/cc", CXX="/nowhere/c++")
    assert 'building extension "collectives._native" failed' in printed
    assert 'building extension "qtp.kernels._native" failed' in printed
    assert not list(copy.glob("**/*.so"))
    told = ask(copy, "import collectives; from collectives import shm; print(collectives.__file__); print(shm.why_not())")
    place, reason = told.splitlines()
    assert place == str(copy / "collectives" / "__init__.py")
    assert reason.startswith("the native code was not built; install a C++ compiler and the Python headers")
    assert reason.endswith("run pip install again and look at its output (pip install -v)")
    code = (
        "import torch\nfrom collectives import Rendezvous, create\n"
        "try:\n    create('shm', Rendezvous(size=2, local_size=2), torch.device('cpu'))\n"
        "except ValueError as error:\n    print(error)"
    )
    assert ask(copy, code) == f"communicator 'shm': {reason}"
    assert ask(copy, "from qtp.kernels import extension; print(extension.why_not())") == reason


def test_native_code_of_another_time_is_not_used(copy: Path) -> None:
    for folder, question in (
        ("collectives", "from collectives import shm; print(shm.why_not())"),
        ("qtp/kernels", "from qtp.kernels import extension; print(extension.why_not())"),
    ):
        (copy / folder / "_native.py").write_text("INTERFACE = -1\n", encoding="utf-8")
        told = ask(copy, question)
        assert told.startswith("the native code is older or newer than this Python code; run pip install again")

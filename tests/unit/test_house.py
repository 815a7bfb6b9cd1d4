"""The laws of the house that a reader of the source can check: who imports what, who reads the environment, what never occurs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(f for room in ("collectives", "launch", "qtp") for f in (ROOT / room).rglob("*.py"))
NAMES = [f.relative_to(ROOT).as_posix() for f in FILES]
READS_ENVIRONMENT = {"launch/detect.py", "launch/affinity.py", "launch/local.py"}
each_file = pytest.mark.parametrize("file", FILES, ids=NAMES)


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported anywhere in a file, inside functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """a.b.c for an attribute chain, else what there is of it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def used(tree: ast.AST) -> set[str]:
    return {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def test_there_is_something_to_check() -> None:
    assert {"collectives/torch_group.py", "launch/detect.py", "qtp/config.py", "qtp/layout/split.py"} <= set(NAMES)


@each_file
def test_torch_distributed_has_one_home(file: Path) -> None:
    tree = parse(file)
    found = {n for n in imported(tree) if within(n, "torch.distributed")} | {
        n for n in used(tree) if within(n, "torch.distributed")
    }
    assert not found or file == ROOT / "collectives" / "torch_group.py", found


@each_file
def test_the_environment_is_read_in_few_places(file: Path) -> None:
    tree = parse(file)
    ways = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv")
    found = {n for n in (*imported(tree), *used(tree)) if any(within(n, way) for way in ways)}
    assert not found or file.relative_to(ROOT).as_posix() in READS_ENVIRONMENT, found


@each_file
def test_nothing_is_unpickled_or_evaluated(file: Path) -> None:
    tree = parse(file)
    unsafe = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    assert not [n for n in imported(tree) if n.split(".")[0] in unsafe]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {dotted(call.func) for call in calls}
    assert not called & {
        "eval",
        "exec",
        "compile",
        "__import__",
        "builtins.eval",
        "builtins.exec",
        "torch.load",
        "os.system",
        "os.popen",
    }
    assert "torch.load" not in used(tree) | set(imported(tree))
    keywords = [(k.arg, k.value) for call in calls for k in call.keywords]
    assert not [v for name, v in keywords if name == "shell" and not (isinstance(v, ast.Constant) and v.value is False)]
    allows = [v for name, v in keywords if name in ("allow_pickle", "trust_remote_code")]
    assert not [v for v in allows if not (isinstance(v, ast.Constant) and v.value is False)]


@each_file
def test_every_module_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(parse(file)), file


@each_file
def test_no_file_has_two_jobs(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 500


@each_file
def test_imports_go_one_way(file: Path) -> None:
    room = file.relative_to(ROOT).parts[0]
    above = {"collectives": ("launch", "qtp"), "launch": ("qtp",), "qtp": ()}[room]
    assert not [n for n in imported(parse(file)) if any(within(n, module) for module in above)]


def test_the_checks_see_what_they_look_for() -> None:
    tree = ast.parse(
        "import torch.distributed as d\nfrom torch import load, distributed\nimport os\nos.environ['A']\ntorch.load(f)"
    )
    assert {"torch.distributed", "torch.load", "os"} <= set(imported(tree))
    assert {"os.environ", "torch.load"} <= used(tree)


LIGHT = ("qtp.engine.engine", "qtp.engine.scheduler", "qtp.wire.channel", "qtp.layout.split", "qtp.layout.coverage")
LIGHT += ("qtp.kv.blocks", "qtp.weights.names", "qtp.weights.store", "qtp.config", "qtp.engine.sampling_params", "launch.detect")


@pytest.mark.parametrize("module", LIGHT)
def test_plain_parts_do_not_load_torch(module: str) -> None:
    code = f"import {module}, sys; print(sorted({{n.split('.')[0] for n in sys.modules}} & {{'torch', 'numpy', 'transformers'}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr

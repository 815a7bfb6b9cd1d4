"""Changes the code in ways that break it, one at a time, and checks that the tests notice each: `make mutants [ONLY=text]`.

A mutant is a list of replacements, each of which must find its text exactly once. It is applied to a copy of the tree; the
tests named with it run there and must fail. A mutant that survives, or whose text is no longer found, ends this script with
exit code 1. Mutants of code for an instruction set that this processor lacks are named and left out.

--device cuda: the tests run on a card, and the mutants are those whose code and tests do.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # where qtp is not installed, as on a card that is lent
from device_helper import on_device  # noqa: E402
from mutant_table import HIERARCHICAL, KERNELS, MUTANTS, NATIVE, Mutant  # noqa: E402

from qtp.kernels.extension import native  # noqa: E402

ISAS = native.isas() if native is not None else ()
COPIED = ("collectives", "launch", "qtp", "tests", "scripts", "pyproject.toml", "setup.py")
CPU_ONLY = (NATIVE, KERNELS, "qtp/kernels/native", "qtp/attention/native", "collectives/shm.py", HIERARCHICAL)


def runs_on(change: Mutant, device: str) -> bool:
    """Whether its code and all its tests run on `device`."""
    if device == "cpu":
        return True
    return (
        not change.interpreted and on_device(change.tests) and not any(edit.file.startswith(CPU_ONLY) for edit in change.changes)
    )


def survives(change: Mutant, device: str) -> str | None:
    """None if the tests fail under the mutant; otherwise what is wrong."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / name)
        for edit in change.changes:
            text = (tree / edit.file).read_text()
            if text.count(edit.old) != 1:
                return f"its text stands {text.count(edit.old)} times in {edit.file}"
            (tree / edit.file).write_text(text.replace(edit.old, edit.new))
        if any(edit.file.startswith((NATIVE, KERNELS)) for edit in change.changes):
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
            built = subprocess.run(build, cwd=tree, capture_output=True, text=True, check=False)
            if built.returncode or "failed" in built.stderr:
                return f"it does not compile: {built.stderr[-300:]}"
        code = run_tests(tree, change.tests, device)
        return None if code == 1 else f"the tests ended with exit code {code} ({', '.join(change.tests)})"


def run_tests(tree: Path, tests: tuple[str, ...], device: str) -> int:
    """Pytest's exit code in `tree`: 0 all passed, 1 some failed, anything else is no verdict (-1: it took too long)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--timeout", "120", "--device", device, *tests]
    environment = {"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    if device != "cpu":  # where the driver, Triton's compilers and what they have compiled are found
        environment |= {
            name: os.environ[name] for name in ("HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CC") if name in os.environ
        }
        environment["PATH"] = os.environ["PATH"]
    try:
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=900).returncode
    except subprocess.TimeoutExpired:
        return -1


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="mutants whose name contains this")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = p.parse_args()
    named = [m for m in MUTANTS if args.only in m.name]
    chosen = [m for m in named if m.isa in ISAS and runs_on(m, args.device)]
    for m in named:
        if m not in chosen:
            reason = (
                f"this processor has no {m.isa}" if m.isa not in ISAS else f"its code or its tests do not run on {args.device}"
            )
            print(f"left out  {m.name}: {reason}")
    if not chosen:
        print(f"mutants.py: no mutant to try has {args.only!r} in its name; leave --only out for all", file=sys.stderr)
        return 2
    needed = tuple(sorted({test for m in chosen for test in m.tests}))
    if run_tests(ROOT, needed, args.device) != 0:
        print("the tests fail without any mutant; mend that first")
        return 1
    alive = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for m, problem in zip(chosen, pool.map(survives, chosen, [args.device] * len(chosen)), strict=True):
            alive += problem is not None
            print(f"{'SURVIVED' if problem else 'killed  '}  {m.name}{f': {problem}' if problem else ''}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())

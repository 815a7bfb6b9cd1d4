"""Ends one rank in every way, at every time, over every transport and launcher, and looks at how the others end.

    python scripts/kill_matrix.py [--rounds 3] [--jobs 2] [--only decode,shm]
    python scripts/kill_matrix.py --rounds 100 --only "kill rank 1 decode shm local"

A cell is fault (SIGKILL, an exception, SIGSTOP) x rank (0, 1) x time (loading, idle, prefill, decode) x communicator x launcher.
Each cell starts a run of two ranks whose named rank does it to itself at that time, and passes if, within 5 s (SIGSTOP: the
stall timeout + 5 s): every rank has ended, the exit code is not 0, exactly one line on stderr names rank, host, pid and cause
and is the last one, no traceback but that of the failing rank's exception is shown, and no process or shared-memory file is
left. A launcher's own summary may follow. mpiexec kills all ranks within milliseconds of a death; where it is faster than the
line, its report, which names pid and signal, is accepted and counted apart.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
FAULTS = ("kill", "raise", "stop")
TIMES = ("loading", "idle", "prefill", "decode")
STARTS = (("shm", "local"), ("shm", "torchrun"), ("gloo", "local"), ("gloo", "torchrun"), ("mpi", "mpirun"))
STALL = 3.0
LIMIT = 5.0
START_LIMIT = 90.0
BY_LAUNCHER = "(told by mpiexec's report alone)"


@dataclass(frozen=True, slots=True)
class Cell:
    fault: str
    rank: int
    time: str
    communicator: str
    launcher: str

    def __str__(self) -> str:
        return f"{self.fault} rank {self.rank} {self.time} {self.communicator} {self.launcher}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """problem: why the cell failed, "" if it passed; seconds: from the fault to the end of the last process."""

    problem: str
    seconds: float
    output: str


def cells() -> Iterator[Cell]:
    for (communicator, launcher), fault, rank, when in itertools.product(STARTS, FAULTS, (0, 1), TIMES):
        yield Cell(fault, rank, when, communicator, launcher)


# Runs inside every rank: Python imports it at start because its folder is on PYTHONPATH.
SITE = '''
import builtins, json, os, signal, socket, sys, threading, time
from pathlib import Path

folder = Path(__file__).parent
cell = json.loads((folder / "cell.json").read_text())


def me():
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def fault():
    (folder / "fault.json").write_text(json.dumps({"pid": os.getpid(), "at": time.time(), "host": socket.gethostname()}))
    if cell["fault"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif cell["fault"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise ZeroDivisionError("out of luck")


def faulty(home):
    """The worker that does it."""
    load = home.load

    def loading(*given):
        time.sleep(0.5)  # the other rank is loading too, and watched
        shard = load(*given)
        if cell["time"] == "loading":
            fault()
        return shard

    home.load = loading

    class Worker(home.Worker):
        def execute(self, plan):
            whole = any(chunk.count > 1 for chunk in plan.chunks)
            if (cell["time"] == "prefill" and whole) or (cell["time"] == "decode" and plan.step > 3 and not whole):
                before, calls = self.comm._before, []

                def third(*given):  # in the middle of the step: the other rank waits in a collective
                    calls.append(1)
                    if len(calls) == 3:
                        fault()
                    return before(*given)

                self.comm._before = third
            return super().execute(plan)

    return Worker


def when_idle():
    """Does it once the run is idle, in the main thread if it is an exception."""
    def wait():
        while not (folder / "idle").exists():
            time.sleep(0.02)
        time.sleep(0.3)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)

    signal.signal(signal.SIGUSR2, lambda signum, frame: fault())
    threading.Thread(target=wait, daemon=True).start()


def importing(name, *args, **kwargs):
    """Makes the worker faulty as soon as it is there."""
    module = real(name, *args, **kwargs)
    home = sys.modules.get("qtp.worker.worker")
    if home is not None and hasattr(home, "Worker") and builtins.__import__ is importing:
        builtins.__import__ = real
        home.Worker = faulty(home)
        if cell["time"] == "idle":
            when_idle()
    return module


real = builtins.__import__
if me() == cell["rank"]:
    builtins.__import__ = importing
'''

# What every launcher starts: a run that decodes for long, or sits idle.
PROGRAM = """
import sys, time
from pathlib import Path
from qtp.cli import run


def command():
    from qtp import LLM, SamplingParams
    model, communicator, stall, when, folder = sys.argv[1:6]
    launcher = sys.argv[6]
    with LLM(model, tp=2, communicator=communicator, stall_timeout=float(stall), on_death="exit", load_tokenizer=False,
             num_kv_blocks=40, block_size=16, dtype="float32", launcher=launcher) as llm:
        if when == "idle":
            llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
            Path(folder, "idle").touch()
            while True:
                time.sleep(0.05)
        while True:
            llm.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=400, ignore_eos=True))


sys.exit(run(command))
"""


def command(cell: Cell, program: Path, folder: Path) -> list[str]:
    bin = Path(sys.executable).parent
    launcher = "local" if cell.launcher == "local" else "auto"
    rest = [str(program), str(ROOT / "qtp/demo/dense"), cell.communicator, str(STALL), cell.time, str(folder), launcher]
    starts = {
        "local": [sys.executable],
        "torchrun": [str(bin / "torchrun"), "--standalone", "--nproc-per-node", "2"],
        "mpirun": [str(bin / "mpiexec"), "-n", "2", sys.executable],
    }
    return [*starts[cell.launcher], *rest]


def run_cell(cell: Cell) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="qtp-kill-") as name:
        folder = Path(name)
        (folder / "cell.json").write_text(json.dumps(asdict(cell)))
        (folder / "sitecustomize.py").write_text(SITE)
        (folder / "program.py").write_text(PROGRAM)
        environ = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "TMPDIR": name}
        before = set(os.listdir("/dev/shm"))
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                command(cell, folder / "program.py", folder),
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=ROOT,
            )
            try:
                return _observe(cell, process, folder, before)
            finally:
                _end(process, folder)


def _observe(cell: Cell, process: subprocess.Popen[bytes], folder: Path, files: set[str]) -> Outcome:
    deadline = time.time() + START_LIMIT
    seen: set[int] = {process.pid}
    fault = None
    while fault is None:
        _note(process.pid, seen)
        if (folder / "fault.json").exists():
            time.sleep(0.01)
            fault = json.loads((folder / "fault.json").read_text())
        elif process.poll() is not None or time.time() > deadline:
            return Outcome("the fault never came", 0.0, _text(folder))
        time.sleep(0.01)
    allowed = LIMIT + (STALL if cell.fault == "stop" else 0.0)
    while time.time() - fault["at"] < allowed + 30.0:
        _note(process.pid, seen)
        process.poll()
        if not any(map(_alive, seen)):
            break
        time.sleep(0.01)
    seconds = time.time() - fault["at"]
    return Outcome(_judge(cell, process, fault, folder, seconds, allowed, seen, files), seconds, _text(folder))


def _judge(
    cell: Cell,
    process: subprocess.Popen[bytes],
    fault: dict[str, object],
    folder: Path,
    seconds: float,
    allowed: float,
    seen: set[int],
    files: set[str],
) -> str:
    text = _text(folder)
    left = [pid for pid in seen if _alive(pid)]
    if not left:
        process.wait(5.0)
    if left:
        return f"processes are left: {[(pid, _what(pid)) for pid in left]}"
    if seconds > allowed:
        return f"took {seconds:.1f} s"
    if process.returncode in (0, None):
        return f"exit code {process.returncode}"
    head = f"rank {cell.rank} (host {fault['host']}, pid {fault['pid']}): "
    told = [line for line in text.splitlines() if re.search(r"rank \d+ \(host .*, pid \d+\): ", line)]
    if not told and cell.launcher == "mpirun" and f"PID {fault['pid']} RUNNING" in text and "Killed (signal 9)" in text:
        return BY_LAUNCHER
    if len(told) != 1 or head not in told[0]:
        return f"lines that name a rank: {told}"
    cause = told[0].partition(head)[2]
    expected = {
        "kill": r"process is gone$|ended with signal 9$|has died",
        "raise": r"ZeroDivisionError: out of luck$",
        "stop": r"hangs: (it gave no sign of life|no progress in step \d+) for 3 s",
    }[cell.fault]
    if not re.match(expected, cause):
        return f"cause: {cause}"
    after = text[text.index(told[0]) + len(told[0]) :].strip()
    summary = {"torchrun": r"elastic", "mpirun": r"BAD TERMINATION"}.get(cell.launcher, r"\A\Z")
    if after and not re.search(summary, after):
        return f"after the line: {after[:300]}"
    traces = text[: text.index(told[0])].count("Traceback (most recent call last)")
    if traces != (1 if cell.fault == "raise" else 0):
        return f"{traces} tracebacks"
    new = _unused(set(os.listdir("/dev/shm")) - files)
    return f"files are left: {sorted(new)}" if new else ""


def _unused(names: set[str]) -> set[str]:
    """Those files of shared memory that no living process has mapped: other runs on this host make theirs meanwhile."""
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            used |= set(re.findall(r"/dev/shm/(\S+)", maps.read_text()))
    return {name for name in names - used if Path("/dev/shm", name).exists()}


def _text(folder: Path) -> str:
    return (folder / "output").read_text(errors="replace")


def _note(root: int, seen: set[int]) -> None:
    try:
        seen.update(child.pid for child in psutil.Process(root).children(recursive=True))
    except psutil.Error:
        pass


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _what(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())[-80:]
    except psutil.Error:
        return "?"


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Ends what is left of a cell: its processes, in whatever session, have the folder in their environment."""
    for other in psutil.process_iter():
        try:
            if other.pid != os.getpid() and str(folder) in other.environ().get("PYTHONPATH", ""):
                other.kill()
        except psutil.Error:
            pass
    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="of all cells")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="comma-separated: cells whose name holds each of these")
    parser.add_argument("--verbose", action="store_true", help="show the output of cells that fail")
    args = parser.parse_args()
    parts = [part.strip() for part in args.only.split(",") if part.strip()]
    chosen = [cell for cell in cells() if all(part in f" {cell} " for part in parts)] * args.rounds
    failed, by_launcher, slowest = 0, 0, {"stop": (0.0, ""), "other": (0.0, "")}
    with ThreadPoolExecutor(args.jobs) as pool:
        for number, (cell, outcome) in enumerate(zip(chosen, pool.map(run_cell, chosen), strict=True), 1):
            kind = "stop" if cell.fault == "stop" else "other"
            slowest[kind] = max(slowest[kind], (outcome.seconds, str(cell)))
            failed += outcome.problem not in ("", BY_LAUNCHER)
            by_launcher += outcome.problem == BY_LAUNCHER
            print(f"{number}/{len(chosen)} {cell}: {outcome.problem or 'ok'} ({outcome.seconds:.2f} s)", flush=True)
            if outcome.problem and args.verbose:
                print("    " + outcome.output.replace("\n", "\n    "), flush=True)
    print(f"{len(chosen)} cells run, {len(chosen) - failed} passed, {by_launcher} of them {BY_LAUNCHER}")
    for kind, (seconds, name) in slowest.items():
        if name:
            limit = LIMIT + (STALL if kind == "stop" else 0.0)
            print(f"slowest of {kind}: {seconds:.2f} s of {limit:g} s ({name})")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())

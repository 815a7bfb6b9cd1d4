"""What the tests of launchers share: a run of the demo model, its tokens by tp 1, and srun's environment."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launch.detect import detect
from qtp import LLM, SamplingParams

ROOT = Path(__file__).parents[2]
MOE = ROOT / "qtp" / "demo" / "moe"
BIN = Path(sys.executable).parent
PROMPTS = [[5, 6, 7], [9, 8]]
TOKENS = 16
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "OMPI_", "PMI_", "MPI_LOCAL", "SLURM_", "QTP_TOKEN")


def expected() -> list[list[int]]:
    with LLM(str(MOE), tp=1, dtype="float32") as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))
    return [list(output.outputs[0].token_ids) for output in outputs]


def flags(out: Path) -> list[str]:
    """Of qtp.run_pa, for what `expected` asks."""
    ids = [",".join(map(str, prompt)) for prompt in PROMPTS]
    length = ["--max_output_length", str(TOKENS), "--ignore_eos", "--max_position_embeddings", "100"]
    return ["--model", str(MOE), "--dtype", "float32", "--input_ids", *ids, *length, "--timeout", "60", "--output", str(out)]


def tokens(out: Path) -> list[list[int]]:
    return [json.loads(line)["token_ids"] for line in out.read_text(encoding="utf-8").splitlines()]


def clean(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without any launcher's variables, and with `extra`."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}, **(extra or {})}


def run(command: Sequence[str | Path], seconds: float = 200, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, env=clean(extra), stdin=subprocess.DEVNULL
    )


def free_port() -> int:
    """A port that the system chose, and that is free again."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def slurm(rank: int, size: int, job: int) -> dict[str, str]:
    """What srun sets for a task of a step on one node."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": str(size),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_TASKS_PER_NODE": str(size),
        "SLURM_STEP_NODELIST": "n[07]",
        "SLURM_JOB_NODELIST": "n[05-07]",
    }


def free_job() -> int:
    """A job whose port nobody has."""
    while True:
        job = random.randrange(1, 10**6)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", detect(environ=slurm(0, 2, job)).port)):
            return job


def srun(size: int, command: Sequence[str | Path], seconds: float = 200) -> tuple[int, list[str]]:
    """Starts `size` tasks as srun does, and leaves those that go on alone when one ends: the highest exit code and what each rank
    wrote to stderr."""
    job = free_job()
    with _ended(
        [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=clean(slurm(rank, size, job)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
    ) as tasks:
        told = [task.communicate(timeout=seconds)[1] for task in tasks]
    return max(task.returncode for task in tasks), told


@contextlib.contextmanager
def _ended(tasks: list[subprocess.Popen[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    try:
        yield tasks
    finally:
        for task in tasks:
            task.kill()
            task.wait()

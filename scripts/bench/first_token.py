"""How long a cold process takes from the command's start to its first token, and where that time goes.

    python scripts/bench/first_token.py --model DIR [--tp 1 2] [--rounds 5] [--vllm PYTHON]

Make the checkpoint with scripts/make_checkpoint.py --like qwen2-0.5b; it is read once before, so that it lies in the page cache.
Processes of all kinds take turns, one at a time. Figures are medians over rounds, in seconds since the command's start; a line
tells until when rank 0 had checked what it was asked, imported torch, joined the others and read its weights, had all ranks
ready, and had printed the answer. cpu: seconds of all ranks together, until their end. --vllm: the interpreter of an environment
with vLLM, which runs in its eager mode with --eager.
"""

import argparse
import json
import os
import resource
import selectors
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PROMPT = [1, 2, 3]
STAGES = {"checked": b"communicator", "imported": b"weights of rank 0:", "ready": b"rank 0: read"}  # as they appear on stderr
ANSWER = "Answer"
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, tp, eager = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
    llm = LLM(model, tensor_parallel_size=tp, dtype="bfloat16", enforce_eager=eager, skip_tokenizer_init=True, max_model_len=512)
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    out = llm.generate([{"prompt_token_ids": json.loads(sys.argv[4])}], params)
    print("Answer[0]:", list(out[0].outputs[0].token_ids), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds from the start of one process to each stage, and the CPU time it took."""

    stages: dict[str, float]
    first_token: float
    cpu: float


def qtp_command(model: Path, tp: int) -> list[str]:
    ids = ",".join(map(str, PROMPT))
    choices = ["--load_tokenizer", "False", "--max_output_length", "1", "--dtype", "bfloat16"]
    return [sys.executable, "-m", "qtp.run_pa", "--model", str(model), "--tp", str(tp), "--input_ids", ids, *choices]


def cpu_seconds() -> float:
    """Of all processes that this one has waited for, and of those that they have."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cold(command: list[str], timeout: float) -> Run:
    """Runs it once. Raises RuntimeError with what it said if it gives no answer."""
    before, start = cpu_seconds(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    said = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    stages: dict[str, float] = {}
    first_token = 0.0
    with selectors.DefaultSelector() as selector:
        for descriptor in said:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, start + timeout - time.perf_counter()))
            now = time.perf_counter() - start
            if not ready:
                process.kill()
                break
            for key, _ in ready:
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fd)
                said[key.fd] += chunk
            for stage, words in STAGES.items():
                if stage not in stages and words in said[process.stderr.fileno()]:
                    stages[stage] = now
            answer = said[process.stdout.fileno()].find(ANSWER.encode())
            if not first_token and answer >= 0 and b"\n" in said[process.stdout.fileno()][answer:]:
                first_token = now
    process.stdout.close()
    process.stderr.close()
    if process.wait() or not first_token:
        raise RuntimeError(f"{' '.join(command[:4])} ended with {process.returncode}: {said.popitem()[1].decode()[-800:]}")
    return Run(stages, first_token, cpu_seconds() - before)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--vllm", metavar="PYTHON")
    p.add_argument("--eager", action="store_true", help="vLLM without compilation")
    p.add_argument("--timeout", type=float, default=300.0, help="seconds for one process")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    commands = {f"qtp tp {tp}": qtp_command(args.model, tp) for tp in args.tp}
    if args.vllm:
        for tp in args.tp:
            commands[f"vllm tp {tp}"] = [args.vllm, "-c", VLLM, str(args.model), str(tp), str(args.eager), json.dumps(PROMPT)]
    for file in args.model.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass

    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            runs[name].append(cold(command, args.timeout))
    rows = []
    for name, each in runs.items():
        times = [run.first_token for run in each]
        stages = {stage: statistics.median(run.stages[stage] for run in each) for stage in STAGES if stage in each[0].stages}
        row = {"name": name, "first_token": statistics.median(times), "min": min(times), "max": max(times)}
        rows.append({**row, "cpu": statistics.median(run.cpu for run in each), **stages})
        until = "".join(f"{stage} {seconds:.2f}, " for stage, seconds in stages.items())
        print(
            f"{name}: first token after {row['first_token']:.2f} s ({row['min']:.2f} to {row['max']:.2f}); "
            f"{until}cpu {rows[-1]['cpu']:.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()

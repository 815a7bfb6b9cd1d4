"""Speed against transformers' generate, interleaved in one run: decode at batch 1 and 8, and prefill, on one shape.

    python scripts/bench/decode.py --model DIR [--threads 2] [--rounds 5]

Make the checkpoint with scripts/make_checkpoint.py --like qwen2-0.5b. Both engines use the same weights, dtype (bfloat16) and
threads in one process, in turns A B A B; figures are medians over rounds. The memory limit of the same run (a plain read of
a large tensor by all threads) stands beside. Prints a table and writes JSON with --json FILE.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.remove(str(Path(__file__).resolve().parent))  # where another collectives.py is

from qtp import LLM, SamplingParams

PROMPT = 128
NEW = 32
PREFILL = 1024


def read_limit(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory: the sum of a tensor far larger than any cache."""
    block = torch.ones(1 << 28, dtype=torch.float32)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return block.numel() * 4 / min(times)


def decode_seconds(run: Callable[[int], None]) -> float:
    """Seconds of NEW - 1 decode steps: a run of NEW tokens less a run of one."""
    start = time.perf_counter()
    run(1)
    first = time.perf_counter()
    run(NEW)
    return (time.perf_counter() - first) - (first - start)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", type=Path)
    args = p.parse_args()

    llm = LLM(args.model, tp=1, dtype="bfloat16", threads=args.threads, load_tokenizer=False, max_num_seqs=8, max_model_len=2048)
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    torch.set_num_threads(args.threads)
    vocab = llm.model_config.vocab_size

    def prompts(batch: int, length: int) -> list[list[int]]:
        return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(batch)).tolist()

    def ours(batch: int, length: int) -> Callable[[int], None]:
        ids = prompts(batch, length)
        return lambda new: void(llm.generate(ids, SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)))

    def hf(batch: int, length: int) -> Callable[[int], None]:
        ids = torch.tensor(prompts(batch, length))
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return lambda new: void(theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **settings))

    def prefill(run: Callable[[int], None]) -> float:
        start = time.perf_counter()
        run(1)
        return time.perf_counter() - start

    cases = {
        "decode, batch 1": (lambda make: decode_seconds(make(1, PROMPT)), NEW - 1),
        "decode, batch 8": (lambda make: decode_seconds(make(8, PROMPT)), 8 * (NEW - 1)),
        f"prefill {PREFILL}": (lambda make: prefill(make(1, PREFILL)), PREFILL),
    }
    report = {}
    with torch.inference_mode():
        for make in (ours, hf):
            make(1, 16)(2)
        for name, (seconds, tokens) in cases.items():
            speeds: dict[str, list[float]] = {"qtp": [], "transformers": []}
            for _ in range(args.rounds):
                for engine, make in (("qtp", ours), ("transformers", hf)):
                    speeds[engine].append(tokens / seconds(make))
            medians = {engine: statistics.median(values) for engine, values in speeds.items()}
            ratio = medians["qtp"] / medians["transformers"]
            report[name] = {**medians, "ratio": ratio, "all": speeds}
            print(
                f"{name:16} qtp {medians['qtp']:8.1f}  transformers {medians['transformers']:8.1f} tokens/s  ratio {ratio:.2f}",
                flush=True,
            )
    limit = read_limit(args.threads)
    weights = llm.ranks.ready[0].weight_bytes
    print(f"memory read {limit / 1e9:.1f} GB/s: at most {limit / weights:.1f} tokens/s at batch 1")
    report["limit"] = {"bytes_per_second": limit, "weight_bytes": weights, "threads": args.threads}
    llm.close()
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))


def void(_: object) -> None:
    """Drops a result."""


if __name__ == "__main__":
    main()

"""Decode at tp 2 over one communicator and another, interleaved in one run.

    python scripts/bench/decode_tp.py --model DIR [--communicators shm gloo] [--tp 2] [--rounds 7]

Make the checkpoint with scripts/make_checkpoint.py --like qwen2-0.5b. All runs live side by side and take turns A B A B; the
ranks of one that waits sleep. Figures are medians over rounds, in tokens a second; the ratio is to the last communicator.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # where another collectives.py is

from qtp import LLM, SamplingParams

PROMPT = 128
NEW = 32


def decode_seconds(llm: LLM, batch: int) -> float:
    """Seconds of NEW - 1 decode steps of `batch` sequences: a run of NEW tokens less a run of one."""
    vocab = llm.model_config.vocab_size
    prompts = [[(7 * i + 13 * j) % vocab for i in range(PROMPT)] for j in range(batch)]
    times = []
    for count in (1, NEW):
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True))
        times.append(time.perf_counter() - start)
    return times[1] - times[0]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--communicators", nargs="+", default=["shm", "gloo"])
    p.add_argument("--tp", type=int, default=2)
    p.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--json", type=Path)
    args = p.parse_args()

    def start(communicator: str) -> LLM:
        choices = {"dtype": "bfloat16", "load_tokenizer": False, "max_num_seqs": 8, "max_model_len": 512}
        return LLM(args.model, tp=args.tp, communicator=communicator, **choices)

    llms = {name: start(name) for name in args.communicators}
    rates: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in args.batches} for name in llms}
    for turn in range(args.rounds + 1):
        for batch in args.batches:
            for name, llm in llms.items():
                rate = batch * (NEW - 1) / decode_seconds(llm, batch)
                if turn:  # the first is to warm up
                    rates[name][batch].append(rate)
    for llm in llms.values():
        llm.close()

    last = args.communicators[-1]
    rows = []
    for batch in args.batches:
        base = statistics.median(rates[last][batch])
        for name in args.communicators:
            rate = statistics.median(rates[name][batch])
            rows.append({"communicator": name, "batch": batch, "tokens_per_s": rate, f"ratio to {last}": rate / base})
            print(f"{name:14} tp {args.tp} batch {batch:3}: {rate:8.1f} tokens/s, {rate / base:.2f} times {last}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()

"""What a run would need, before anything is loaded: `python -m qtp.plan --model DIR --tp N [--max-len L] [--memory G]`.

Reads the config and the headers of the weight files alone, and imports no torch.
"""

import argparse
import sys
from dataclasses import replace
from math import inf

from qtp.cli import Parser, run
from qtp.config import EngineConfig, ModelConfig
from qtp.hub import folder_of
from qtp.layout.split import Grid
from qtp.resolve import ITEM_SIZE, RankShare, context_limit, machine_bytes, resolve, shares
from qtp.weights.names import declare
from qtp.weights.store import Store
from qtp.weights.verify import verify

STEP_TOKENS = 2048


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="qtp.plan", description="Print what each rank would hold, and whether it fits.", allow_abbrev=False)
    p.add_argument("--model", "--model_path", required=True, metavar="DIR")
    p.add_argument("--tp", type=int, default=1)
    p.add_argument("--moe_ep", type=int, default=-1)
    p.add_argument("--moe_tp", type=int, default=-1)
    p.add_argument("--dtype", default="auto")
    p.add_argument("--max_len", type=int, metavar="TOKENS", help="context of each sequence; default: the model's")
    p.add_argument("--memory", type=float, metavar="GIB", help="of one rank; default: this machine's memory shared by the ranks")
    return p


def working_bytes(model: ModelConfig, share: RankShare, dtype: str, tokens: int) -> int:
    """Roughly what a step of `tokens` needs beside weights and KV: the residual stream and its norm, queries, keys, values and
    their output, gate, up and their product, and one row of float32 logits a sequence (64 of them)."""
    qkv = (2 * len(share.query_heads) + 2 * len(share.kv_heads)) * model.head_dim
    return tokens * (4 * model.hidden_size + qkv + 3 * share.mlp_columns) * ITEM_SIZE[dtype] + 64 * share.vocab * 4


def step_traffic(model: ModelConfig, dtype: str, tokens: int) -> tuple[int, int]:
    """(all_reduce calls, bytes of each) of a step of `tokens`: one for the embedding, two a block."""
    return 1 + 2 * model.num_layers, tokens * model.hidden_size * ITEM_SIZE[dtype]


def command(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    folder = folder_of(args.model)
    model = ModelConfig.load(folder)
    asked = EngineConfig(model=str(folder), tp=args.tp, moe_ep=args.moe_ep, moe_tp=args.moe_tp, dtype=args.dtype, device="cpu")
    config = resolve(replace(asked, max_model_len=args.max_len, num_kv_blocks=1), model, 1, cuda=False)
    grid = config.grid()
    verify(Store(folder), declare(model), grid)
    if args.memory is not None and not 0 < args.memory < inf:
        raise ValueError(f"--memory {args.memory} must be a number of GiB above 0")
    memory = int((args.memory if args.memory is not None else machine_bytes() / 2**30 / config.tp) * 2**30)
    length = config.max_model_len or context_limit(model)

    rows = shares(model, grid, config.dtype)
    print(f"{folder}: {model.family}, {model.num_layers} layers, {config.dtype}, tp {config.tp}{_experts(model, grid)}")
    print("rank  query heads  KV heads  columns  experts   vocabulary  weights(bytes)  KV(bytes/token)")
    for s in rows:
        print(
            f"{s.rank:4}  {_span(s.query_heads):>11}  {_span(s.kv_heads):>8}  {s.mlp_columns:7}  {s.experts:7}  {s.vocab:11}  "
            f"{s.weight_bytes:14}  {s.kv_bytes_per_token:15}"
        )
    calls, size = step_traffic(model, config.dtype, 1)
    if config.tp == 1:
        print("a step: no collective")
    else:
        print(
            f"a step of T tokens: {calls} all_reduce of T x {size} bytes, and one all_gather a step (16 bytes a greedy row and "
            "rank; with top_k 1 to 64 1024; otherwise 4 a vocabulary entry)"
        )

    spare = min(memory - s.weight_bytes - working_bytes(model, s, config.dtype, STEP_TOKENS) for s in rows)
    per_token = max(s.kv_bytes_per_token for s in rows)
    longest = min(context_limit(model), max(0, spare) // per_token)
    batch = max(0, spare) // (per_token * length)
    print(f"memory of a rank: {memory / 2**30:.2f} GiB; left for KV on the fullest: {spare / 2**30:.2f} GiB")
    print(f"longest context for one sequence: {longest} tokens; sequences of {length} tokens at once: {batch}")
    if spare < 0:
        print("no: the weights and a step's working memory alone do not fit; raise --tp or --memory")
        return 1
    if batch < 1:
        print(
            f"no: one sequence of {length} tokens does not fit; raise --tp or --memory, or lower --max-len to {longest} or less"
        )
        return 1
    print("yes: it fits")
    return 0


def _experts(model: ModelConfig, grid: Grid) -> str:
    return f" (moe_ep {grid.moe_ep}, moe_tp {grid.moe_tp}, {model.moe.num_experts} experts)" if model.moe else ""


def _span(heads: range) -> str:
    return f"{heads.start}-{heads.stop - 1}"


def main(argv: list[str] | None = None) -> int:
    return run(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())

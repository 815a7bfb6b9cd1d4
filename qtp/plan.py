"""What a run would need, before anything is loaded: `python -m qtp.plan --model DIR --tp N [--nodes N] [--max-len L] [--card C]`.

Reads the config and the headers of the weight files alone, and imports no torch.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

from qtp.cards import CARDS, Card, bytes_read, card, decode_limit, loads, prefill_limit
from qtp.cli import Parser, run
from qtp.config import EngineConfig, ModelConfig
from qtp.hub import folder_of
from qtp.layout.split import Grid
from qtp.resolve import ITEM_SIZE, RankShare, context_limit, machine_bytes, resolve, shares
from qtp.weights.checkpoint import open_checkpoint
from qtp.weights.names import declare
from qtp.weights.verify import verify
from qtp.wire.codec import encode
from qtp.wire.messages import Chunk, StepPlan

STEP_TOKENS = 2048
SUM_BYTES = 4  # of a value while ranks on CPUs sum it: halves travel as float32
PAIR_BYTES = 16  # a rank's best (value, id) of a greedy row
FRAME_HEAD = 4  # bytes before a control frame


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="qtp.plan", description="Print what each rank would hold, and whether it fits.", allow_abbrev=False)
    p.add_argument("--model", "--model_path", required=True, metavar="DIR")
    p.add_argument("--tp", type=int, default=1)
    p.add_argument("--moe_ep", type=int, default=-1)
    p.add_argument("--moe_tp", type=int, default=-1)
    p.add_argument("--dtype", default="auto")
    p.add_argument("--nodes", type=int, default=1, help="hosts that the ranks are spread over")
    p.add_argument("--batch", type=int, default=64, metavar="SEQUENCES", help="in a decode step, for the traffic")
    p.add_argument("--max_len", type=int, metavar="TOKENS", help="context of each sequence; default: the model's")
    p.add_argument(
        "--memory", type=float, metavar="GIB", help="of one rank; default: this machine's memory shared by a host's ranks"
    )
    p.add_argument(
        "--card", metavar="NAME", help=f"one a rank, in place of --memory: {', '.join(c.name for c in CARDS.values())}"
    )
    p.add_argument("--gpu_memory_utilization", type=float, metavar="0..1", help="of the card's memory; default 0.9")
    return p


def working_bytes(model: ModelConfig, share: RankShare, dtype: str, tokens: int) -> int:
    """Roughly what a step of `tokens` needs beside weights and KV: the residual stream and its norm, queries, keys, values and
    their output, gate, up and their product, and one row of float32 logits a sequence (64 of them)."""
    qkv = (2 * len(share.query_heads) + 2 * len(share.kv_heads)) * model.head_dim
    return tokens * (4 * model.hidden_size + qkv + 3 * share.mlp_columns) * ITEM_SIZE[dtype] + 64 * share.vocab * 4


def step_traffic(model: ModelConfig, dtype: str, tokens: int) -> tuple[int, int]:
    """(all_reduce calls, bytes of each) of a step of `tokens`: one for the embedding, two a block."""
    return 1 + 2 * model.num_layers, tokens * model.hidden_size * ITEM_SIZE[dtype]


def placed(tp: int, nodes: int) -> list[range]:
    """The ranks of each node, in order, as even as integers allow. Raises ValueError if that cannot be."""
    if nodes < 1:
        raise ValueError(f"--nodes {nodes} must be at least 1")
    if nodes > tp:
        raise ValueError(f"--nodes {nodes} is more than the {tp} ranks of --tp; use {tp} or fewer nodes, or raise --tp")
    firsts = [node * (tp // nodes) + min(node, tp % nodes) for node in range(nodes + 1)]
    return [range(first, stop) for first, stop in pairwise(firsts)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """What a collective costs between hosts. sent: bytes that each host sends, and as many that it receives; rounds: messages
    between hosts that must follow one another."""

    sent: int
    rounds: int


def ring_sum(size: int, members: int) -> Crossing:
    """An all_reduce of `size` bytes around a ring of `members`, one link of which leaves each host (gloo/allreduce.cc): each
    member passes on all parts but its own, once to add and once to spread."""
    return Crossing(sent=2 * (members - 1) * -(-size // members), rounds=2 * (members - 1))


def ring_gather(size: int, members: int) -> Crossing:
    """An all_gather of `size` bytes from each of `members` around such a ring (gloo/allgather.cc)."""
    return Crossing(sent=(members - 1) * size, rounds=members - 1)


def crossings(model: ModelConfig, nodes: list[range], batch: int) -> dict[str, Crossing]:
    """What a greedy decode step of `batch` sequences costs between hosts, by communicator: `gloo` is one ring of all ranks,
    in `hierarchical` one rank a host talks across."""
    calls, values = 1 + 2 * model.num_layers, batch * model.hidden_size

    def step(members: int, ranks: int) -> Crossing:
        sums, gather = ring_sum(values * SUM_BYTES, members), ring_gather(ranks * batch * PAIR_BYTES, members)
        return Crossing(sent=calls * sums.sent + gather.sent, rounds=calls * sums.rounds + gather.rounds)

    return {"gloo": step(nodes[-1].stop, 1), "hierarchical": step(len(nodes), max(map(len, nodes)))}


def decode_step(batch: int, length: int, block_size: int) -> StepPlan:
    """The plan of a decode step of `batch` sequences of about `length` tokens: each is told the token sampled last, and one in
    block_size of them, at least one, gets a new block."""
    blocks = batch * -(-length // block_size)
    return StepPlan(
        step=1_000_000,
        chunks=tuple(
            Chunk(
                seq_id=1_000_000 + i,
                start=length + i % block_size,
                count=1,
                sample=True,
                appended=(100_000 + i,),
                new_blocks=(blocks + i,) if i % block_size == 0 else (),
            )
            for i in range(batch)
        ),
    )


def command(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    folder = folder_of(args.model)
    model = ModelConfig.load(folder)
    asked = EngineConfig(model=str(folder), tp=args.tp, moe_ep=args.moe_ep, moe_tp=args.moe_tp, dtype=args.dtype, device="cpu")
    config = resolve(replace(asked, max_model_len=args.max_len, num_kv_blocks=1), model, 1, cuda=False)
    grid = config.grid()
    verify(open_checkpoint(folder, model.weight_files, grid), declare(model), grid)
    if args.memory is not None and not 0 < args.memory < inf:
        raise ValueError(f"--memory {args.memory} must be a number of GiB above 0")
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch} must be at least 1")
    nodes = placed(config.tp, args.nodes)
    device, utilization = _card(args)
    if device is not None:
        memory = int(device.memory * utilization)
    else:
        memory = int((args.memory if args.memory is not None else machine_bytes() / 2**30 / len(nodes[0])) * 2**30)
    length = config.max_model_len or context_limit(model)

    rows = shares(model, grid, config.dtype, expanded=device is not None)
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
        control = FRAME_HEAD + len(encode(decode_step(args.batch, length, config.block_size)))
        print(
            f"control traffic of a decode step of {args.batch} sequences: {control} bytes to each of {config.tp - 1} ranks, "
            f"{(config.tp - 1) * control} in all, {(config.tp - len(nodes[0])) * control} of them to other hosts"
        )
    if len(nodes) > 1:
        _print_nodes(model, config.dtype, rows, nodes, memory, args.batch)
    if device is not None:
        print(
            f"card {device.name}: {device.memory / 2**30:.1f} GiB, of which {utilization:g} are {memory / 2**30:.2f} GiB; it "
            f"reads {device.bandwidth / 1e12:g} TB/s and does {device.peak / 1e12:g} TFLOP/s in bfloat16"
        )
        _print_card(model, config, device, memory, args.batch, length)

    spare = min(memory - s.weight_bytes - working_bytes(model, s, config.dtype, STEP_TOKENS) for s in rows)
    per_token = max(s.kv_bytes_per_token for s in rows)
    longest = min(context_limit(model), max(0, spare) // per_token)
    batch = max(0, spare) // (per_token * length)
    more = "--memory" if device is None else "--gpu-memory-utilization"
    print(f"memory of a rank: {memory / 2**30:.2f} GiB; left for KV on the fullest: {spare / 2**30:.2f} GiB")
    print(f"longest context for one sequence: {longest} tokens; sequences of {length} tokens at once: {batch}")
    if spare < 0:
        print(f"no: the weights and a step's working memory alone do not fit; raise --tp or {more}")
        return 1
    if batch < 1:
        print(f"no: one sequence of {length} tokens does not fit; raise --tp or {more}, or lower --max-len to {longest} or less")
        return 1
    print("yes: it fits")
    return 0


def _card(args: argparse.Namespace) -> tuple[Card | None, float]:
    """The card that was named, if any, and how much of it may be used."""
    asked = args.gpu_memory_utilization
    if args.card is None:
        if asked is not None:
            raise ValueError(f"--gpu_memory_utilization {asked:g} is of a card; name it with --card, or give --memory")
        return None, 1.0
    if args.memory is not None:
        raise ValueError(f"--memory {args.memory:g} and --card {args.card} both say what a rank has; give one of them")
    if asked is not None and not 0 < asked <= 1:
        raise ValueError(f"--gpu_memory_utilization {asked:g} must be above 0 and at most 1")
    return card(args.card), 0.9 if asked is None else asked


def _print_card(model: ModelConfig, config: EngineConfig, device: Card, memory: int, batch: int, length: int) -> None:
    """What such cards hold and how fast they can be, at some world sizes and at the run's own."""
    print("      weights(GiB)  working(GiB)  KV tokens  decode at most(tokens/s)           prefill at most(tokens/s)")
    for tp in sorted({1, 2, 4, 8, config.tp}):
        if tp != config.tp and tp > model.num_heads:
            continue
        asked = replace(config, tp=tp) if tp == config.tp else replace(config, tp=tp, moe_ep=-1, moe_tp=-1)
        try:
            grid = resolve(asked, model, 1, cuda=False).grid()
        except ValueError as error:
            print(f"tp {tp:<2} {error}")
            continue
        rows = shares(model, grid, config.dtype, expanded=True)
        working = [working_bytes(model, s, config.dtype, STEP_TOKENS) for s in rows]
        spare = min(memory - s.weight_bytes - step for s, step in zip(rows, working, strict=True))
        per_token = max(s.kv_bytes_per_token for s in rows)
        sizes = f"tp {tp:<2} {max(s.weight_bytes for s in rows) / 2**30:12.2f}  {max(working) / 2**30:12.2f}"
        if spare < per_token:
            print(f"{sizes}  does not fit")
            continue
        held = loads(model, grid, config.dtype)
        many = min(batch, spare // (per_token * length))
        speeds = f"{decode_limit(bytes_read(model, held, 1), 0, device, 1):.0f}"
        if many:
            together = decode_limit(bytes_read(model, held, many), length * per_token, device, many)
            speeds += f"; {together:.0f} for {many} x {length} tokens"
        print(f"{sizes}  {spare // per_token:9}  {speeds:33}  {prefill_limit(model, held, device):.0f}")


def _print_nodes(model: ModelConfig, dtype: str, rows: list[RankShare], nodes: list[range], memory: int, batch: int) -> None:
    print("            ranks  weights(bytes)  working(bytes)  KV(bytes/token)  ranks' memory(GiB)")
    for number, ranks in enumerate(nodes):
        here = [rows[rank] for rank in ranks]
        weights, kv = sum(s.weight_bytes for s in here), sum(s.kv_bytes_per_token for s in here)
        working = sum(working_bytes(model, s, dtype, STEP_TOKENS) for s in here)
        print(f"node {number:<3} {_span(ranks):>8}  {weights:14}  {working:14}  {kv:15}  {len(ranks) * memory / 2**30:18.2f}")
    calls, size = 1 + 2 * model.num_layers, batch * model.hidden_size * SUM_BYTES
    print(
        f"across hosts in a decode step of {batch} sequences: {calls} all_reduce of {size} bytes (summed in float32) and one "
        f"all_gather of {batch * PAIR_BYTES} bytes a rank"
    )
    for name, crossing in crossings(model, nodes, batch).items():
        print(f"  {name + ':':13} each host sends {crossing.sent} bytes, in {crossing.rounds} messages one after the other")


def _experts(model: ModelConfig, grid: Grid) -> str:
    return f" (moe_ep {grid.moe_ep}, moe_tp {grid.moe_tp}, {model.moe.num_experts} experts)" if model.moe else ""


def _span(heads: range) -> str:
    return f"{heads.start}-{heads.stop - 1}"


def main(argv: list[str] | None = None) -> int:
    return run(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())

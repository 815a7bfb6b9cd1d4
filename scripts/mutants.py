"""Changes the code in ways that break it, one at a time, and checks that the tests notice each: `make mutants [ONLY=text]`.

A mutant is a list of replacements, each of which must find its text exactly once. It is applied to a copy of the tree; the
tests named with it run there and must fail. A mutant that survives, or whose text is no longer found, ends this script with
exit code 1.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("collectives", "launch", "qtp", "tests", "scripts", "pyproject.toml", "setup.py")
PARITY = ("tests/loopback/test_parity.py",)
BATCHING = ("tests/loopback/test_batching.py",)
SHM = ("tests/conformance/test_shm.py",)
PROCESSES = "tests/conformance/test_processes.py::test_backend[{}]"
NATIVE, HIERARCHICAL, CHANNEL = "collectives/native/", "collectives/hierarchical.py", "qtp/wire/channel.py"


@dataclass(frozen=True, slots=True)
class Change:
    """One replacement in a file."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...] = PARITY


def mutant(name: str, file: str, old: str, new: str, tests: tuple[str, ...] = PARITY) -> Mutant:
    return Mutant(name, (Change(file, old, new),), tests)


QWEN2, MOE_MODEL, MOE = "qtp/models/qwen2.py", "qtp/models/qwen2_moe.py", "qtp/layers/moe.py"
SPLIT, BATCH, EMBED = "qtp/layout/split.py", "qtp/batch.py", "qtp/layers/embedding.py"
SAMPLING, ATTENTION, SCHEDULER = "qtp/worker/sampling.py", "qtp/attention/torch_backend.py", "qtp/engine/scheduler.py"
ENGINE, ROPE, LOADER = "qtp/engine/engine.py", "qtp/layers/rope.py", "qtp/weights/loader.py"

MUTANTS = (
    mutant("the reduce after attention dropped", QWEN2, "self.reduce(self.attention(self.input_norm(x_TD), step))",
           "self.attention(self.input_norm(x_TD), step)"),
    mutant("the reduce after the feed-forward dropped", QWEN2, "self.reduce(self.feed_forward(self.post_norm(x_TD)))",
           "self.feed_forward(self.post_norm(x_TD))"),
    mutant("the reduce after the feed-forward doubled", QWEN2, "self.reduce(self.feed_forward(self.post_norm(x_TD)))",
           "self.reduce(self.reduce(self.feed_forward(self.post_norm(x_TD))))"),
    mutant("the reduce after attention doubled", QWEN2, "self.reduce(self.attention(self.input_norm(x_TD), step))",
           "self.reduce(self.reduce(self.attention(self.input_norm(x_TD), step)))"),
    Mutant("the shared expert reduced apart, then again with the routed ones", (
        Change(MOE_MODEL, 'moe(config.moe, shard, f"layers.{i}.moe")', '_apart(moe(config.moe, shard, f"layers.{i}.moe"), place)'),
        Change(MOE_MODEL, "def moe(", "def _apart(moe, place):\n    shared = moe.shared\n"
               "    moe.shared = lambda x: place.comm.all_reduce(shared(x))\n    return moe\n\n\ndef moe("),
    )),
    Mutant("the shared expert reduced apart and the routed ones too: right sums, a third reduce", (
        Change(MOE_MODEL, 'moe(config.moe, shard, f"layers.{i}.moe")', '_apart(moe(config.moe, shard, f"layers.{i}.moe"), place)'),
        Change(MOE_MODEL, "def moe(", "def _apart(moe, place):\n    shared = moe.shared\n"
               "    moe.shared = lambda x: place.comm.all_reduce(shared(x)) / place.grid.size\n    return moe\n\n\ndef moe("),
    ), ("tests/loopback/test_reduces.py",)),
    mutant("a bias added on every rank", SPLIT, "range(n if rank == 0 else 0) for n in shape", "range(n) for n in shape",
           ("tests/loopback/test_row_bias.py",)),
    mutant("a KV head off by one", SPLIT, "return _along(self.dim, shape, _scaled(self.heads.kv(rank, grid), shape[self.dim] // self.heads.kv_heads))",
           "kv = self.heads.kv(rank, grid)\n        more = kv.stop < self.heads.kv_heads\n"
           "        kv = range(kv.start + more, kv.stop + more)\n"
           "        return _along(self.dim, shape, _scaled(kv, shape[self.dim] // self.heads.kv_heads))"),
    mutant("a query reads the KV head of its neighbour", "qtp/worker/worker.py", "tuple(h // group - kv.start for h in query)",
           "tuple(min((h + 1) // group - kv.start, len(kv) - 1) for h in query)"),
    mutant("the rope position off by one after the first chunk", BATCH, "positions += range(start, stop)",
           "positions += range(start + (start > 0), stop + (start > 0))"),
    mutant("rope turns the wrong way in its second half", ROPE, "second * cos + first * sin", "second * cos - first * sin"),
    mutant("YaRN's attention factor lost", ROPE, "(angles.cos() * self.attention_factor).to(dtype)", "angles.cos().to(dtype)"),
    mutant("the block table of a neighbour", BATCH, "tables.append(table[:needed])",
           "tables.append(tables[-1] if tables and len(tables[-1]) == needed else table[:needed])", BATCHING),
    mutant("a KV slot off by one at a block's end", BATCH, "table[p // block_size] * block_size + p % block_size",
           "table[p // block_size] * block_size + min(p % block_size, max(0, block_size - 2))", BATCHING),
    mutant("top-k expert weights normalised against the config", MOE, "if self.norm_topk_prob:", "if not self.norm_topk_prob:"),
    mutant("the shared expert's gate lost", MOE, "torch.sigmoid(self.shared_gate(x_TD)) * self.shared(x_TD)", "self.shared(x_TD)"),
    mutant("the vocabulary shift of the embedding lost", EMBED, "local = token_ids_T - self.start", "local = token_ids_T"),
    mutant("the vocabulary shift of the logits lost", SAMPLING, "(columns + self.start)", "columns"),
    mutant("a sliding window one token too long", ATTENTION, "(at <= rows) & (at > rows - window)", "(at <= rows) & (at >= rows - window)"),
    mutant("a sliding window one token too short in decode", ATTENTION, "(at < lens) & (at >= lens - window)",
           "(at < lens) & (at > lens - window)"),
    mutant("a padded decode sequence sees the padding", ATTENTION, "if not plan.even_lens or (", "if (", BATCHING),
    mutant("a dense layer taken for a sparse one", "qtp/config.py", "(i + 1) % step == 0", "i % step == 0"),
    mutant("a part of a packed tensor laid over the one before", LOADER, "        row += rows\n", ""),
    mutant("blocks freed twice over: a sequence keeps its table after preemption", SCHEDULER, "        s.blocks = []\n", "", BATCHING),
    mutant("a preempted sequence forgets what it had sampled", SCHEDULER, "token_ids=tuple(s.tokens)",
           "token_ids=tuple(s.request.prompt_ids)", BATCHING),
    mutant("a draw that depends on the company", SAMPLING, "Random((spec.seed << 32) + index)", "Random((spec.seed << 32) + index + s.blocks[0])",
           ("tests/loopback/test_sampling.py",)),
    mutant("frequency penalty counts the prompt", SAMPLING, "Counter(s.output_ids)", "Counter(s.token_ids)",
           ("tests/loopback/test_sampling.py", "tests/loopback/test_draws.py")),
    mutant("a stop text is missed across a token boundary", "qtp/engine/detokenize.py", "max(0, known - len(stop) + 1)", "known",
           ("tests/loopback/test_sampling.py", "tests/unit")),
    mutant("an aborted sequence keeps its blocks", ENGINE, "                self.scheduler.finish(s)\n        self._forget", "        self._forget", BATCHING),
    mutant("shared memory: one slot a rank instead of two", NATIVE + "group.hpp", "2 + (step & 1)) * shape_", "2) * shape_", SHM),
    mutant("shared memory: each rank adds its own input first", NATIVE + "group.cpp", "inputs_[r] = r == me ? x : of(int(r));",
           "inputs_[(r + n - me) % n] = r == me ? x : of(int(r));", SHM),
    mutant("shared memory: a dead peer is not looked for", NATIVE + "group.cpp", "ended(watched_[r], pids_[r]);", "false;",
           ("tests/conformance/test_processes.py::test_a_killed_peer_ends_the_wait[shm]",)),
    mutant("hosts do not add each other's sums", HIERARCHICAL, "self._leaders.all_reduce(dense)", "pass",
           (PROCESSES.format("hierarchical/0112-plain-4-all_reduce"),)),
    mutant("halves travel between hosts as halves", HIERARCHICAL, "x.to(wide, memory", "x.to(x.dtype, memory",
           (PROCESSES.format("hierarchical/0112-plain-4-halves_are_rounded_once"),)),
    mutant("ranks gathered in the order of the hosts", HIERARCHICAL, "if order == sorted(order):", "if order:",
           (PROCESSES.format("hierarchical/0102-plain-3-all_gather"),)),
    mutant("an abort does not reach a gloo rank that waits", "collectives/torch_group.py", "        self._aborted.set()\n", "",
           ("tests/conformance/test_processes.py::test_an_abort_ends_the_wait_within_a_second[gloo]",)),
    mutant("any token opens the control channel", "qtp/wire/frames.py",
           "hmac.compare_digest(_read(peer, len(expected), lambda: None), expected)",
           "bool(_read(peer, len(expected), lambda: None))", ("tests/unit/test_wire_channel.py",)),
    mutant("the death of rank 0 is told nobody", CHANNEL, "        if not self._closed:\n            lost(cause)", "        pass",
           ("tests/unit/test_wire_channel.py",)),
    mutant("pings are answered only between steps", CHANNEL, "self.send(pong())", "self._messages.put(message)",
           ("tests/unit/test_wire_channel.py",)),
    mutant("of ranks that hang the foremost is blamed", "launch/watch.py", "late = min(signs", "late = max(signs",
           ("tests/unit/test_watch.py",)),
    mutant("all ranks are bound to the cores of rank 0", "qtp/worker/joining.py", "affinity.share(comm.rank,", "affinity.share(0,",
           ("tests/processes/test_llm_processes.py",)),
)  # fmt: skip


def survives(change: Mutant) -> str | None:
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
        if any(edit.file.startswith(NATIVE) for edit in change.changes):
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
            built = subprocess.run(build, cwd=tree, capture_output=True, text=True, check=False)
            if built.returncode or "failed" in built.stderr:
                return f"it does not compile: {built.stderr[-300:]}"
        code = run_tests(tree, change.tests)
        return None if code == 1 else f"the tests ended with exit code {code} ({', '.join(change.tests)})"


def run_tests(tree: Path, tests: tuple[str, ...]) -> int:
    """Pytest's exit code in `tree`: 0 all passed, 1 some failed, anything else is no verdict (-1: it took too long)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--timeout", "120", *tests]
    environment = {"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=900).returncode
    except subprocess.TimeoutExpired:
        return -1


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="mutants whose name contains this")
    p.add_argument("--jobs", type=int, default=2)
    args = p.parse_args()
    chosen = [m for m in MUTANTS if args.only in m.name]
    needed = tuple(sorted({test for m in chosen for test in m.tests}))
    if run_tests(ROOT, needed) != 0:
        print("the tests fail without any mutant; mend that first")
        return 1
    alive = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for m, problem in zip(chosen, pool.map(survives, chosen), strict=True):
            alive += problem is not None
            print(f"{'SURVIVED' if problem else 'killed  '}  {m.name}{f': {problem}' if problem else ''}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())

"""Changes the code in ways that break it, one at a time, and checks that the tests notice each: `make mutants [ONLY=text]`.

A mutant is a list of replacements, each of which must find its text exactly once. It is applied to a copy of the tree; the
tests named with it run there and must fail. A mutant that survives, or whose text is no longer found, ends this script with
exit code 1. Mutants of code for an instruction set that this processor lacks are named and left out.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qtp.kernels.extension import native

ROOT = Path(__file__).parents[1]
COPIED = ("collectives", "launch", "qtp", "tests", "scripts", "pyproject.toml", "setup.py")
PARITY = ("tests/loopback/test_parity.py",)
BATCHING = ("tests/loopback/test_batching.py",)
DETERMINISTIC = ("tests/loopback/test_deterministic.py",)
KERNEL_TESTS = ("tests/unit/test_native_kernels.py",)
ATTENTION_TESTS = ("tests/unit/test_native_attention.py",)
LAYOUT = ("tests/unit/test_layout.py",)
SHM = ("tests/conformance/test_shm.py",)
QUANTIZING = "tests/golden/test_quantize_demo.py::test_{}"
PROCESSES = "tests/conformance/test_processes.py::test_backend[{}]"
NATIVE, KERNELS, HIERARCHICAL, CHANNEL = (
    "collectives/native/",
    "qtp/kernels/native/",
    "collectives/hierarchical.py",
    "qtp/wire/channel.py",
)


@dataclass(frozen=True, slots=True)
class Change:
    """One replacement in a file."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """isa: the instruction set without which the changed code does not run; see `native.isas`."""

    name: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...] = PARITY
    isa: str = "baseline"


def mutant(name: str, file: str, old: str, new: str, tests: tuple[str, ...] = PARITY, isa: str = "baseline") -> Mutant:
    return Mutant(name, (Change(file, old, new),), tests, isa)


QWEN2, MOE_MODEL, MOE = "qtp/models/qwen2.py", "qtp/models/qwen2_moe.py", "qtp/layers/moe.py"
SPLIT, BATCH, EMBED = "qtp/layout/split.py", "qtp/batch.py", "qtp/layers/embedding.py"
SAMPLING, ATTENTION, SCHEDULER = "qtp/worker/sampling.py", "qtp/attention/torch_backend.py", "qtp/engine/scheduler.py"
ENGINE, ROPE, LOADER = "qtp/engine/engine.py", "qtp/layers/rope.py", "qtp/weights/loader.py"
TREE = "collectives/tree.py"
ISAS = native.isas() if native is not None else ()

MUTANTS = (
    mutant("the reduce after attention dropped", QWEN2, "self.reduce(self.attention(x_TD, plan))",
           "self.attention(x_TD, plan)"),
    mutant("the reduce after the feed-forward dropped", QWEN2, "self.reduce(self.feed_forward(x_TD))",
           "self.feed_forward(x_TD)"),
    mutant("the reduce after the feed-forward doubled", QWEN2, "self.reduce(self.feed_forward(x_TD))",
           "self.reduce(self.reduce(self.feed_forward(x_TD)))"),
    mutant("the reduce after attention doubled", QWEN2, "self.reduce(self.attention(x_TD, plan))",
           "self.reduce(self.reduce(self.attention(x_TD, plan)))"),
    Mutant("the shared expert reduced apart, then again with the routed ones", (
        Change(MOE_MODEL, 'moe(config.moe, shard, place, f"layers.{i}.moe", post_norm)', '_apart(moe(config.moe, shard, place, f"layers.{i}.moe", post_norm), place)'),
        Change(MOE_MODEL, "def moe(", "def _apart(moe, place):\n    shared = moe.shared\n"
               "    moe.shared = lambda x: place.comm.all_reduce(shared(x))\n    return moe\n\n\ndef moe("),
    )),
    Mutant("the shared expert reduced apart and the routed ones too: right sums, a third reduce", (
        Change(MOE_MODEL, 'moe(config.moe, shard, place, f"layers.{i}.moe", post_norm)', '_apart(moe(config.moe, shard, place, f"layers.{i}.moe", post_norm), place)'),
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
    mutant("rope turns the wrong way in its second half", ATTENTION, "second * cos + first * sin", "second * cos - first * sin"),
    mutant("rope turns the wrong way in its second half, natively", KERNELS + "attention.inl", "fma(second, c, first * s)",
           "fma(second, c, -(first * s))"),
    mutant("YaRN's attention factor lost", ROPE, "torch.stack((angles.cos(), angles.sin())) * self.attention_factor",
           "torch.stack((angles.cos(), angles.sin()))"),
    mutant("positions of a later piece of the rope's table begin anew", ROPE, "torch.arange(start, start + _PIECE",
           "torch.arange(0, _PIECE", ("tests/unit/test_rope.py",)),
    mutant("the block table of a neighbour", BATCH, "tables.append(table[:needed])",
           "tables.append(tables[-1] if tables and len(tables[-1]) == needed else table[:needed])", BATCHING),
    mutant("a KV slot off by one at a block's end", BATCH, "table[p // block_size] * block_size + p % block_size",
           "table[p // block_size] * block_size + min(p % block_size, max(0, block_size - 2))", BATCHING),
    mutant("top-k expert weights normalised against the config", MOE_MODEL, "config.norm_topk_prob)", "not config.norm_topk_prob)"),
    mutant("the shared expert's gate lost", MOE, "self.scale(self.shared_gate(x_TD), self.shared(x_TD))", "self.shared(x_TD)"),
    mutant("the vocabulary shift of the embedding lost", EMBED, "local = token_ids_T - self.start", "local = token_ids_T"),
    mutant("the vocabulary shift of the logits lost", SAMPLING, "(columns + self.start)", "columns"),
    mutant("a sliding window one token too long", ATTENTION, "(at <= rows) & (at > rows - window)", "(at <= rows) & (at >= rows - window)"),
    mutant("a sliding window one token too long, natively", KERNELS + "attention.inl", "at - int64_t(call.window) + 1", "at - int64_t(call.window)"),
    mutant("a sliding window one token too short in decode", ATTENTION, "(at < lens) & (at >= lens - window)",
           "(at < lens) & (at > lens - window)"),
    mutant("a padded decode sequence sees the padding", ATTENTION, "if not plan.even_lens or (", "if (", BATCHING),
    mutant("a dense layer taken for a sparse one", "qtp/config.py", "(i + 1) % step == 0", "i % step == 0"),
    mutant("a part of a packed tensor laid over the one before", LOADER, "                at = stop\n", "                at = start\n"),
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
    mutant("cuts of 2 and 4 ranks that are not among those of 8", SPLIT,
           "start, stop = part * units // parts, (part + 1) * units // parts",
           "base, more = divmod(units, parts)\n    start = part * base + min(part, more)\n    stop = start + base + (part < more)", LAYOUT),
    mutant("query heads cut freely at every size", SPLIT, "    if parts % 2:\n", "    if parts:\n", LAYOUT),
    mutant("halves of query heads without a look further down", SPLIT, "key=lambda way: way[1])", "key=lambda way: way[1][0])", LAYOUT),
    mutant("leaf cuts not shifted to the rank's box", "qtp/layout/leaves.py", "leaf.stop - held.start for leaf", "leaf.stop for leaf", LAYOUT),
    mutant("ranks added in their order instead of a tree", TREE, "first = 1 << (len(wide) - 1).bit_length() - 1", "first = len(wide) - 1",
           DETERMINISTIC),
    mutant("large tensors left to the backend's order", TREE,
           "whole = self.inner.all_gather(self._own_sum(parts))\n        return x.copy_(whole[: flat.numel()].view(x.shape))",
           "return self.inner.all_reduce(x)", ("tests/conformance/test_tree.py",)),
    mutant("partial sums rounded before they are reduced", "qtp/worker/worker.py", "tree.all_reduce(partial).to(dtype)",
           "tree.all_reduce(partial.to(dtype))", DETERMINISTIC),
    mutant("leaves of a sum added one after the other", KERNELS + "linear.inl", "for (int step = 1; step < leaves; step *= 2)\n"
           "    for (int leaf = 0; leaf + step < leaves; leaf += 2 * step)",
           "for (int step = 1; step < leaves; step += 1)\n    for (int leaf = 0; leaf < 1; ++leaf)", KERNEL_TESTS),
    mutant("a leaf begins where the one before began", KERNELS + "linear_amx.inl", "leaf<R, T>(w + cut,", "leaf<R, T>(w,", KERNEL_TESTS, "amx"),
    mutant("a row's tail is multiplied with what lies behind it", KERNELS + "linear_amx.inl", "for (size_t j = i; j < length; ++j)",
           "for (size_t j = i; j < i + kStep; ++j)", KERNEL_TESTS, "amx"),
    mutant("tokens that do not deal out evenly are left out", KERNELS + "linear.inl", "tokens / tiles + (tile < tokens % tiles)",
           "tokens / tiles", KERNEL_TESTS),
    mutant("a piece of a long row forgets the pieces before", KERNELS + "linear.inl", "if (!piece.first)", "if (false)", KERNEL_TESTS),
    mutant("odd elements keep the bits of their neighbours", KERNELS + "linear.inl", "words & 0xFFFF0000u", "words", KERNEL_TESTS),
    mutant("sums come out in another order", KERNELS + "vectors.inl", "x[side * (i % 4) + i / 4]", "x[i]", KERNEL_TESTS, "avx512"),
    mutant("keys behind the last one are seen", KERNELS + "attention_pairs.inl", "hide(unsure > sure ? unsure : sure, room);", "",
           ATTENTION_TESTS, "avx512bf16"),
    mutant("powers meet the values of the other key of a pair", KERNELS + "attention_pairs.inl",
           "load(v, first + pair, i), load(v, first + pair + kLanes, i)", "load(v, first + pair + kLanes, i), load(v, first + pair, i)",
           ATTENTION_TESTS, "avx512bf16"),
    mutant("the last rows of a weight are left out", KERNELS + "linear.cpp", "share(linear.outputs(), thread, count, kUnit)",
           "share(linear.outputs() / kUnit * kUnit, thread, count, kUnit)", KERNEL_TESTS),
    mutant("of equal logits the last one is taken", KERNELS + "linear.inl", "value[place] = y;\n  index[place] = i;",
           "value[place] = y;\n  index[place] = i + 1 - 1;\n  if (place > 0 && value[place - 1] == y) index[place - 1] = i;", KERNEL_TESTS),
    mutant("an expert's outputs go to the first tokens", KERNELS + "experts.cpp", "sums.get() + order.get()[i].token * width",
           "sums.get() + (i - at) * width", KERNEL_TESTS),
    Mutant("many tokens go to torch in deterministic runs too", (
        Change("qtp/worker/worker.py", "NativeKernels(deterministic=config.deterministic)", "NativeKernels()"),
        Change("qtp/kernels/native_kernels.py", "_MANY[native.isas()[-1]]", "(32,) * 3"),
    ), DETERMINISTIC),
    mutant("partitions of the context merged without their maxima", KERNELS + "attention.inl", "all(*next.most - most)",
           "all(*next.most - *next.most)", ATTENTION_TESTS),
    mutant("a tie at the last candidate is left to chance", "qtp/kernels/torch_kernels.py", "    if len(tied):", "    if False:",
           ("tests/loopback/test_draws.py",)),
    mutant("the best are looked for beyond the tokenizer", SAMPLING, "best(plain, here, self.allowed_here)",
           "best(plain, here, self.sizes[self.comm.rank])", ("tests/loopback/test_draws.py",)),
    mutant("text that ends within a character is held back whole", "qtp/engine/detokenize.py",
           "for end in range(self._seen, self._read, -1):", "for end in (self._seen,):", ("tests/unit/test_engine_parts.py",)),
    mutant("blocks promised twice in one step", SCHEDULER, "            unpromised -= self.pool.needed(len(s.tokens))\n", "",
           ("tests/unit/test_scheduler.py",)),
    mutant("a file that changed while it was read is accepted", LOADER, "    store.check_unchanged()", "    pass",
           ("tests/unit/test_loader.py",)),
    mutant("a vector laid over what follows it", LOADER, "                at = stop\n",
           "                at = stop if len(part.shape) > 1 else at\n", ("tests/unit/test_loader.py",)),
    mutant("quantizing: one scale for all experts", "qtp/quantize/make.py", "after = change.input(seen[linear.own])",
           "after = change.input(seen[linear.own.replace(f'.experts.{linear.expert}.', '.experts.0.')])",
           (QUANTIZING.format("experts_have_scales_of_their_own"),)),
    mutant("quantizing: the sign of an offset", "qtp/quantize/arithmetic.py", "((-low / scale).round() - 128)", "((low / scale).round() - 128)",
           ("tests/unit/test_quantize.py",)),
    mutant("quantizing: the range of the first sample only", "qtp/quantize/observe.py",
           "low=ranges[:, 0].amin(0),\n            high=ranges[:, 1].amax(0),", "low=ranges[0, 0],\n            high=ranges[0, 1],",
           (QUANTIZING.format("ranges_are_those_of_all_samples"),)),
    mutant("quantizing: keys calibrated at short positions only", "qtp/quantize/observe.py", "end = begin + turns", "end = begin + 0 * turns",
           ("tests/unit/test_quantize.py",)),
    mutant("quantizing: more outliers than their share", "qtp/quantize/lowbit.py", "[:budget]]", "[: 2 * budget]]", ("tests/unit/test_quantize.py",)),
    mutant("quantizing: a norm is multiplied by what it should be divided by", "qtp/quantize/smooth.py",
           "rounded = norms[name].float()", "rounded = norms[name].float() * s * s",
           (QUANTIZING.format("smoothing_keeps_the_function_in_float"),)),
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
        if any(edit.file.startswith((NATIVE, KERNELS)) for edit in change.changes):
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
    named = [m for m in MUTANTS if args.only in m.name]
    chosen = [m for m in named if m.isa in ISAS]
    for m in named:
        if m not in chosen:
            print(f"left out  {m.name}: this processor has no {m.isa}")
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

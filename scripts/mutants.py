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
from dataclasses import dataclass
from pathlib import Path

from qtp.kernels.extension import native

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from device_helper import on_device  # noqa: E402

COPIED = ("collectives", "launch", "qtp", "tests", "scripts", "pyproject.toml", "setup.py")
PARITY = ("tests/loopback/test_parity.py",)
BATCHING = ("tests/loopback/test_batching.py",)
DETERMINISTIC = ("tests/loopback/test_deterministic.py",)
KERNEL_TESTS = ("tests/unit/test_native_kernels.py",)
QUANTIZED_TESTS = ("tests/unit/test_quantized_kernels.py",)
FP8_TESTS = ("tests/unit/test_fp8.py",)
TRITON_EXPERT_TESTS = ("tests/unit/test_triton_experts.py",)
TRITON_QUANTIZED_TESTS = "tests/unit/test_triton_quantized.py::test_{}"
TRITON_ATTENTION_TESTS = "tests/unit/test_triton_attention.py::test_{}"
TRITON_LINEAR_TESTS = "tests/unit/test_triton_linear.py::test_{}"
ATTENTION_TESTS = ("tests/unit/test_native_attention.py",)
INT8_TESTS = ("tests/unit/test_int8_attention.py",)
SPARSE_TESTS = ("tests/unit/test_sparse_kernels.py",)
CODEC_TESTS = ("tests/unit/test_codec.py",)
QUANTIZED = ("tests/loopback/test_quantized.py",)
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
CODEC = "qtp/weights/codec.py"
TRITON_EXPERTS, TRITON_QUANTIZED = "qtp/kernels/triton/expert_kernels.py", "qtp/kernels/triton/quantized_kernels.py"
TRITON_ATTENTION, TRITON_LINEAR = "qtp/kernels/triton/attention.py", "qtp/kernels/triton/linear.py"
CUDA_IPC, CUDA_IPC_TESTS = "collectives/cuda_ipc_kernel.py", "tests/conformance/test_cuda_ipc.py::test_{}"
SAMPLING, ATTENTION, SCHEDULER = "qtp/worker/sampling.py", "qtp/attention/torch_backend.py", "qtp/engine/scheduler.py"
ENGINE, ROPE, LOADER = "qtp/engine/engine.py", "qtp/layers/rope.py", "qtp/weights/loader.py"
TREE, FORMATS = "collectives/tree.py", "qtp/weights/formats/"
TORCH_QUANTIZED, NATIVE_QUANTIZED = "qtp/kernels/torch_quantized.py", "qtp/kernels/native_quantized.py"
TRANSFER, CUT = "qtp/reshard/transfer.py", "qtp/reshard/cut.py"
RESHARD, FOLDER = ("tests/unit/test_reshard.py",), ("tests/unit/test_reshard_folder.py",)
ISAS = native.isas() if native is not None else ()

MUTANTS = (
    mutant("the reduce after attention dropped", QWEN2, "self._join(x_TD, self.attention(x_TD, plan))",
           "x_TD.add_(self.attention(x_TD, plan))"),
    mutant("the reduce after the feed-forward dropped", QWEN2, "self._join(x_TD, self.feed_forward(x_TD))",
           "x_TD.add_(self.feed_forward(x_TD))"),
    mutant("the reduce after the feed-forward doubled", QWEN2, "self._join(x_TD, self.feed_forward(x_TD))",
           "self._join(x_TD, self.reduce(self.feed_forward(x_TD)))"),
    mutant("the reduce after attention doubled", QWEN2, "self._join(x_TD, self.attention(x_TD, plan))",
           "self._join(x_TD, self.reduce(self.attention(x_TD, plan)))"),
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
    mutant("a KV head off by one", SPLIT, "return _along(self.dim, shape, _scaled(self.heads.kv(rank, grid), shape[self.dim] // self.heads.kv_heads))",
           "kv = self.heads.kv(rank, grid)\n        more = kv.stop < self.heads.kv_heads\n"
           "        kv = range(kv.start + more, kv.stop + more)\n"
           "        return _along(self.dim, shape, _scaled(kv, shape[self.dim] // self.heads.kv_heads))"),
    mutant("a query reads the KV head of its neighbour", "qtp/worker/worker.py", "tuple(h // group - kv.start for h in query)",
           "tuple(min((h + 1) // group - kv.start, len(kv) - 1) for h in query)"),
    mutant("the rope position off by one after the first chunk", BATCH, "positions += range(start, stop)",
           "positions += range(start + (start > 0), stop + (start > 0))"),
    mutant("rope turns the wrong way in its second half", ATTENTION, "second * cos + first * sin", "second * cos - first * sin"),
    mutant("rope turns the wrong way in its second half, natively", KERNELS + "attention_common.inl", "fma(second, c, first * s)",
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
    mutant("the shared expert's gate lost", MOE, "self.scale(self.shared_gate(normed_TD), self.shared(inner_TD))", "self.shared(inner_TD)"),
    mutant("the vocabulary shift of the embedding lost", EMBED, "local = token_ids_T - self.start", "local = token_ids_T"),
    mutant("the vocabulary shift of the logits lost", SAMPLING, "(columns + self.start)", "columns"),
    mutant("a sliding window one token too long", ATTENTION, "(at <= rows) & (at > rows - window)", "(at <= rows) & (at >= rows - window)"),
    mutant("a sliding window one token too long, natively", KERNELS + "attention_common.inl", "at - int64_t(call.window) + 1", "at - int64_t(call.window)"),
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
           ("tests/loopback/test_sampling.py", "tests/unit/test_engine_parts.py")),
    mutant("an aborted sequence keeps its blocks", ENGINE, "                self.scheduler.finish(s)\n        self._forget", "        self._forget", BATCHING),
    mutant("shared memory: one slot a rank instead of two", NATIVE + "group.hpp", "2 + (step & 1)) * shape_", "2) * shape_", SHM),
    mutant("shared memory: each rank adds its own input first", NATIVE + "group.cpp", "inputs_[r] = r == me ? x : of(int(r));",
           "inputs_[(r + n - me) % n] = r == me ? x : of(int(r));", SHM),
    mutant("shared memory: a dead peer is not looked for", NATIVE + "group.cpp", "ended(watched_[r], pids_[r]);", "false;",
           ("tests/conformance/test_processes.py::test_a_killed_peer_ends_the_wait[shm]",)),
    mutant("a sum does not wait for its peers", CUDA_IPC, "_wait(segment + flag + r * 4, turn, segment, words, timeout, r)", "pass",
           (CUDA_IPC_TESTS.format("a_peer_that_does_not_come_is_named_and_nobody_waits_for_it_again"),)),
    mutant("any turn's flag will do", CUDA_IPC, "if _read(flag) != turn:", "if _read(flag) == 0:",
           (CUDA_IPC_TESTS.format("a_peer_that_does_not_come_is_named_and_nobody_waits_for_it_again"),)),
    mutant("all turns are written to one half", CUDA_IPC, "half = turn & 1", "half = turn & 0", (CUDA_IPC_TESTS.format("a_rank_may_be_one_turn_ahead"),)),
    mutant("a program takes the turn again", CUDA_IPC, "tl.store(turn_ptr, turn)", "pass", (CUDA_IPC_TESTS.format("a_rank_may_be_one_turn_ahead"),)),
    Mutant("cards add in the order from the last to the first", (
        Change(CUDA_IPC, "for r in tl.static_range(SIZE):\n            if r == RANK:", "for r in tl.static_range(SIZE - 1, -1, -1):\n            if r == RANK:"),
        Change(CUDA_IPC, "if r == 0:", "if r == SIZE - 1:"),
    ), (CUDA_IPC_TESTS.format("sums_are_taken_in_the_order_of_the_ranks"),)),
    mutant("parts of a tensor lie where those of another dtype did not", CUDA_IPC, "block, layout = PROGRAM_BYTES // x.element_size(),",
           "block, layout = PROGRAM_BYTES // 4,", (CUDA_IPC_TESTS.format("parts_of_a_slot_belong_to_one_program"),)),
    mutant("a closed communicator forgets that a peer did not come", "collectives/cuda_ipc.py", "if late >= 0 and not aborted", "if False and not aborted",
           (CUDA_IPC_TESTS.format("a_peer_that_does_not_come_is_named_and_nobody_waits_for_it_again"),)),
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
    mutant("keys behind the last one are seen in float32", KERNELS + "attention_narrow.inl", "hide(unsure > sure ? unsure : sure, room);", "",
           ATTENTION_TESTS),
    mutant("two keys of a word change places", KERNELS + "attention_narrow.inl", "{(F)(words << 16), (F)(words & 0xFFFF0000u)}",
           "{(F)(words & 0xFFFF0000u), (F)(words << 16)}", ATTENTION_TESTS),
    mutant("rows that do not deal out evenly are left out", KERNELS + "attention_narrow.inl", "        r += here;\n",
           "        r += rows / parts;\n", ATTENTION_TESTS),
    mutant("powers meet the values of the other key of a pair", KERNELS + "attention_pairs.inl",
           "load(v, first + pair, i), load(v, first + pair + kLanes, i)", "load(v, first + pair + kLanes, i), load(v, first + pair, i)",
           ATTENTION_TESTS, "avx512bf16"),
    mutant("an int8 cache: keys and values have each other's scales", "qtp/attention/native_backend.py",
           "kv = (scales.key_scale, scales.key_offset, scales.value_scale, scales.value_offset)",
           "kv = (scales.value_scale, scales.value_offset, scales.key_scale, scales.key_offset)", INT8_TESTS),
    mutant("an int8 cache: keys have the scales of values in torch", "qtp/kv/cache.py",
           "dequantized(keys, s.key_scale[layer], s.key_offset[layer])", "dequantized(keys, s.value_scale[layer], s.value_offset[layer])",
           INT8_TESTS),
    mutant("an int8 cache: offsets are taken off twice", "qtp/kv/cache.py", "(x.float() - offset) * scale", "(x.float() + offset) * scale",
           INT8_TESTS),
    mutant("an int8 cache: offsets of values have the wrong sign, natively", KERNELS + "attention_common.inl",
           "* scale - load_up_to<F32>(offset + i, n)", "* scale + load_up_to<F32>(offset + i, n)", INT8_TESTS),
    mutant("an int8 cache: offsets are taken off when codes are made", KERNELS + "attention_common.inl", "x / scale + offset, low",
           "x / scale - offset, low", INT8_TESTS),
    mutant("an int8 cache: a query has the key scales of the neighbouring head", KERNELS + "attention_common.inl",
           "s.key_scale + unit.kv_head * call.attention.width",
           "s.key_scale + (unit.kv_head + 1) % call.attention.kv_heads * call.attention.width", INT8_TESTS),
    mutant("an int8 cache: codes have the scales of the neighbouring head", KERNELS + "attention_common.inl",
           "channel = kv_head * a.width", "channel = (kv_head + 1) % a.kv_heads * a.width", INT8_TESTS),
    mutant("an int8 cache: all queries of a group are rounded as the first", KERNELS + "attention_common.inl",
           "n = call.attention.width - i, head = unit.head + place.head", "n = call.attention.width - i, head = unit.head", INT8_TESTS),
    mutant("an int8 cache: the scales of layer 0 in every layer", "qtp/attention/native_backend.py", "self._scales[layer]",
           "self._scales[0]", INT8_TESTS),
    mutant("an int8 cache: the scales of layer 0 in every layer, in torch", "qtp/kv/cache.py",
           "dequantized(values, s.value_scale[layer], s.value_offset[layer])", "dequantized(values, s.value_scale[0], s.value_offset[0])",
           INT8_TESTS),
    mutant("an int8 cache: keys behind the last one are seen", KERNELS + "attention_integers.inl", "x &= (U)~hidden(sight, r, i);", "",
           INT8_TESTS),
    mutant("an int8 cache: powers meet the values of the other key of a pair", KERNELS + "attention_integers.inl",
           "(I)((x & 0xFFFFu) | (y << 16))", "(I)((y & 0xFFFFu) | (x << 16))", INT8_TESTS),
    mutant("an int8 cache: a query that is not a number is as good as any", KERNELS + "attention_integers.inl",
           "top * unit_of_score + sum(finite)", "top * unit_of_score", INT8_TESTS),
    mutant("the last rows of a weight are left out", KERNELS + "linear.cpp", "share(linear.outputs(), thread, count, kUnit)",
           "share(linear.outputs() / kUnit * kUnit, thread, count, kUnit)", KERNEL_TESTS),
    mutant("of equal logits the last one is taken", KERNELS + "linear.inl", "value[place] = y;\n  index[place] = i;",
           "value[place] = y;\n  index[place] = i + 1 - 1;\n  if (place > 0 && value[place - 1] == y) index[place - 1] = i;", KERNEL_TESTS),
    mutant("an expert's outputs go to the first tokens", KERNELS + "experts.cpp", "sums.get() + order.get()[i].token * width",
           "sums.get() + (i - at) * width", KERNEL_TESTS),
    mutant("an input offset is taken off instead of added", KERNELS + "int8_ops.inl", "F y = x / scale + offset;", "F y = x / scale - offset;",
           QUANTIZED_TESTS),
    mutant("half an integer is rounded up", KERNELS + "int8_ops.inl", "return (I)(y + 12582912.0f) - 0x4B400000;",
           "return __builtin_convertvector(y + 128.5f, I) - 128;", QUANTIZED_TESTS),
    mutant("128 times the sum of a row is left in", KERNELS + "int8.inl", "if (Op::shifted) total -= ints_up_to(linear.sums + at, n) << 7;", "",
           QUANTIZED_TESTS, "avx512bf16"),
    mutant("two products saturate", KERNELS + "int8_ops.inl", "_mm256_madd_epi16((__m256i)w, (__m256i)x)",
           "_mm256_srai_epi32(_mm256_madd_epi16(_mm256_adds_epi16(_mm256_mullo_epi16((__m256i)w, (__m256i)x), "
           "_mm256_mullo_epi16((__m256i)w, (__m256i)x)), _mm256_set1_epi16(1)), 1)", QUANTIZED_TESTS, "avx2"),
    mutant("what lies behind a row of int8 counts", KERNELS + "int8_ops.inl", "for (size_t i = 0; i < n; ++i) y[i] = w[i];",
           "for (size_t i = 0; i < n + (n < sizeof(V)); ++i) y[i] = w[i];", QUANTIZED_TESTS),
    mutant("a group ends one column late", KERNELS + "int8.inl", "linear.group - linear.phase : size_t(-1)",
           "linear.group - linear.phase + 1 : size_t(-1)", QUANTIZED_TESTS),
    mutant("a group's offset is added", KERNELS + "int8.inl", "scale * -linear.offset[at]", "scale * linear.offset[at]", QUANTIZED_TESTS),
    mutant("a row of int8 forgets its pieces but the last", KERNELS + "int8.inl", "to[i] = begins ?", "to[i] = true ?", QUANTIZED_TESTS),
    mutant("quant_bias counts in every leaf", NATIVE_QUANTIZED, "[torch.zeros_like(weight.quant_bias)]", "[weight.quant_bias]", QUANTIZED_TESTS),
    mutant("quant_bias counts in every leaf, in torch", TORCH_QUANTIZED, "totals[first_leaf(cuts)] +=", "totals +=", QUANTIZED_TESTS),
    mutant("each rank scales by its own maxima", TORCH_QUANTIZED, "if across is None or across.size == 1:", "if True:", QUANTIZED_TESTS),
    mutant("each rank scales float8 by its own maxima", TORCH_QUANTIZED, "fp8_token_scales(token_maxima(x_TD, across))",
           "fp8_token_scales(token_maxima(x_TD))", FP8_TESTS),
    mutant("a token that rounds to zeros is not a number in float8", TORCH_QUANTIZED, "return torch.where(scales > 0, scales, 1.0)",
           "return scales", FP8_TESTS),
    mutant("what llm-compressor left in float is taken for float8", "qtp/compressed_tensors.py", " and not _among(layer, self.ignore)", "",
           ("tests/unit/test_quantization.py",)),
    mutant("float8 is rounded from a little below", TORCH_QUANTIZED, ".clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)",
           ".clamp_(-FP8_MAX, FP8_MAX).mul_(1 - 2**-6).to(torch.float8_e4m3fn)", FP8_TESTS),
    mutant("float8 weights have the scale of int8 ones", "qtp/quantize/arithmetic.py", "keepdim=True) / FP8_MAX)", "keepdim=True) / 127)", FP8_TESTS),
    mutant("the sums of the last of several programs are lost, in Triton", TRITON_QUANTIZED, "for s in range(SPLIT):", "for s in range(SPLIT - 1):",
           (TRITON_QUANTIZED_TESTS.format("sums_of_several_programs"),)),
    mutant("programs that have arrived are not forgotten, in Triton", TRITON_QUANTIZED, "            tl.store(place, 0)\n", "",
           (TRITON_QUANTIZED_TESTS.format("nothing_else_is_written_or_read"),)),
    mutant("groups begin where a rank does for some tokens, in Triton", TRITON_QUANTIZED, "group * GROUP - PHASE + within_D", "group * GROUP + within_D",
           (TRITON_QUANTIZED_TESTS.format("all_token_counts"),)),
    mutant("inputs are cut off at the point, in Triton", "qtp/kernels/triton/launch.py", "(levels + 12582912.0) - 12582912.0", "levels",
           (TRITON_QUANTIZED_TESTS.format("inputs_are_quantized_as_by_torch"),)),
    mutant("up has the scales of gate, in Triton", TRITON_QUANTIZED, "_scaled(up_NT, N + held_N,", "_scaled(up_NT, held_N,",
           (TRITON_QUANTIZED_TESTS.format("gated"),)),
    mutant("the last block of the vocabulary wins among equals, in Triton", "qtp/kernels/triton/vocabulary.py", "keys_B > most_B", "keys_B >= most_B",
           ("tests/unit/test_triton_vocabulary.py::test_many_blocks_are_merged_in_rounds",)),
    mutant("gate and up of an expert change places, in Triton", TRITON_EXPERTS, "at_N % 2 * F if GATED", "(1 - at_N % 2) * F if GATED", TRITON_EXPERT_TESTS),
    mutant("blocks of pairs begin where those of the expert before end, in Triton", TRITON_EXPERTS, "begin = first // BLOCK_M + e\n",
           "begin = first // BLOCK_M\n", TRITON_EXPERT_TESTS),
    mutant("a full block of pairs is cut one short, in Triton", TRITON_EXPERTS, "tl.minimum(start_B + BLOCK_M, first + count)",
           "tl.minimum(start_B + BLOCK_M - 1, first + count)", TRITON_EXPERT_TESTS),
    mutant("outputs of experts that other ranks hold are added, in Triton", TRITON_EXPERTS, "mask=inside_D & held", "mask=inside_D", TRITON_EXPERT_TESTS),
    mutant("all experts quantize as the first does, in Triton", TRITON_EXPERTS, "tl.load(inputs_ptr + slot * 2), tl.load(inputs_ptr + slot * 2 + 1)",
           "tl.load(inputs_ptr), tl.load(inputs_ptr + 1)", TRITON_EXPERT_TESTS),
    mutant("a token goes to its best expert K times, in Triton", "qtp/kernels/triton/routing.py", 'left_E = tl.where(at_E == best, float("-inf"), left_E)',
           "pass", TRITON_EXPERT_TESTS),
    mutant("parts of a context are added without their maxima, in Triton", TRITON_ATTENTION, "tl.exp2(most_P - tl.max(most_P, axis=0))",
           "tl.exp2(most_P - most_P)", (TRITON_ATTENTION_TESTS.format("any_number_of_parts"),)),
    mutant("parts of a context in which there is nothing are added, in Triton", TRITON_ATTENTION, "((at_P < splits) & (oldest + at_P * share < before))",
           "(at_P < splits)", (TRITON_ATTENTION_TESTS.format("any_number_of_parts"),)),
    mutant("a decoding token does not see itself, in Triton", TRITON_ATTENTION, "            sum_G += 1.0\n", "            most_G += float('-inf')\n",
           (TRITON_ATTENTION_TESTS.format("it_is_attention"),)),
    mutant("a new token's key and value go to the slot before, in Triton", TRITON_ATTENTION, "slot = new_block * block_size + before % block_size",
           "slot = new_block * block_size + tl.maximum(before % block_size - 1, 0)", (TRITON_ATTENTION_TESTS.format("it_is_attention"),)),
    mutant("a sliding window one token too long in decode, in Triton", TRITON_ATTENTION, "begin = oldest + split * share", "begin = tl.maximum(oldest - 1, 0) + split * share",
           (TRITON_ATTENTION_TESTS.format("windows"),)),
    mutant("a sliding window one token too long in prefill, in Triton", TRITON_ATTENTION, "(at[None, :] > position_M[:, None] - window)",
           "(at[None, :] >= position_M[:, None] - window)", (TRITON_ATTENTION_TESTS.format("windows"),)),
    mutant("offsets of int8 values are left in, in Triton", TRITON_ATTENTION, "            o1_GE -= sum_G[:, None] *", "            o1_GE -= 0.0 *",
           (TRITON_ATTENTION_TESTS.format("int8"),)),
    mutant("idle rows of a bucket write to the cache, in Triton", TRITON_ATTENTION, "if (before >= 0) & ((split == 0) | (begin < before)):",
           "if (split == 0) | (begin < before):", (TRITON_ATTENTION_TESTS.format("idle_rows_of_a_bucket"),)),
    mutant("a norm without its eps, in Triton", TRITON_LINEAR, "/ D + eps)", "/ D)", (TRITON_LINEAR_TESTS.format("one_token"),)),
    mutant("up is not divided by the root mean square, in Triton", TRITON_LINEAR, "            up_N /= rms\n", "            pass\n",
           (TRITON_LINEAR_TESTS.format("one_token"),)),
    mutant("up begins one row late, in Triton", TRITON_LINEAR, "(held_N + N)[:, None]", "tl.minimum(held_N + N + 1, 2 * N - 1)[:, None]",
           (TRITON_LINEAR_TESTS.format("one_token"),)),
    mutant("what joins the residual stream replaces it, in Triton", TRITON_LINEAR, "y_N += tl.load(add_ptr + rows_N, mask=inside_N, other=0.0).to(tl.float32)",
           "pass", (TRITON_LINEAR_TESTS.format("joining_is_the_residual_and_the_linear_layer"),)),
    mutant("dummy weights of a rank are those of every rank", "qtp/weights/dummy.py", "{spec.name} {boxes}", "{spec.name}",
           ("tests/unit/test_dummy.py::test_every_tensor_of_a_rank",)),
    mutant("a leaf's first group is its neighbour's", TORCH_QUANTIZED, "first, last = (weight.phase + start) // weight.group,",
           "first, last = (weight.phase + start + 1) // weight.group,", QUANTIZED_TESTS),
    mutant("quantized weights take the original norm", NATIVE_QUANTIZED, "            norm = norm.anti\n", "            pass\n", QUANTIZED_TESTS),
    Mutant("many tokens go to torch in deterministic runs too", (
        Change("qtp/worker/worker.py", "NativeKernels(deterministic=config.deterministic)", "NativeKernels()"),
        Change("qtp/kernels/native_kernels.py", "_MANY[native.isas()[-1]]", "(32,) * 3"),
    ), DETERMINISTIC),
    mutant("partitions of the context merged without their maxima", KERNELS + "attention_common.inl", "all(*next.most - most)",
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
    mutant("int16 sums of codes overflow before they are settled", KERNELS + "sparse.inl", "    group(g + 1);\n    settle();",
           "    group(g + 1);\n    if (g % 4 == 2 || g + 4 > groups) settle();", SPARSE_TESTS, "avx2"),
    mutant("low codes keep the bits of the high ones", KERNELS + "sparse.inl", "_mm256_and_si256(codes, _mm256_set1_epi8(15))", "codes",
           SPARSE_TESTS, "avx2"),
    mutant("an odd group at a row's end is left out", KERNELS + "sparse.inl", "if (g < groups) {", "if (false) {", SPARSE_TESTS, "avx2"),
    mutant("the halves of the last group lie as in a whole one", KERNELS + "sparse.inl", "half = (k - whole + 1) / 2;",
           "half = k - whole < kCodes ? k - whole : kCodes;", SPARSE_TESTS),
    mutant("what lies behind a row is multiplied", KERNELS + "sparse.inl", "__builtin_memset(row + k, 0, kSparseGroup - rest);",
           "__builtin_memset(row + k, 1, kSparseGroup - rest);", SPARSE_TESTS),
    mutant("a wide block is taken for eight less", KERNELS + "sparse.inl", "(wide ? 128 : 8) *", "8 *", SPARSE_TESTS),
    mutant("a row has the outliers of the rows before", KERNELS + "sparse.inl", "running[ends[r]] - running[r > 0 ? ends[r - 1] : 0]",
           "running[ends[r]]", SPARSE_TESTS),
    mutant("tokens behind the first eight have their outliers", KERNELS + "sparse.inl", "tokens.turned + first * sparse.k", "tokens.turned",
           SPARSE_TESTS),
    mutant("columns of four bytes are read as two", KERNELS + "sparse.hpp", "return k <= 65536 ? 2 : 4;", "return 2;", SPARSE_TESTS),
    mutant("joined streams begin where the first one does", CODEC, "entries.append(_numbers(index)[:-1] + at)",
           "entries.append(_numbers(index)[:-1])", CODEC_TESTS),
    mutant("a stream of two scales has that of its first part", "qtp/weights/formats/w8a8sc.py",
           "W8A8SC(*part, scale, offset,", "W8A8SC(*part, *scales[0][1:],", QUANTIZED),
    mutant("all tokens of a reduced sum have the scale of the first", KERNELS + "int8.cpp", "scale + i * scale_stride", "scale",
           QUANTIZED_TESTS),
    mutant("an outlier may be in any column, natively", KERNELS + "sparse.cpp", ">= sparse.k) return", "> 1u << 31) return", CODEC_TESTS),
    mutant("an outlier may be in any column", CODEC, "_require((columns < k).all(),", "_require(True,", CODEC_TESTS),
    mutant("blocks may reach beyond the data", CODEC, "(stream.offsets <= end)", "(stream.offsets >= 0)", CODEC_TESTS),
    mutant("counts of outliers may lie", CODEC, "bad = narrow.blocks[sizes != needed + -needed % ALIGN]", "bad = narrow.blocks[:0]", CODEC_TESTS),
    mutant("the checksum is not looked at", CODEC, "_require(checksum ==", "_require(True or checksum ==", CODEC_TESTS),
    mutant("the last column of an odd row is lost", CODEC, "codes[:, whole : whole + half] = rest & 15",
           "codes[:, whole : whole + half] = 8\n    codes[:, whole : whole + k // 2 - whole // 2] = rest[:, : k // 2 - whole // 2] & 15", CODEC_TESTS),
    mutant("a part keeps the offsets of the whole", CODEC, "entries[first:last] - begin", "entries[first:last]", CODEC_TESTS),
    mutant("a reshard takes rows one too far on", TRANSFER, "range(r.start - b.start, r.stop - b.start) for r, b in zip(inner",
           "range(max(r.start - b.start - 1, 0), max(r.start - b.start - 1, 0) + len(r)) for r, b in zip(inner", RESHARD),
    mutant("columns are written where the rows before ended in the whole tensor", TRANSFER, "                    at[i] += data.nbytes\n",
           "                    at[i] += data.nbytes if len(wanted) == 1 else raw.nbytes // len(wanted)\n", RESHARD),
    mutant("KV heads that several ranks hold are written once only", CUT,
           "for rank, box in enumerate(boxes) if elements(box))", "for rank, box in enumerate(boxes) if elements(box) and box not in boxes[:rank])", RESHARD),
    mutant("experts are stacked from the last to the first", CUT, "for expert in experts for source in expert.sources",
           "for expert in experts[::-1] for source in expert.sources", RESHARD),
    mutant("a stack in a part begins with expert 0", "qtp/weights/mindformers.py", "expert = (first or {}).get(name, 0) + i", "expert = i", RESHARD),
    mutant("checksums are not compared", "qtp/reshard/verify.py", "if x.hexdigest() != file.tensors[name].xxh3:", "if False:", FOLDER),
    mutant("what was done before a kill is believed unseen", TRANSFER, "if known.get(job.name) == [", "if known.get(job.name) or [", FOLDER),
    mutant("config.json is forgotten", "qtp/reshard/reshard.py", '    return {**small, "config.json": content}',
           '    return small', FOLDER),
    mutant("gaps of a copy list go unnoticed", CUT, "if [start for start, _ in places] + [output.size] != [0] + [stop for _, stop in places]:",
           "if output.size < places[-1][1]:", FOLDER),
    mutant("a part of another source is taken", "qtp/weights/parts.py", "if header_digest(path) != file.header:", "if False:", FOLDER),
    mutant("a manifest may be edited", "qtp/weights/manifest.py", 'if content.pop("digest", None) != _digest(content):', 'if not content.pop("digest", None):', FOLDER),
    mutant("parts are read as if they were of any grid", "qtp/weights/checkpoint.py", "if grid is not None and not manifest.is_for(grid):", "if False:", FOLDER),
    mutant("a rank reads from the first part that has it", "qtp/weights/checkpoint.py", "return Parts(folder, manifest, rank)", "return Parts(folder, manifest)", RESHARD),
    mutant("hard links are written through", "qtp/reshard/folder.py", "if found.st_nlink > 1 or (found.st_dev, found.st_ino) in known:", "if False:", FOLDER),
    mutant("quant_bias added on every rank", SPLIT, "if self.once and (columns.start or not columns):", "if False:", QUANTIZED),
    mutant("a bias added on every rank", SPLIT, "if self.once and (columns.start or not columns):", "if False:",
           ("tests/loopback/test_row_bias.py",)),
    mutant("scales of the next group where a rank begins within one", SPLIT, "range(columns.start // self.size,",
           "range(-(-columns.start // self.size),", QUANTIZED),
    mutant("groups counted from where a rank begins", FORMATS + "w8a16.py", "first % linear.group_size if linear.group_size else 0", "0", QUANTIZED),
    mutant("one scale for all experts", FORMATS + "w8a8.py", '        quant_bias = whole_quant_bias(linear, tensors)\n        return [',
           '        quant_bias = whole_quant_bias(linear, tensors)\n        first = __import__("re").sub(r"experts[.]\\d+", "experts.0", linear.own)\n'
           '        deq_scale = tensors.get(f"{first}.deq_scale", deq_scale)\n        return [', QUANTIZED),
    mutant("scales of keys and values swapped in the checkpoint", "qtp/weights/names.py", 'Part(f"{theirs}.{name[0]}_proj.kv_cache_{word}"',
           'Part(f"{theirs}.{dict(k=\'v\', v=\'k\')[name[0]]}_proj.kv_cache_{word}"', QUANTIZED),
    mutant("the offset of an input lost", FORMATS + "w8a8.py", "W8A8(weight[r], scale, offset,", "W8A8(weight[r], scale, 0.0,", QUANTIZED),
    mutant("all parts of a packed layer have the first one's input scale", FORMATS + "w8a8.py",
           "if found and found[-1][1:] == (scale, offset):", "if found:", QUANTIZED),
    mutant("bits of a scale taken for a number", LOADER, ".to(torch.int32).view(torch.float32)", ".to(torch.float32)", QUANTIZED),
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
    mutant("quantizing: more outliers than their share", "qtp/quantize/lowbit.py", "indices[budget:]", "indices[2 * budget :]", ("tests/unit/test_quantize.py",)),
    mutant("quantizing: a norm is multiplied by what it should be divided by", "qtp/quantize/smooth.py",
           "rounded = norms[name].float()", "rounded = norms[name].float() * s * s",
           (QUANTIZING.format("smoothing_keeps_the_function_in_float"),)),
)  # fmt: skip


CPU_ONLY = (NATIVE, KERNELS, "qtp/kernels/native", "qtp/attention/native", "collectives/shm.py", HIERARCHICAL)


def runs_on(change: Mutant, device: str) -> bool:
    """Whether its code and all its tests run on `device`."""
    return device == "cpu" or (on_device(change.tests) and not any(edit.file.startswith(CPU_ONLY) for edit in change.changes))


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

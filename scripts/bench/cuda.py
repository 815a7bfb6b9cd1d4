"""Checks qtp on a CUDA device, then measures it on models of random weights in true shapes, made on the card: a few minutes.

    python scripts/bench/cuda.py [--models qwen2-0.5b qwen2-7b ...] [--batches 1 64] [--prompts 128 4096] [--peers] [--json FILE]

Every figure stands beside its limit, measured in the same run: a copy of 4 GiB (bytes read plus bytes written) for decode, a
bfloat16 product of 8192 x 8192 x 8192 for prefill. decode: tokens a second of whole engine steps, scheduling and sampling
included (median of steps), and of the graph alone; its bytes are those of the weights that a step reads and of the keys and
values at the middle of the decode. --peers: transformers with a static cache and torch.compile, after qtp's own figures.
A model is a name of scripts/make_checkpoint.py, with -w8a8 or -fp8 behind it for these types.
"""

if __name__ != "__main__":  # torch looks for a package of this name, and scripts of this folder import torch
    raise ImportError("scripts/bench/cuda.py is a script")

import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # where another collectives.py is
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from make_checkpoint import MODELS, config_json, tensors

from qtp import LLM, SamplingParams
from qtp.cards import bytes_read, loads

_BLOCK = 128
_HEADROOM = 256  # tokens of context beyond the longest prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """What was asked of a model, and tokens per second: of whole steps, of the graph alone where there is one, at the limit."""

    model: str
    kind: str
    batch: int
    prompt: int
    seen: float
    graph: float | None
    limit: float

    def line(self) -> str:
        graph = "" if self.graph is None else f"{self.graph:10.1f} {self.graph / self.limit:5.2f}"
        return (
            f"{self.model:22} {self.kind:10} {self.batch:3} x {self.prompt:5} {self.seen:10.1f} {self.limit:10.1f} "
            f"{self.seen / self.limit:5.2f} {graph}"
        )


def copy_rate() -> float:
    """Bytes read plus bytes written a second."""
    a = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds(lambda: b.copy_(a))


def product_rate() -> float:
    """Operations a second in bfloat16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b)


def seconds(run: Callable[[], object], rounds: int = 7) -> float:
    """The median of some runs after one, by events."""
    run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def write_config(name: str, folder: Path) -> None:
    """The folder of a model without its weights."""
    base, *_ = name.partition("-w8a8")
    base, fp8, _ = base.partition("-fp8")
    config = config_json(MODELS[base], "bfloat16")
    if fp8:
        config["quantization_config"] = fp8_scheme()
    elif base != name:
        config["quantize"] = "w8a8"
        types: dict[str, Any] = {"model_quant_type": "W8A8"}
        for tensor in tensors(MODELS[base]):
            whole = not tensor.name.endswith("_proj.weight")
            types[tensor.name] = "FLOAT" if whole else "W8A8"
            if not whole:
                own = tensor.name.removesuffix("weight")
                types |= {own + part: "W8A8" for part in ("input_scale", "input_offset", "quant_bias", "deq_scale")}
        (folder / "quant_model_description_w8a8.json").write_text(json.dumps(types))
    (folder / "config.json").write_text(json.dumps(config))


def fp8_scheme() -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@contextmanager
def loaded(name: str, longest: int, batch: int, **choices: Any) -> Iterator[LLM]:
    with tempfile.TemporaryDirectory() as folder:
        write_config(name, Path(folder))
        settings = {"device": "cuda", "dtype": "bfloat16", "load_format": "dummy", "max_num_seqs": batch, **choices}
        budget = {"max_num_batched_tokens": max(8192, longest), "max_model_len": longest + _HEADROOM, "block_size": _BLOCK}
        with LLM(folder, 1, load_tokenizer=False, **budget, **settings) as llm:
            yield llm
    torch.cuda.empty_cache()


def prompts(llm: LLM, batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, llm.model_config.vocab_size, (batch, length), generator=generator).tolist()


def start(llm: LLM, batch: int, length: int) -> tuple[list[int], list[float]]:
    """Requests that go on until they are aborted; all of them have their first token. The seconds of the steps that it took."""
    params = SamplingParams(max_tokens=_HEADROOM, temperature=0.0, ignore_eos=True)
    waiting = {llm.engine.add(prompt, params) for prompt in prompts(llm, batch, length)}
    requests, times = list(waiting), []
    while waiting:
        times.append(timed(llm.engine.advance, waiting))
    return requests, times


def timed(advance: Callable[[], list[Any]], waiting: set[int]) -> float:
    begin = time.perf_counter()
    moved = advance()
    taken = time.perf_counter() - begin
    waiting -= {request.request_id for request in moved}
    return taken


def decode(name: str, llm: LLM, batch: int, length: int, tokens: int, bandwidth: float) -> Figure | None:
    """None where the card has not the KV blocks for all of them at once."""
    if batch * -(-(length + _HEADROOM) // _BLOCK) > llm.config.num_kv_blocks:
        return None
    requests, _ = start(llm, batch, length)
    times = [timed(llm.engine.advance, set()) for _ in range(tokens)][4:]
    model, ranks = llm.model_config, loads(llm.model_config, llm.config.grid(), "bfloat16")
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 2 * (length + tokens // 2)
    read = bytes_read(model, ranks, batch) + batch * kv
    worker, graph = llm.ranks.worker, None
    if worker is not None and worker.graphs is not None:
        graph = batch / seconds(lambda: worker.graphs.replay(batch), 20)  # as the last step left it
    for request in requests:
        llm.engine.abort(request)
    seen = batch / statistics.median(times)
    return Figure(model=name, kind="decode", batch=batch, prompt=length, seen=seen, graph=graph, limit=batch * bandwidth / read)


def prefill(name: str, llm: LLM, length: int, peak: float) -> Figure:
    times = []
    for _ in range(6):
        (request,), steps = start(llm, 1, length)
        llm.engine.abort(request)
        times.append(sum(steps))
    seen = length / statistics.median(times[1:])
    ranks, model = loads(llm.model_config, llm.config.grid(), "bfloat16"), llm.model_config
    part = 1.0 if model.moe is None else model.moe.top_k / model.moe.num_experts
    products = 2 * sum(rank.elements + part * rank.expert_elements for rank in ranks)
    attention = 2 * model.num_layers * model.num_heads * model.head_dim * length  # half of the square, two products
    return Figure(model=name, kind="prefill", batch=1, prompt=length, seen=seen, graph=None, limit=peak / (products + attention))


def check() -> None:
    """That the card gives what torch's own operations give, in float32, graphs and chunks of prompts included; the tests say
    more (pytest --device cuda)."""
    for family in ("qwen2-0.5b", "qwen1.5-moe-a2.7b"):
        shape = {**config_json(MODELS[family], "float32"), "num_hidden_layers": 3, "vocab_size": 4001}
        told = []
        for kernels in ("torch", "triton"):
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "config.json").write_text(json.dumps(shape))
                settings = {"device": "cuda", "dtype": "float32", "load_format": "dummy", "max_num_seqs": 9, "kernels": kernels}
                with LLM(folder, 1, load_tokenizer=False, num_kv_blocks=64, max_num_batched_tokens=200, **settings) as llm:
                    asked = [ids for n in (1, 7, 64, 129, 300) for ids in prompts(llm, 1, n)]
                    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0)
                    plain = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
                    outputs = llm.generate(asked + asked, [params] * 5 + [plain] * 5)
                    told.append([output.outputs[0] for output in outputs])
        a, b = told
        assert [x.token_ids for x in a] == [x.token_ids for x in b], f"{family}: other tokens"
        pairs = [(m, n) for x, y in zip(a[:5], b[:5], strict=True) for m, n in zip(x.logprobs, y.logprobs, strict=True)]
        worst = max(abs(next(iter(m.values())).logprob - next(iter(n.values())).logprob) for m, n in pairs)
        assert worst < 1e-3, f"{family}: logprobs differ by {worst}"
        print(f"check: {family} shape, 3 layers: tokens alike, logprobs within {worst:.1e}", flush=True)


class Transformers:
    """The same model in transformers, its decode step by torch.compile ("reduce-overhead") over a static cache. All that is
    compiled is compiled by the constructor."""

    def __init__(self, name: str, longest: int, tokens: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            write_config(name, Path(folder))
            config = AutoConfig.from_pretrained(folder)
        with torch.device("cuda"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.room, self.tokens = longest + tokens + 8, tokens
        self.step = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)
        self.rates(128)

    @torch.inference_mode()
    def rates(self, length: int) -> tuple[float, float]:
        """Tokens a second of decode and of the prompt, for one sequence."""
        from transformers import StaticCache

        ids = torch.randint(0, self.model.config.vocab_size, (1, length), device="cuda")
        cache = StaticCache(config=self.model.config, max_cache_len=self.room)
        prefills = []
        for _ in range(3):
            cache.reset()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            prefills.append(time.perf_counter() - begin)
        times = []
        for i in range(self.tokens):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            torch.compiler.cudagraph_mark_step_begin()
            position = torch.full((1, 1), length + i, device="cuda")
            out = self.step(token, past_key_values=cache, position_ids=position, use_cache=True)
            token = out.logits[:, -1:].argmax(-1).clone()
            token.item()  # as whoever shows it must
            times.append(time.perf_counter() - begin)
        return 1 / statistics.median(times[4:]), length / statistics.median(prefills)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="*", default=["qwen2-0.5b", "qwen2-7b"])
    p.add_argument("--batches", nargs="*", type=int, default=[1, 64])
    p.add_argument("--prompts", nargs="*", type=int, default=[128, 4096])
    p.add_argument("--tokens", type=int, default=64, help="of each decode")
    p.add_argument("--no-check", action="store_true")
    p.add_argument("--peers", action="store_true")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    if not torch.cuda.is_available():
        print("cuda.py: no CUDA device", file=sys.stderr)
        return 2
    if not args.no_check:
        check()
    bandwidth, peak = copy_rate(), product_rate()
    torch.cuda.empty_cache()
    card = torch.cuda.get_device_name()
    print(
        f"{card}: copies {bandwidth / 1e12:.2f} TB/s, multiplies {peak / 1e12:.0f} TFLOP/s in bfloat16; torch {torch.__version__}"
    )
    print(f"{'model':22} {'':10} batch x prompt   tokens/s      limit ratio  graph alone", flush=True)
    found: list[Figure] = []

    def tell(figure: Figure) -> None:
        found.append(figure)
        print(figure.line(), flush=True)

    for name in args.models:
        begin = time.perf_counter()
        with loaded(name, max(args.prompts), max(args.batches)) as llm:
            print(f"{name}: ready in {time.perf_counter() - begin:.1f} s, {llm.config.num_kv_blocks} KV blocks", flush=True)
            for length in args.prompts:
                for batch in args.batches:
                    figure = decode(name, llm, batch, length, args.tokens, bandwidth)
                    if figure is None:
                        print(
                            f"{name:22} decode     {batch:3} x {length:5} more than {llm.config.num_kv_blocks} KV blocks",
                            flush=True,
                        )
                    else:
                        tell(figure)
            tell(prefill(name, llm, max(args.prompts), peak))
        if args.peers:
            peer = Transformers(name, max(args.prompts), args.tokens)
            for length in args.prompts:
                decoded, prefilled = peer.rates(length)
                for own in [f for f in found if (f.model, f.batch, f.prompt) == (name, 1, length)]:
                    seen = decoded if own.kind == "decode" else prefilled
                    tell(replace(own, kind=f"tf {own.kind}", seen=seen, graph=None))
            del peer
            torch.cuda.empty_cache()
    if args.json:
        limits = {"card": card, "torch": torch.__version__, "copy": bandwidth, "product": peak}
        args.json.write_text(json.dumps({**limits, "figures": list(map(asdict, found))}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes a checkpoint of random weights in the true shape of a published Qwen model.

The files are streamed: whatever the model's size, memory holds one block of random numbers (about 100 MB
while it is drawn) and no whole matrix. A name stands for the base model; QwQ and the 1M models have one form.
"""

import argparse
import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

DEMO_TOKENIZER = Path(__file__).resolve().parent.parent / "qtp" / "demo" / "dense"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
DTYPES = {
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}
ENDOFTEXT = 151643
IM_END = 151645
# A prime, so that no row length divides it: a long matrix repeats the block, but shifted against the rows.
BLOCK_ELEMENTS = 2**24 - 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    count: int
    top_k: int
    width: int
    shared_width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The hyperparameters of one model; `chat` adds the end of a chat turn to what ends generation."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    tied: bool = False
    rope_theta: float = 1e6
    eps: float = 1e-6
    max_positions: int = 32768
    chat: bool = False
    experts: Experts | None = None
    dual_chunk: bool = False


def architecture(sizes: str, **rest: Any) -> Architecture:
    """`sizes` is hidden/intermediate/query heads/KV heads/layers/vocabulary; `rest` the other fields."""
    names = ("hidden", "intermediate", "heads", "kv_heads", "layers", "vocabulary")
    fields: dict[str, Any] = dict(zip(names, map(int, sizes.split("/")), strict=True))
    return Architecture(**fields, **rest)


LONG: dict[str, Any] = {"max_positions": 131072}
MILLION: dict[str, Any] = {
    "rope_theta": 1e7,
    "eps": 1e-5,
    "max_positions": 1010000,
    "chat": True,
    "dual_chunk": True,
}
MODELS = {
    "qwen1.5-0.5b": architecture("1024/2816/16/16/24/151936", tied=True),
    "qwen1.5-1.8b": architecture("2048/5504/16/16/24/151936"),
    "qwen1.5-4b": architecture("2560/6912/20/20/40/151936", rope_theta=5e6),
    "qwen1.5-7b": architecture("4096/11008/32/32/32/151936"),
    "qwen1.5-14b": architecture("5120/13696/40/40/40/152064"),
    "qwen1.5-32b": architecture("5120/27392/40/8/64/152064"),
    "qwen1.5-72b": architecture("8192/24576/64/64/80/152064"),
    "qwen1.5-110b": architecture("8192/49152/64/8/80/152064"),
    "qwen1.5-moe-a2.7b": architecture(
        "2048/5632/16/16/24/151936",
        max_positions=8192,
        experts=Experts(count=60, top_k=4, width=1408, shared_width=5632),
    ),
    "qwen2-0.5b": architecture("896/4864/14/2/24/151936", tied=True, **LONG),
    "qwen2-1.5b": architecture("1536/8960/12/2/28/151936", tied=True, **LONG),
    "qwen2-7b": architecture("3584/18944/28/4/28/152064", **LONG),
    "qwen2-72b": architecture("8192/29568/64/8/80/152064", eps=1e-5, **LONG),
    "qwen2-57b-a14b": architecture(
        "3584/18944/28/4/28/151936",
        experts=Experts(count=64, top_k=8, width=2560, shared_width=20480),
        **LONG,
    ),
    "qwen2.5-0.5b": architecture("896/4864/14/2/24/151936", tied=True),
    "qwen2.5-1.5b": architecture("1536/8960/12/2/28/151936", tied=True, **LONG),
    "qwen2.5-3b": architecture("2048/11008/16/2/36/151936", tied=True),
    "qwen2.5-7b": architecture("3584/18944/28/4/28/152064", **LONG),
    "qwen2.5-coder-7b": architecture("3584/18944/28/4/28/152064"),
    "qwen2.5-14b": architecture("5120/13824/40/8/48/152064", eps=1e-5, **LONG),
    "qwen2.5-32b": architecture("5120/27648/40/8/64/152064", eps=1e-5, **LONG),
    "qwen2.5-72b": architecture("8192/29568/64/8/80/152064", eps=1e-5, **LONG),
    "qwen2.5-7b-1m": architecture("3584/18944/28/4/28/152064", **MILLION),
    "qwen2.5-14b-1m": architecture("5120/13824/40/8/48/152064", **MILLION),
    "qwq-32b": architecture("5120/27648/40/8/64/152064", eps=1e-5, chat=True, **LONG),
    "qwq-32b-preview": architecture("5120/27648/40/8/64/152064", eps=1e-5, chat=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def mlp(prefix: str, hidden: int, width: int) -> Iterator[Tensor]:
    yield Tensor(name=f"{prefix}.gate_proj.weight", shape=(width, hidden))
    yield Tensor(name=f"{prefix}.up_proj.weight", shape=(width, hidden))
    yield Tensor(name=f"{prefix}.down_proj.weight", shape=(hidden, width))


def tensors(model: Architecture) -> Iterator[Tensor]:
    """Every tensor of the checkpoint under its Hugging Face name; a tied model has no lm_head."""
    hidden, head_dim = model.hidden, model.hidden // model.heads
    yield Tensor(name="model.embed_tokens.weight", shape=(model.vocabulary, hidden))
    for index in range(model.layers):
        layer = f"model.layers.{index}"
        yield Tensor(name=f"{layer}.input_layernorm.weight", shape=(hidden,))
        for word, heads in (("q", model.heads), ("k", model.kv_heads), ("v", model.kv_heads)):
            yield Tensor(name=f"{layer}.self_attn.{word}_proj.weight", shape=(heads * head_dim, hidden))
            yield Tensor(name=f"{layer}.self_attn.{word}_proj.bias", shape=(heads * head_dim,))
        yield Tensor(name=f"{layer}.self_attn.o_proj.weight", shape=(hidden, model.heads * head_dim))
        yield Tensor(name=f"{layer}.post_attention_layernorm.weight", shape=(hidden,))
        if model.experts is None:
            yield from mlp(f"{layer}.mlp", hidden, model.intermediate)
            continue
        yield Tensor(name=f"{layer}.mlp.gate.weight", shape=(model.experts.count, hidden))
        for expert in range(model.experts.count):
            yield from mlp(f"{layer}.mlp.experts.{expert}", hidden, model.experts.width)
        yield from mlp(f"{layer}.mlp.shared_expert", hidden, model.experts.shared_width)
        yield Tensor(name=f"{layer}.mlp.shared_expert_gate.weight", shape=(1, hidden))
    yield Tensor(name="model.norm.weight", shape=(hidden,))
    if not model.tied:
        yield Tensor(name="lm_head.weight", shape=(model.vocabulary, hidden))


def config_json(model: Architecture, dtype: str) -> dict[str, object]:
    """config.json in the words that readers of every age take."""
    experts = model.experts
    config: dict[str, object] = {
        "architectures": ["Qwen2ForCausalLM" if experts is None else "Qwen2MoeForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": ENDOFTEXT,
        "eos_token_id": IM_END if model.chat else ENDOFTEXT,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "initializer_range": 0.02,
        "intermediate_size": model.intermediate,
        "max_position_embeddings": model.max_positions,
        "max_window_layers": model.layers,
        "model_type": "qwen2" if experts is None else "qwen2_moe",
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": model.eps,
        "rope_theta": model.rope_theta,
        "sliding_window": model.max_positions,
        "tie_word_embeddings": model.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": model.vocabulary,
    }
    if experts is not None:
        config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": experts.width,
            "norm_topk_prob": False,
            "num_experts": experts.count,
            "num_experts_per_tok": experts.top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": experts.shared_width,
        }
    if model.dual_chunk:
        config["dual_chunk_attention_config"] = {
            "chunk_size": 262144,
            "local_size": 8192,
            "original_max_position_embeddings": 262144,
        }
    return config


def generation_config_json(model: Architecture) -> dict[str, object]:
    return {
        "bos_token_id": ENDOFTEXT,
        "do_sample": False,
        "eos_token_id": [IM_END, ENDOFTEXT] if model.chat else ENDOFTEXT,
        "pad_token_id": ENDOFTEXT,
    }


def shards(wanted: list[Tensor], element_bytes: int, limit_bytes: float) -> list[list[Tensor]]:
    """Cuts the list, in order, into files of at most `limit_bytes`; a larger tensor has a file of its own."""
    files: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in wanted:
        size = tensor.elements * element_bytes
        if files[-1] and filled + size > limit_bytes:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += size
    return files


class RandomBytes:
    """The bytes of every tensor, in one dtype, from one seed.

    A matrix is read round and round from one block of normal(0, 0.02) numbers, drawn once, beginning at an
    offset drawn for each tensor: that is as fast as the disk, and any two tensors differ. Norm weights,
    1 + normal(0, 0.1), and biases, normal(0, 0.1), are drawn afresh. The numbers depend on the seed and on
    the order of the calls.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.block = self._bytes(self._normal(BLOCK_ELEMENTS, 0.02))

    def _normal(self, elements: int, std: float) -> torch.Tensor:
        return torch.randn(elements, generator=self.generator).mul_(std)

    def _bytes(self, values: torch.Tensor) -> np.ndarray:
        return values.to(self.dtype).view(torch.uint8).numpy()

    def pieces(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """The little-endian bytes of `tensor`, row by row, as consecutive uint8 arrays."""
        if len(tensor.shape) == 1:
            values = self._normal(tensor.elements, 0.1)
            yield self._bytes(values if tensor.name.endswith(".bias") else values.add_(1))
            return
        offset = int(torch.randint(BLOCK_ELEMENTS, (), generator=self.generator)) * self.dtype.itemsize
        left = tensor.elements * self.dtype.itemsize
        while left:
            piece = self.block[offset : offset + left]
            yield piece
            left -= len(piece)
            offset = 0


def write_header(file: BinaryIO, wanted: list[Tensor], word: str, element_bytes: int) -> None:
    """A safetensors header: its length in 8 little-endian bytes, then JSON padded to a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in wanted:
        end = start + tensor.elements * element_bytes
        header[tensor.name] = {"dtype": word, "shape": tensor.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(model: Architecture, dtype: str, seed: int, shard_bytes: float, out: Path) -> int:
    """Writes model.safetensors, or numbered files and their index; returns the bytes of all tensors.

    ValueError if the disk has not the room.
    """
    torch_dtype, word = DTYPES[dtype]
    wanted = list(tensors(model))
    total = sum(tensor.elements for tensor in wanted) * torch_dtype.itemsize
    free = shutil.disk_usage(out).free
    if total > free:
        raise ValueError(f"{out} has {free / 1e9:.1f} GB free, {total / 1e9:.1f} GB are needed: try --layers")
    files = shards(wanted, torch_dtype.itemsize, shard_bytes)
    source = RandomBytes(torch_dtype, seed)
    places = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=out.name) as bar:
        for number, part in enumerate(files, 1):
            name = "model" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}"
            with open(out / f"{name}.safetensors", "wb") as file:
                write_header(file, part, word, torch_dtype.itemsize)
                for tensor in part:
                    places[tensor.name] = f"{name}.safetensors"
                    for piece in source.pieces(tensor):
                        file.write(piece.data)
                        bar.update(len(piece))
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(out / "model.safetensors.index.json", index)
    return total


def make(args: argparse.Namespace) -> None:
    """Checks the request, then writes the folder, config.json last. ValueError: the user's mistake."""
    if args.like not in MODELS:
        raise ValueError(f"unknown model {args.like!r}; known: {', '.join(MODELS)}")
    model = MODELS[args.like]
    if args.layers is not None:
        if args.layers < 1:
            raise ValueError(f"--layers {args.layers}: at least 1")
        model = replace(model, layers=args.layers)
    if args.shard_gb <= 0:
        raise ValueError(f"--shard-gb {args.shard_gb}: must be positive")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists and is not an empty folder: name another --out")
    copied = [args.tokenizer / name for name in TOKENIZER_FILES if (args.tokenizer / name).is_file()]
    if not copied:
        raise ValueError(f"no tokenizer files in {args.tokenizer}: name another --tokenizer")
    args.out.mkdir(parents=True, exist_ok=True)
    size = write_weights(model, args.dtype, args.seed, args.shard_gb * 1e9, args.out)
    for path in copied:
        shutil.copyfile(path, args.out / path.name)
    write_json(args.out / "generation_config.json", generation_config_json(model))
    write_json(args.out / "config.json", config_json(model, args.dtype))
    parameters = size // DTYPES[args.dtype][0].itemsize
    print(f"{args.out}: {args.like}, {model.layers} layers, {parameters:,} parameters, {size / 1e9:.2f} GB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", required=True, metavar="NAME", help="a model name, such as qwen2-0.5b")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layers", type=int, metavar="N", help="write only this many layers (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=4, metavar="G", help="GB (10^9 bytes) of a file, at most")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=DEMO_TOKENIZER,
        metavar="DIR",
        help="where tokenizer files are copied from (default: the demo's, whose ids fit every vocabulary)",
    )
    try:
        make(parser.parse_args())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

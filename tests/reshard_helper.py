"""Tiny checkpoints with every shape that a cut can meet, and what the files of a folder hold, read another way."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtp.config import ModelConfig
from qtp.layout.spec import Spec
from qtp.reshard.__main__ import main
from qtp.weights.names import declare

COMMON = {
    "hidden_size": 20,
    "intermediate_size": 37,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_hidden_layers": 2,
    "vocab_size": 53,
    "torch_dtype": "bfloat16",
}
DENSE = {**COMMON, "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
MOE = {
    **COMMON,
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 9,
    "shared_expert_intermediate_size": 11,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}
BESIDE = {"tokenizer.json": '{"a": 1}\n', "merges.txt": "a b\n", "generation_config.json": '{"eos_token_id": 3}\n'}


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers that differ between tensors and elements; of floats the bits of small random numbers, and some of them NaN."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, shape, generator=generator).to(dtype)
    x = torch.randn(shape, generator=generator)
    x[torch.rand(shape, generator=generator) < 0.01] = torch.nan
    return x.to(dtype)


def contents(specs: tuple[Spec, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    return {part.name: noise(part.shape, dtype, seed) for seed, part in enumerate(p for spec in specs for p in spec.parts)}


def write_checkpoint(
    folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, **more: Tensor
) -> dict[str, Tensor]:
    """A Hugging Face folder of random bfloat16 weights, in two files and an index; `more`: tensors beyond those of the model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    whole = {**contents(declare(ModelConfig.from_dict(config)), torch.bfloat16), **more}
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[i * 2 // len(whole)] for i, name in enumerate(whole)}
    for file in names:
        save_file({n: x for n, x in whole.items() if weight_map[n] == file}, str(folder / file), metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return whole


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder, by the library."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = load_file(str(file))
        assert not found.keys() & content.keys()
        found.update(content)
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Names, dtypes, shapes and bits."""
    if a.keys() != b.keys():
        return False
    return all((x.dtype, x.shape) == (b[n].dtype, b[n].shape) and bits(x) == bits(b[n]) for n, x in a.items())


def bits(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def reshard(source: Path, target: Path, *flags: object) -> Path:
    assert main(["--model", str(source), "--save_directory", str(target), *map(str, flags)]) == 0
    return target

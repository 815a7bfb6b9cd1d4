"""Proves that checkpoints of every quantized type give the numbers of the documented arithmetic, at any world size.

Logits in float32 are within 1e-4 (relative) of a plain float64 computation, dense and MoE; those of a dense
model whose linear layers are all W8A8 are the same bits at every world size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models_helper import random_ids, run_workers
from tests.quantized_helper import float_checkpoint, quantized_checkpoint

TOKENS = 12
MARGIN = 5e-5  # of an integer, several times what float32 errs here
WORLDS = (1, 2, 3, 4, 8)


def presets(layer: str) -> str:
    """What the public presets leave in float."""
    return "FLOAT" if "down_proj" in layer or layer == "lm_head" else ""


def mixed(layer: str) -> str:
    """Parts of one packed layer in different types, a whole block in float, whole and single experts."""
    if ".layers.1.self_attn" in layer or layer.endswith(("1.mlp.gate_proj", "experts.2.up_proj")):
        return "FLOAT"
    if layer.endswith(("0.self_attn.k_proj", "0.mlp.down_proj", "experts.1.down_proj")):
        return "W8A16"
    return "W8A8_DYNAMIC" if layer.endswith(("0.self_attn.v_proj", "experts.3.up_proj", "shared_expert.down_proj")) else ""


@dataclass(frozen=True, kw_only=True)
class Case:
    kind: str
    how: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


CASES = {
    "w8a8": Case(kind="W8A8"),
    "w8a8-presets": Case(kind="W8A8", how={"choose": presets, "old": True}),
    "w8a8-anti": Case(kind="W8A8", how={"anti": True}),
    "w8a8-anti-mixed": Case(kind="W8A8", how={"anti": True, "choose": lambda n: "FLOAT" if n.endswith("v_proj") else ""}),
    "w8a8-mixed": Case(kind="W8A8", how={"choose": mixed}),
    "w8a8s": Case(kind="W8A8S"),
    "dynamic": Case(kind="W8A8_DYNAMIC"),
    "w8a16": Case(kind="W8A16"),
    "w8a16-64": Case(kind="W8A16", how={"group_size": 64}, config={"intermediate_size": 260, "moe_intermediate_size": 140}),
    "w8a16-128": Case(kind="W8A16", how={"group_size": 128}, config={"intermediate_size": 650, "hidden_size": 192}),
    "w8a16-256": Case(kind="W8A16", how={"group_size": 256}, config={"intermediate_size": 700}),
    "kv": Case(kind="FLOAT", how={"kv": "C8"}),
    "kv-w8a8": Case(kind="W8A8", how={"kv": "C8", "old": True, "choose": presets}),
    "fa3": Case(kind="FLOAT", how={"kv": "FAQuant"}),
    "fa3-w8a16": Case(kind="W8A16", how={"kv": "FAQuant"}),
}

Made = Callable[[str, str], tuple[Path, list[int], Tensor]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(folder, ids, their logits in float64) of a family and a case by name; made once, with ids of which no value is rounded
    that lies between two integers."""
    known: dict[tuple[str, str], tuple[Path, list[int], Tensor]] = {}

    def get(family: str, name: str) -> tuple[Path, list[int], Tensor]:
        if (family, name) not in known:
            case, folder = CASES[name], tmp_path_factory.mktemp(f"{family}-{name}")
            sizes = {k: v for k, v in case.config.items() if family == "qwen2_moe" or not k.startswith("moe")}
            source = float_checkpoint(folder / "float", family, 7, **sizes)
            for seed in range(200):
                ids = random_ids(TOKENS, 131, seed)
                plain = quantized_checkpoint(source, folder / "made", case.kind, seed=seed, ids=ids, **case.how)
                logits = plain.logits(ids)
                if plain.margin > MARGIN:
                    break
            else:
                raise AssertionError("no ids without a near tie")
            known[family, name] = folder / "made", ids, logits
        return known[family, name]

    return get


def error(logprobs: Tensor, logits: Tensor) -> float:
    """Of the worst row: relative, of what remains when its mean is taken away (log-probabilities know no more)."""
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (logprobs, logits))
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("tp", WORLDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe"])
def test_the_documented_arithmetic(made: Made, family: str, name: str, tp: int, kernels: str) -> None:
    folder, ids, logits = made(family, name)
    assert error(run_workers(folder, tp, ids, kernels=kernels), logits) < 1e-4


@pytest.mark.parametrize("name", ["w8a8", "w8a16-64", "dynamic"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe"])
def test_deterministic_sums(made: Made, family: str, name: str, tp: int) -> None:
    folder, ids, logits = made(family, name)
    logprobs = run_workers(folder, tp, ids, deterministic=True)
    assert error(logprobs, logits) < 1e-4
    assert torch.equal(logprobs, run_workers(folder, 8, ids, deterministic=True))


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_w8a8_gives_the_same_bits_at_every_world_size(made: Made, dtype: str, kernels: str) -> None:
    folder, ids, _ = made("qwen2", "w8a8")
    one = run_workers(folder, 1, ids, dtype=dtype, kernels=kernels)
    for tp in WORLDS[1:]:
        assert torch.equal(run_workers(folder, tp, ids, dtype=dtype, kernels=kernels), one), tp


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_half_precision(made: Made, name: str, dtype: str) -> None:
    folder, ids, logits = made("qwen2", name)
    assert error(run_workers(folder, 2, ids, dtype=dtype), logits) < 0.15

"""What is refused of a quantized checkpoint before anything runs: data that disagree with the description or cannot be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_helper import run_workers
from quantized_helper import float_checkpoint, quantized_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtp.config import ModelConfig
from qtp.layout.spec import FLOAT8
from qtp.layout.split import Grid
from qtp.weights.names import declare

IDS = [3, 1, 4, 1, 5, 9]
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_checkpoint(tmp_path_factory.mktemp("float"), "qwen2", 7)


def refused(source: Path, folder: Path, kind: str, edit: Callable[[dict[str, Tensor]], object], named: str, **how: Any) -> None:
    quantized_checkpoint(source, folder, kind, seed=1, ids=IDS, **how)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=named) as error:
        run_workers(folder, 1, IDS)
    assert "\n" not in str(error.value)


def put(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    """The last value of a tensor."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return edit


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("W8A8", f"{Q}.input_scale"),
        ("W8A8", f"{DOWN}.deq_scale"),
        ("W8A16", f"{K}.weight_scale"),
        ("W8A8_DYNAMIC", f"{DOWN}.weight_scale"),
        ("W8A8_FP8", f"{DOWN}.weight_scale"),
    ],
)
def test_a_scale_that_cannot_be(source: Path, tmp_path: Path, kind: str, name: str, value: float) -> None:
    words = "self_attn.*a scale that is zero, negative or not a number" if "attn" in name else f"{name}: a scale that is zero"
    refused(source, tmp_path, kind, put(name, value), words)


@pytest.mark.parametrize("value", [-129.0, 400.0, float("nan")])
@pytest.mark.parametrize(("kind", "name"), [("W8A8", f"{DOWN}.input_offset"), ("W8A16", f"{DOWN}.weight_offset")])
def test_an_offset_that_cannot_be(source: Path, tmp_path: Path, kind: str, name: str, value: float) -> None:
    refused(source, tmp_path, kind, put(name, value), f"{name}: an offset that is not a number from -128 to 127")


def test_dynamic_weights_are_symmetric(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path, "W8A8_DYNAMIC", put(f"{DOWN}.weight_offset", 1.0), "weight_offset: is not zero")


@pytest.mark.parametrize("kv", ["C8", "FAQuant"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_scale_of_the_cache_that_cannot_be(source: Path, tmp_path: Path, kv: str, value: float) -> None:
    name = f"{K}.kv_cache_scale" if kv == "C8" else "model.layers.0.self_attn.fa_k.scale"
    refused(source, tmp_path, "W8A8", put(name, value), "layer 0 has a key scale of its KV cache that cannot be", kv=kv)


def test_one_scale_for_all_keys(source: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{K}.kv_cache_scale"] = torch.ones(1)

    refused(source, tmp_path, "W8A8", edit, "is one scale for all channels.*quantize the checkpoint again", kv="C8")


def test_one_scale_for_all_keys_repeated(source: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_proj.kv_cache_scale"].fill_(0.03)

    refused(source, tmp_path, "W8A8", edit, "the keys of layer 1 have one scale for all channels", kv="C8")


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        (f"{Q}.weight", torch.ones(192, 96), "has dtype F32, and should have I8"),
        (f"{Q}.weight", torch.full((192, 96), 300, dtype=torch.int16), "has dtype I16, and should have I8"),
        (f"{Q}.deq_scale", torch.ones(191), r"has shape \[191\], but config.json asks for \[192\]"),
        (f"{Q}.deq_scale", torch.full((192,), 2**40), "integers that are no bits of a float32"),
        (f"{Q}.quant_bias", torch.ones(192), "has dtype F32, and should have I32"),
        (f"{Q}.input_scale", torch.ones(2), r"has shape \[2\], but config.json asks for \[1\]"),
        (f"{Q}.input_offset", None, "input_offset is missing"),
        ("lm_head.weight", torch.ones(131, 96), "has dtype F32, and should have I8"),
    ],
)
def test_data_that_are_not_what_is_described(source: Path, tmp_path: Path, name: str, value: Tensor | None, named: str) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    refused(source, tmp_path, "W8A8", edit, named)


def test_float8_takes_a_byte(source: Path, tmp_path: Path) -> None:
    """What the planner counts for one rank is what lies in the file, where all the rest is float32."""
    quantized_checkpoint(source, tmp_path, "W8A8_FP8", seed=1, ids=IDS)
    tensors = load_file(next(tmp_path.glob("*.safetensors")))
    specs, alone = declare(ModelConfig.load(tmp_path)), Grid.of(1)
    assert sum(spec.bytes(0, alone, 4) for spec in specs) == sum(x.nbytes for x in tensors.values())
    halves = [sum(spec.bytes(rank, Grid.of(2), 4) for spec in specs if spec.dtype == FLOAT8) for rank in range(2)]
    assert sum(halves) == sum(x.nbytes for x in tensors.values() if x.dtype == torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2, torch.bfloat16])
def test_float8_of_another_kind(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].float().to(dtype)

    refused(source, tmp_path, "W8A8_FP8", edit, rf"{DOWN}.weight has dtype \w+, and should have F8_E4M3")


def test_a_description_that_is_not_of_the_data(source: Path, tmp_path: Path) -> None:
    quantized_checkpoint(source, tmp_path, "W8A16", seed=1, ids=IDS)
    path = tmp_path / "quant_model_description.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(described | {f"{DOWN}.weight": "W8A8"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"down_proj.input_scale is missing"):
        run_workers(tmp_path, 1, IDS)


def test_groups_of_another_size(source: Path, tmp_path: Path) -> None:
    quantized_checkpoint(source, tmp_path, "W8A16", seed=1, ids=IDS, group_size=64)
    for name in ("config.json", "quant_model_description.json"):
        path = tmp_path / name
        path.write_text(path.read_text(encoding="utf-8").replace('"group_size": 64', '"group_size": 128'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"weight_scale has shape \[192, 2\], but config.json asks for \[192, 1\]"):
        run_workers(tmp_path, 1, IDS)


def test_dynamic_experts_are_not_cut_by_columns(tmp_path: Path) -> None:
    source = float_checkpoint(tmp_path / "float", "qwen2_moe", 7)
    quantized_checkpoint(source, tmp_path / "made", "W8A8_DYNAMIC", seed=1, ids=IDS)
    with pytest.raises(ValueError, match=r"moe_tp 2 cuts the columns of an expert, and W8A8_DYNAMIC"):
        run_workers(tmp_path / "made", 2, IDS, moe_tp=2)


def test_float_and_quantized_experts_under_an_anti_outlier_norm(tmp_path: Path) -> None:
    source = float_checkpoint(tmp_path / "float", "qwen2_moe", 7)

    def some(name: str) -> str:
        return "FLOAT" if "experts.3." in name else ""

    quantized_checkpoint(source, tmp_path / "made", "W8A8", seed=1, ids=IDS, anti=True, choose=some)
    with pytest.raises(ValueError, match=r"layer 0 has an anti-outlier norm, and of its experts some are float"):
        run_workers(tmp_path / "made", 1, IDS)

"""Random weights in place of a checkpoint's: what they are, and that nothing but config.json is needed to run with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_helper import compressed, make
from torch import Tensor

from qtp import LLM, SamplingParams, run_pa
from qtp.config import EngineConfig, ModelConfig
from qtp.layout.split import Grid
from qtp.weights.dummy import dummy
from qtp.weights.names import declare

CPU = torch.device("cpu")
IDS = [[5, 6, 7], [1]]
SIZES: dict[str, Any] = {
    "vocab_size": 68,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float32",
    "eos_token_id": 66,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16}
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}


def bare(folder: Path, family: str) -> Path:
    """A folder with a config.json alone."""
    config = {"architectures": [ARCHITECTURES[family]], "model_type": family, **SIZES, **(MOE if family == "qwen2_moe" else {})}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_weights(folder: Path) -> Path:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return folder


def made(folder: Path, rank: int, tp: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dummy(declare(ModelConfig.load(folder)), rank, Grid.of(tp), dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_tensor_of_a_rank(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of the shapes that a checkpoint's would have; finite, none of it zero, norms about one; another rank has others."""
    folder = bare(tmp_path, family)
    for rank in range(2):
        tensors, specs = made(folder, rank, 2, dtype), declare(ModelConfig.load(folder))
        assert tensors.keys() == {spec.name for spec in specs}
        for spec in specs:
            x = tensors[spec.name]
            assert x.shape == spec.shape(rank, Grid.of(2)), spec.name
            assert x.dtype == dtype
            assert x.isfinite().all()
            assert (x != 0).all()
            near = 1.0 if "norm" in spec.name else 0.0
            assert ((x.float() - near).abs() < 0.2).all(), spec.name
    ranks = [made(folder, rank, 2) for rank in (0, 0, 1)]
    for name in ("layers.0.input_norm.weight", *(["layers.0.moe.router.weight"] if family == "qwen2_moe" else [])):
        assert torch.equal(ranks[0][name], ranks[2][name]), f"{name} is the same on every rank"
    first, again, second = (tensors["embed.weight"] for tensors in ranks)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("family", "case"), [("qwen2", "w8a8"), ("qwen2_moe", "dynamic"), ("qwen2", "w8a16-64"), ("qwen2", "fp8")]
)
def test_quantized_ones_too(family: str, case: str, tmp_path: Path) -> None:
    """Integers of the whole range, scales above zero; and a model of them gives numbers."""
    folder = without_weights(make(family, case, tmp_path)[0])
    tensors, specs = made(folder, 0, 1), declare(ModelConfig.load(folder))
    kinds = {str(x.dtype) for x in tensors.values()}
    assert kinds >= {"torch.float32", "torch.float8_e4m3fn" if case == "fp8" else "torch.int8"}
    for spec in specs:
        x = tensors[spec.name].float()
        assert x.isfinite().all(), spec.name
        assert bool(x.any()) != spec.name.endswith("weight_offset"), spec.name
        if "scale" in spec.name:
            assert (x > 0).all(), spec.name
        if spec.name.endswith("gate_up.weight") and not tensors[spec.name].is_floating_point():
            assert (x.min(), x.max()) == (-128, 127)
    outputs = generated(folder, logprobs=1)
    assert all(abs(step[i].logprob) < 100 for step in outputs for i in step)


def generated(folder: Path, tp: int = 1, **params: Any) -> list[Any]:
    settings = {"device": "cpu", "communicator": "loopback", "load_format": "dummy", "num_kv_blocks": 4, "block_size": 16}
    with LLM(str(folder), tp=tp, load_tokenizer=False, kernels="torch", **settings) as llm:
        assert [ready.bytes_read for ready in llm.ranks.ready] == [0] * tp
        outputs = llm.generate(IDS, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, **params))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4, 4]
    return [step for output in outputs for step in output.outputs[0].logprobs or ()]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_model_runs_without_weight_files(family: str, tp: int, tmp_path: Path) -> None:
    for step in generated(bare(tmp_path, family), tp, logprobs=1):
        assert all(-100 < logprob.logprob < 0 for logprob in step.values())


def test_files_are_needed_without_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors"):
        LLM(str(bare(tmp_path, "qwen2")), tp=1, load_tokenizer=False, device="cpu")


def test_the_main_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--load_tokenizer", "False", "--load_format", "dummy", "--input_ids", "5,6,7", "--max_output_length", "3"]
    folder = str(bare(tmp_path, "qwen2"))
    assert run_pa.main(["--model", folder, "--device", "cpu", "--kernels", "torch", *words]) == 0
    assert "Generate[0] token num: (0, 3)" in capfd.readouterr().out
    assert run_pa.main(["--model", folder, "--load_format", "safetensors", "--input_ids", "5"]) != 0
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "load_format 'safetensors' is unknown; choose auto or dummy" in last


def test_compressed_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    """Their streams are not made of chance."""
    folder = compressed(make("qwen2", "w8a8s", tmp_path / "whole")[0], tmp_path / "small", 1)
    line = r"load_format 'dummy' makes no compressed weights \(layers\..*\); use auto"
    settings = {"device": "cpu", "load_format": "dummy", "load_tokenizer": False}
    with pytest.raises(ValueError, match=line) as refused:
        LLM(str(folder), tp=1, **settings)
    assert "\n" not in str(refused.value)


def test_the_choice_is_checked() -> None:
    with pytest.raises(ValueError, match="load_format 'pt' is unknown; choose auto or dummy"):
        EngineConfig(model="m", load_format="pt")

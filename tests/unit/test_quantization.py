"""What config.json and the description file say of quantization: both forms of it, and all that is refused, in one line each."""

import json
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors_helper import FP8_DYNAMIC, GROUP

from qtp.quantization import Quantization, read_quantization

Q = "model.layers.0.self_attn.q_proj.weight"


def read(folder: Path, config: dict[str, Any], **files: dict[str, Any] | str) -> Quantization | None:
    """files: descriptions by what their names end with; `new` for the one that has no type in its name."""
    for ending, content in files.items():
        name = "quant_model_description" + ("" if ending == "new" else f"_{ending}") + ".json"
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_quantization(folder, config, str(folder / "config.json"))


def test_a_float_checkpoint_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, {"torch_dtype": "bfloat16", "quantize": None, "quantization_config": None}) is None


def test_the_new_description_is_looked_for_first(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {"quantize": "w8a16", "quantization_config": {"group_size": 128}},
        new={"version": "1.0.0", "model_quant_type": "W8A16", "group_size": 128, Q: "W8A16", "lm_head.weight": "FLOAT"},
        w8a16={Q: "W8A8"},
    )
    assert found is not None
    assert (found.word, found.group_size, found.kv_cache, found.stem) == ("w8a16", 128, None, "quant_model_weight_w8a16")
    assert (found.type_of(Q), found.type_of("lm_head.weight")) == ("W8A16", "FLOAT")


def test_the_old_description_and_the_other_key_are_read(tmp_path: Path) -> None:
    found = read(tmp_path, {"quantize": "w8a8", "quantization": {"kv_quant_type": "C8"}}, w8a8={Q: "W8A8"})
    assert found is not None
    assert (found.type_of(Q), found.group_size, found.kv_cache) == ("W8A8", 0, "C8")


def test_only_the_cache_may_be_quantized(tmp_path: Path) -> None:
    found = read(tmp_path, {"quantization_config": {"fa_quant_type": "FAQuant"}}, float={Q: "FLOAT"})
    assert found is not None
    assert (found.word, found.kv_cache, found.stem) == ("float", "FAQuant", "model")


@pytest.mark.parametrize(
    ("config", "description", "named"),
    [
        ({"quantize": "w2a2"}, {}, "quantize 'w2a2' is not supported"),
        ({"quantize": 8}, {}, "quantize 8 is not supported"),
        ({"quantize": "w8a8", "quantization_config": 3}, {}, "quantization_config must be an object"),
        ({"quantization_config": {"quant_method": "gptq"}}, {}, "quant_method 'gptq' is not supported"),
        ({"quantize": "w8a8", "quantization_config": {"group_size": 100}}, {}, "group_size 100 is not supported"),
        (
            {"quantize": "w8a16", "quantization_config": {"group_size": 64}},
            {"group_size": 128},
            "group_size 128 disagrees with 64",
        ),
        ({"quantize": "w8a8"}, {"model_quant_type": "W8A16"}, "model_quant_type 'W8A16' disagrees with quantize 'w8a8'"),
        ({"quantize": "w8a8", "quantization_config": {"kv_quant_type": "C4"}}, {}, "kv_quant_type 'C4' is not supported"),
        ({"quantize": "w8a8", "quantization_config": {"kv_quant_type": "C8"}}, {"fa_quant_type": "FAQuant"}, "not of both"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, config: dict[str, Any], description: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        read(tmp_path, config, new={"version": "1", Q: "W8A8", **description})
    assert "\n" not in str(error.value)


def test_float8_of_llm_compressor_needs_no_description(tmp_path: Path) -> None:
    found = read(tmp_path, {"quantization_config": FP8_DYNAMIC})
    assert found is not None
    assert (found.word, found.stem, found.kv_cache) == ("w8a8_fp8", "model", None)
    assert [found.type_of(name) for name in (Q, "lm_head.weight")] == ["W8A8_FP8", "FLOAT"]
    named = GROUP | {"targets": ["re:.*self_attn", "model.layers.1.mlp.up_proj"]}
    found = read(tmp_path, {"quantization_config": FP8_DYNAMIC | {"config_groups": {"some": named}, "ignore": ["re:.*k_proj"]}})
    assert found is not None
    layers = ("0.self_attn.k_proj", "0.self_attn.o_proj", "1.mlp.up_proj", "11.mlp.up_proj")
    kinds = [found.type_of(f"model.layers.{layer}.weight") for layer in layers]
    assert kinds == ["FLOAT", "W8A8_FP8", "W8A8_FP8", "FLOAT"]


@pytest.mark.parametrize(
    ("settings", "group", "named"),
    [
        ({}, {"weights": GROUP["weights"] | {"strategy": "tensor"}}, "group_0.weights.strategy 'tensor' is not supported"),
        ({}, {"weights": GROUP["weights"] | {"type": "int"}}, "group_0.weights.type 'int' is not supported"),
        ({}, {"weights": "FP8"}, "group_0.weights.num_bits None is not supported"),
        ({}, {"input_activations": None}, "group_0.input_activations.num_bits None is not supported"),
        ({}, {"input_activations": GROUP["input_activations"] | {"dynamic": False}}, "input_activations.dynamic False"),
        ({}, {"output_activations": {"num_bits": 8}}, "group_0.output_activations"),
        ({}, {"format": "nvfp4-pack-quantized"}, "group_0.format 'nvfp4-pack-quantized' is not supported"),
        ({}, {"targets": "Linear"}, "group_0.targets must be a list"),
        ({"format": "pack-quantized"}, {}, "group_0.format 'pack-quantized' is not supported"),
        ({"kv_cache_scheme": {"num_bits": 8}}, {}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "sparsity_config"),
        ({"config_groups": {}}, {}, "has no config_groups"),
        ({"ignore": ["re:("]}, {}, r"ignore has 're:\(', which is no regular expression"),
    ],
)
def test_other_schemes_of_it_are_refused(tmp_path: Path, settings: dict[str, Any], group: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        read(tmp_path, {"quantization_config": FP8_DYNAMIC | {"config_groups": {"group_0": GROUP | group}} | settings})
    assert "\n" not in str(error.value)


def test_a_description_is_needed(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"neither quant_model_description.json nor quant_model_description_w8a8.json is beside it"
    ):
        read(tmp_path, {"quantize": "w8a8"})


@pytest.mark.parametrize("content", ["", "[1]", "{" * 100000])
def test_a_description_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match=r"quant_model_description.json: (not valid JSON|holds a list)"):
        read(tmp_path, {"quantize": "w8a8"}, new=content)


def test_a_layer_that_is_not_described_or_unknown_is_refused(tmp_path: Path) -> None:
    found = read(tmp_path, {"quantize": "w8a8"}, new={Q: "W1A1"})
    assert found is not None
    with pytest.raises(ValueError, match=r"q_proj.weight is of type 'W1A1', which is not supported"):
        found.type_of(Q)
    with pytest.raises(ValueError, match=r"says nothing of lm_head.weight"):
        found.type_of("lm_head.weight")

"""config.json is read as transformers reads it, in older and newer words, and refused in one line where it cannot be served."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qtp.config import EngineConfig, ModelConfig, RopeConfig
from qtp.layers.rope import inverse_frequencies
from qtp.resolve import resolve

BASE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 640,
    "hidden_size": 96,
    "intermediate_size": 130,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
MOE: dict[str, Any] = {
    **BASE,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 48,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}


def read(base: dict[str, Any] = BASE, **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**base, **changes})


def test_every_field_is_where_it_belongs() -> None:
    assert read(rope_theta=1e6, torch_dtype="float16", head_dim=32) == ModelConfig(
        family="qwen2",
        vocab_size=640,
        hidden_size=96,
        intermediate_size=130,
        num_layers=6,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        max_position=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        qkv_bias=True,
        dtype="float16",
        rope=RopeConfig(theta=1e6),
        sliding_window=(None,) * 6,
    )


@pytest.mark.parametrize("base", [BASE, MOE], ids=["qwen2", "qwen2_moe"])
@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ({"torch_dtype": "float16"}, {"dtype": "float16"}),
        ({"torch_dtype": "torch.float32"}, {"dtype": "float32"}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **YARN}},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **YARN}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 16}},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **YARN, "beta_fast": 16.0}},
        ),
        ({"rope_scaling": None}, {}),
        ({"use_sliding_window": False, "sliding_window": 512}, {"sliding_window": None}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 6}),
    ],
    ids=range(8),
)
def test_older_and_newer_words_mean_the_same(base: dict[str, Any], older: dict[str, Any], newer: dict[str, Any]) -> None:
    assert read(base, **older) == read(base, **newer)


def test_older_and_newer_words_of_a_window() -> None:
    older = read(use_sliding_window=True, sliding_window=512, max_window_layers=4)
    types = ["full_attention"] * 4 + ["sliding_attention"] * 2
    newer = read(use_sliding_window=True, sliding_window=512, layer_types=types)
    assert older == newer
    assert newer.sliding_window == (None, None, None, None, 512, 512)


def test_both_words_at_once_are_those_that_transformers_writes() -> None:
    config = read(
        rope_theta=1e4, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, dtype="float16", torch_dtype="float32"
    )
    assert (config.rope.theta, config.dtype) == (1e6, "float16")


def test_defaults() -> None:
    config = read()
    assert (config.rope, config.dtype, config.qkv_bias) == (RopeConfig(theta=10000.0), None, True)
    assert read(MOE, qkv_bias=False).qkv_bias is False
    few = {key: BASE[key] for key in BASE if key not in ("rms_norm_eps", "tie_word_embeddings", "num_key_value_heads")}
    config = ModelConfig.from_dict(few)
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.num_kv_heads, config.head_dim) == (1e-6, False, 6, 16)


@pytest.mark.parametrize(("step", "dense"), [(1, []), (2, []), (3, [1, 5]), (1, [0, 2]), (1, None), (7, [])])
def test_sparse_layers_are_those_of_the_rule(step: int, dense: list[int] | None) -> None:
    config = read(MOE, decoder_sparse_step=step, mlp_only_layers=dense, norm_topk_prob=True)
    assert config.moe is not None
    assert config.moe.layers == {i for i in range(6) if not (i in (dense or []) or (i + 1) % step)}
    assert (config.moe.num_experts, config.moe.top_k, config.moe.norm_topk_prob) == (5, 2, True)
    assert (config.moe.expert_intermediate_size, config.moe.shared_intermediate_size) == (24, 48)


def test_rope_scaling_that_a_user_added_wins_over_rope_parameters() -> None:
    parameters = {"rope_theta": 1e6, "rope_type": "default"}
    added = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(rope_parameters=parameters, rope_scaling=added)
    assert (config.rope.theta, config.rope.factor, config.rope.original_max_position) == (1e6, 4.0, 32768)


@pytest.mark.parametrize("key", ["tie_word_embeddings", "qkv_bias", "use_sliding_window"])
def test_a_switch_that_is_no_boolean_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} is 'false'; true or false is needed"):
        read(**{key: "false"})


def test_a_moe_without_experts_is_dense() -> None:
    config = read(MOE, num_experts=0)
    assert (config.moe, config.family) == (None, "qwen2")


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "architecture": (BASE, {"architectures": ["LlamaForCausalLM"]}, r"LlamaForCausalLM is not supported.*Qwen2ForCausalLM"),
    "no architecture": (BASE, {"architectures": None, "model_type": "llama"}, r"architecture llama is not supported"),
    "nothing at all": (BASE, {"architectures": [], "model_type": None}, r"architecture missing is not supported"),
    "rope type": (BASE, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope type 'dynamic' is not supported"),
    "newer rope type": (BASE, {"rope_parameters": {"rope_type": "llama3"}}, r"rope type 'llama3' is not supported"),
    "rope is a list": (BASE, {"rope_scaling": [4.0]}, r"rope_scaling must be an object"),
    "rope factor": (BASE, {"rope_scaling": {"type": "yarn", "factor": "4"}}, r"factor is '4'"),
    "rope factor 0": (BASE, {"rope_scaling": {"type": "yarn", "factor": 0.0}}, r"factor is 0.0"),
    "rope original": (BASE, {"rope_scaling": {**YARN, "type": "yarn", "original_max_position_embeddings": 0.5}}, r"original_max"),
    "partial rotary": (BASE, {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0.5"),
    "theta": (BASE, {"rope_theta": "1e6"}, r"rope_theta is '1e6'"),
    "theta 0": (BASE, {"rope_theta": 0}, r"rope_theta is 0"),
    "dtype": (BASE, {"dtype": "float8"}, r"dtype 'float8' is not supported; choose float32"),
    "older dtype": (BASE, {"torch_dtype": "torch.float64"}, r"dtype 'float64' is not supported"),
    "kv heads": (BASE, {"num_key_value_heads": 4}, r"num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
    "more kv heads": (BASE, {"num_key_value_heads": 12}, r"num_attention_heads 6 .*num_key_value_heads 12"),
    "head_dim": (BASE, {"hidden_size": 100}, r"hidden_size 100 is not a multiple of num_attention_heads 6"),
    "odd head_dim": (BASE, {"head_dim": 15}, r"head_dim 15 is odd"),
    "hidden_act": (BASE, {"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported"),
    "eps": (BASE, {"rms_norm_eps": 0}, r"rms_norm_eps is 0"),
    "eps text": (BASE, {"rms_norm_eps": "small"}, r"rms_norm_eps is 'small'"),
    "top_k": (MOE, {"num_experts_per_tok": 6}, r"num_experts_per_tok 6 is more than num_experts 5"),
    "top_k 0": (MOE, {"num_experts_per_tok": 0}, r"num_experts_per_tok is 0"),
    "sparse step": (MOE, {"decoder_sparse_step": 0}, r"decoder_sparse_step is 0"),
    "mlp_only_layers": (MOE, {"mlp_only_layers": 3}, r"mlp_only_layers"),
    "layer_types short": (BASE, {"layer_types": ["full_attention"] * 5}, r"layer_types .*6 layers"),
    "layer_types word": (BASE, {"layer_types": ["full_attention"] * 5 + ["chunked"]}, r"layer_types"),
    "layer_types number": (BASE, {"layer_types": 6}, r"layer_types"),
    "window": (BASE, {"sliding_window": "512"}, r"sliding_window is '512'"),
    "max_window_layers": (BASE, {"max_window_layers": "3"}, r"max_window_layers"),
    "dual chunk": (BASE, {"dual_chunk_attention_config": {"chunk_size": 8}}, r"dual_chunk_attention_config"),
    "architectures text": (BASE, {"architectures": "Qwen2ForCausalLM"}, r"architecture"),
    "architectures number": (BASE, {"architectures": 7}, r"architecture"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    base, changes, message = REFUSALS[case]
    window = {"use_sliding_window": True, "sliding_window": 512}
    with pytest.raises(ValueError, match=r"^folder/config.json: .*" + message) as caught:
        ModelConfig.from_dict({**base, **window, **changes}, "folder/config.json")
    assert "\n" not in str(caught.value)


NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NEEDED_MOE = ("moe_intermediate_size", "shared_expert_intermediate_size")


@pytest.mark.parametrize("key", [*NEEDED, *NEEDED_MOE])
def test_a_missing_key_is_named(key: str) -> None:
    for changed in ({k: v for k, v in MOE.items() if k != key}, {**MOE, key: None}):
        with pytest.raises(ValueError, match=f"config.json: {key} is missing"):
            ModelConfig.from_dict(changed)


@pytest.mark.parametrize("value", ["12", 1.5, True, 0, -3, [4], {"n": 4}])
@pytest.mark.parametrize("key", [*NEEDED, *NEEDED_MOE, "num_key_value_heads", "max_position_embeddings", "num_experts_per_tok"])
def test_a_wrong_type_or_value_is_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"config.json: {key} is .*positive integer"):
        ModelConfig.from_dict({**MOE, key: value})


WINDOWS: list[dict[str, Any]] = [
    {"use_sliding_window": use, "sliding_window": window, "max_window_layers": first}
    for use in (True, False)
    for window in (64, None)
    for first in (0, 1, 3, 4, 6, 28)
]


@pytest.mark.parametrize("words", [*WINDOWS, {}, {"use_sliding_window": True, "sliding_window": 7}], ids=repr)
def test_sliding_windows_are_those_of_transformers(words: dict[str, Any]) -> None:
    for base, oracle in ((BASE, Qwen2Config), (MOE, Qwen2MoeConfig)):
        theirs = oracle(**{k: v for k, v in {**base, **words}.items() if k != "architectures"})
        # A window of 0 or None means full attention, whatever the type says.
        expected = [theirs.sliding_window if t == "sliding_attention" else None for t in theirs.layer_types]
        assert list(read(base, **words).sliding_window) == [window or None for window in expected]


def test_given_layer_types_win() -> None:
    types = ["sliding_attention", "full_attention"] * 3
    words = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 6, "layer_types": types}
    for base in (BASE, MOE):
        assert read(base, **words).sliding_window == (9, None) * 3


ROPES: list[dict[str, Any]] = [
    {"factor": 4.0},
    {"factor": 4.0, "original_max_position_embeddings": 32768},
    {"factor": 2.5, "original_max_position_embeddings": 8192, "beta_fast": 24, "beta_slow": 2},
    {"factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False},
    {"factor": 4.0, "original_max_position_embeddings": 2048, "attention_factor": 1.25},
    {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"factor": 4.0, "original_max_position_embeddings": 4096, "mscale": 0.707},
    {"factor": 1.0, "original_max_position_embeddings": 4096},
    {"factor": 4.0, "original_max_position_embeddings": 16},
]


@pytest.mark.parametrize("scaling", ROPES, ids=repr)
@pytest.mark.parametrize(("theta", "head_dim"), [(1e6, 128), (1e4, 64), (5e6, 16)])
def test_yarn_is_that_of_transformers(scaling: dict[str, Any], theta: float, head_dim: int) -> None:
    sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32768}
    plain = {k: v for k, v in BASE.items() if k != "architectures"}
    parameters = {"rope_type": "yarn", "rope_theta": theta, **scaling}
    oracle = Qwen2Config(**{**plain, **sizes, "rope_parameters": dict(parameters)})
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](oracle, torch.device("cpu"))
    rope = read(**sizes, rope_parameters=parameters).rope
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), frequencies, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(("theta", "head_dim"), [(1e6, 128), (1e4, 64)])
def test_plain_rope_is_the_formula(theta: float, head_dim: int) -> None:
    expected = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    found = inverse_frequencies(RopeConfig(theta=theta), head_dim)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


def test_yarn_of_qwen2_has_the_published_numbers() -> None:
    """Factor 4 from 32768 tokens, base 1e6, 128 dimensions a head: the ramp runs from 23 to 40."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = read(head_dim=128, rope_theta=1e6, rope_scaling=scaling).rope
    assert rope.attention_factor == pytest.approx(1.13863, abs=5e-6)
    ratio = inverse_frequencies(rope, 128) * 1e6 ** (torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(ratio[:24], torch.ones(24), rtol=1e-5, atol=0)
    torch.testing.assert_close(ratio[40:], torch.full((24,), 0.25), rtol=1e-5, atol=0)
    inside = torch.tensor([1 - 0.75 * (i - 23) / 17 for i in range(24, 40)])
    torch.testing.assert_close(ratio[24:40], inside, rtol=1e-5, atol=0)


def test_dual_chunk_attention_limits_the_context() -> None:
    config = read(max_position_embeddings=1_010_000, dual_chunk_attention_config={"chunk_size": 262144, "local_size": 8192})
    assert config.max_position == 253952
    assert read(dual_chunk_attention_config={"chunk_size": 262144, "local_size": 8192}).max_position == 4096


def test_load_reads_eos_ids_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "eos_token_id": 7}))
    assert ModelConfig.load(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7, 3]}))
    assert ModelConfig.load(tmp_path).eos_token_ids == (7, 9, 3)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"", b"[" * 200_000])
def test_load_names_a_file_that_is_no_object(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: "):
        ModelConfig.load(tmp_path)


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        ModelConfig.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json: No such file"):
        ModelConfig.load(tmp_path)


def test_more_ranks_than_heads_are_refused() -> None:
    read().check_world(6)
    with pytest.raises(ValueError, match="tp 7 is more than the 6 query heads"):
        read().check_world(7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"block_size": 0}, "block_size 0"),
        ({"max_num_seqs": 0}, "max_num_seqs 0"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens -1"),
        ({"max_model_len": 0}, "max_model_len 0"),
        ({"num_kv_blocks": 0}, "num_kv_blocks 0"),
        ({"threads": 0}, "threads 0"),
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"device": "tpu"}, "device 'tpu'"),
    ],
)
def test_engine_config_refuses(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="x", **words)


def test_a_limit_of_positions_lowers_and_raises_that_of_a_yarn_model() -> None:
    model = read(rope_scaling={**YARN, "type": "yarn"})
    for asked, settled in ((None, 4096), (100, 100), (9000, 9000)):
        config = resolve(EngineConfig(model="m", dtype="float32", max_position_embeddings=asked), model, 1, cuda=False)
        assert config.max_model_len == settled
    with pytest.raises(ValueError, match="max_model_len 101 is beyond the 100 positions"):
        resolve(EngineConfig(model="m", dtype="float32", max_model_len=101, max_position_embeddings=100), model, 1, cuda=False)

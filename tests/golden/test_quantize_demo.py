"""Proves what quantization costs on the demo checkpoints, and what must not change it.

Perplexity on held-out text stays within a limit for each type, dense and MoE; an int8 KV cache keeps the distribution where keys
have outliers a hundred times as large as the rest; what is written does not depend on the number of ranks; experts have scales of
their own; smoothing keeps the function of the model in float.
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qtp
from collectives.communicator import Communicator
from collectives.loopback import loopback
from collectives.solo import Solo
from qtp.config import ModelConfig
from qtp.quantize.evaluate import perplexity
from qtp.quantize.make import Outcome, Source, make
from qtp.quantize.samples import samples, texts
from qtp.quantize.settings import PRESETS, settings, with_preset
from qtp.tokenizer import Tokenizer
from tests.models_helper import run_workers

DEMO = Path(qtp.__file__).parent / "demo"
KV = {"w_bit": 16, "a_bit": 16}
LIMITS: dict[str, tuple[dict[str, Any], float]] = {
    "w8a16": (PRESETS["qwen_w8a16"], 0.001),
    "w8a16-lm_head": ({"a_bit": 16, "group_size": 64, "quantize_lm_head": True}, 0.001),
    "kv8": (PRESETS["qwen_kv8"], 0.002),
    "w8a8": (PRESETS["qwen_w8a8"], 0.01),
    "w8a8-m4": ({"anti_method": "m4", "down_proj": "all", "act_method": 3}, 0.01),
    "dynamic": ({"is_dynamic": True}, 0.005),
    "fp8": (PRESETS["qwen_fp8"], 0.01),
    "fa3": ({**KV, "use_fa_quant": True}, 0.005),
    "w4a8": (PRESETS["qwen_w4a8"], 0.03),
    "w8a8s": (PRESETS["qwencode_w8a8s"], 0.03),
}
SCORED = 2500


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def calibration(folder: Path, asked: bool, count: int = 15) -> list[list[int]]:
    tokenizer = Tokenizer(folder)
    given = texts(None, None, tokenizer)
    return samples(given[:: len(given) // count], tokenizer, 96, 4160) if asked else []


def quantized(source: Path, target: Path, *, comm: Communicator | None = None, count: int = 15, **flags: Any) -> Outcome:
    asked = settings(with_preset(None, flags)[0])
    ids = calibration(source, asked.calibrated, count)
    return make(Source.open(source), target, asked, ids, comm or Solo(torch.device("cpu")), max_bytes=4_000_000)


@pytest.fixture(scope="module")
def base() -> Callable[[str], float]:
    known: dict[str, float] = {}

    def get(name: str) -> float:
        if name not in known:
            known[name] = scored(DEMO / name)
        return known[name]

    return get


def scored(folder: Path) -> float:
    """In float32, so that the rounding of the run is no part of it."""
    ids = Tokenizer(DEMO / "dense").encode((DEMO / "held_out.txt").read_text(encoding="utf-8"))[:SCORED]
    return perplexity(folder, ids, Solo(torch.device("cpu")), dtype="float32").value


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_perplexity_stays(name: str, kind: str, tmp_path: Path, base: Callable[[str], float]) -> None:
    flags, limit = LIMITS[kind]
    more = {"count": 45} if "anti_method" in flags else {}  # what smooths an expert must have seen enough of it
    outcome = quantized(DEMO / name, tmp_path / "made", **flags, **more)
    assert not outcome.unreached
    assert scored(tmp_path / "made") <= base(name) * (1 + limit)


def test_key_bias_outliers_survive_an_int8_cache(tmp_path: Path) -> None:
    source = tmp_path / "float"
    shutil.copytree(DEMO / "dense", source)
    tensors = load_file(source / "model.safetensors")
    for i in range(6):
        bias = tensors[f"model.layers.{i}.self_attn.k_proj.bias"]
        bias[bias.abs().topk(2).indices] *= 100
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantized(source, tmp_path / "c8", count=45, **KV, use_kvcache_quant=True)
    quantized(source, tmp_path / "fa3", **KV, use_fa_quant=True)
    ids = Tokenizer(source).encode((DEMO / "held_out.txt").read_text(encoding="utf-8"))[:400]

    def divergence(folder: Path, tp: int) -> float:
        p, q = (run_workers(where, tp, ids) for where in (source, folder))
        return float((p.exp() * (p - q)).sum(1).mean())

    for tp in (1, 2, 4):
        assert divergence(tmp_path / "c8", tp) < 0.01
    assert divergence(tmp_path / "fa3", 1) > 0.015, "one scale for a whole head is not enough, so this test would notice one"


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_the_same_bytes(size: int, tmp_path: Path) -> None:
    how = {"anti_method": "m4", "use_kvcache_quant": True, "disable_level": "L2", "act_method": 2, "count": 9}
    quantized(DEMO / "moe", tmp_path / "alone", **how)
    with ThreadPoolExecutor(size) as threads:
        work = [threads.submit(quantized, DEMO / "moe", tmp_path / "ranks", comm=c, **how) for c in loopback(size)]
        outcomes = [job.result() for job in work]
    assert len([name for name in outcomes[0].strained if outcomes[0].forms[name] == "FLOAT"]) == 2
    for path in sorted((tmp_path / "alone").iterdir()):
        assert path.read_bytes() == (tmp_path / "ranks" / path.name).read_bytes(), path.name


def test_experts_have_scales_of_their_own(tmp_path: Path) -> None:
    quantized(DEMO / "moe", tmp_path / "made")
    read = {name: x for file in (tmp_path / "made").glob("*.safetensors") for name, x in load_file(file).items()}
    scales = [read[f"model.layers.0.mlp.experts.{e}.gate_proj.input_scale"].item() for e in range(10)]
    assert len(set(scales)) > 5, "two experts may share the token that is largest"
    own = [read[f"model.layers.0.self_attn.{n}_proj.input_scale"].item() for n in "qkv"]
    assert len(set(own)) == 1, "q, k and v have one input"
    description = json.loads((tmp_path / "made" / "quant_model_description.json").read_text(encoding="utf-8"))
    assert {name: description[name] for name in read}.keys() == read.keys()
    assert description["model.layers.0.mlp.gate.weight"] == description["lm_head.weight"] == "FLOAT"


def test_ranges_are_those_of_all_samples(tmp_path: Path) -> None:
    """The same samples in another order give the same scales; one more sample never a smaller range."""
    asked = settings(with_preset(None, {})[0])
    ids = calibration(DEMO / "dense", True, 9)[:8]  # one a lane
    for name, some in (("all", ids), ("turned", ids[::-1]), ("fewer", ids[:1])):
        make(Source.open(DEMO / "dense"), tmp_path / name, asked, some, Solo(torch.device("cpu")))
    all_of, turned, fewer = (
        {k: x for k, x in load_file(tmp_path / n / "quant_model_weight_w8a8.safetensors").items() if k.endswith("input_scale")}
        for n in ("all", "turned", "fewer")
    )
    assert all(torch.equal(all_of[name], turned[name]) for name in all_of)
    assert all(all_of[name] >= fewer[name] for name in all_of)
    assert any(all_of[name] > 1.1 * fewer[name] for name in all_of)


def test_an_expert_without_tokens_is_told_and_usable(tmp_path: Path) -> None:
    source = tmp_path / "float"
    shutil.copytree(DEMO / "moe", source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.gate.weight"][4] = 0
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["num_experts_per_tok"] = 1  # a router row of zeros is never the largest of ten
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    outcome = quantized(source, tmp_path / "made", count=5)
    assert "layers.1.moe.experts.4.gate_up" in outcome.unreached
    assert torch.isfinite(run_workers(tmp_path / "made", 2, [5, 6, 7, 8], dtype="float32")).all()


@pytest.mark.parametrize("method", ["m1", "m3", "m4", "m6"])
def test_smoothing_keeps_the_function_in_float(method: str, tmp_path: Path) -> None:
    """What was written is undone: weights as they are read, behind norms as they are read, are the float model's."""
    how = {"a_bit": 16, "anti_method": method, "down_proj": "all", "disable_names": ["model.layers.1.self_attn.k_proj"]}
    quantized(DEMO / "dense", tmp_path / "made", count=5, **how)
    read = {name: x for file in (tmp_path / "made").glob("*.safetensors") for name, x in load_file(file).items()}
    floats = load_file(DEMO / "dense" / "model.safetensors")

    def weight(name: str) -> torch.Tensor:
        return (read[f"{name}.weight"].float() - read[f"{name}.weight_offset"]) * read[f"{name}.weight_scale"]

    for i in range(2):
        own = f"model.layers.{i}"
        for name, norm in (("self_attn.q_proj", "input_layernorm"), ("mlp.gate_proj", "post_attention_layernorm")):
            before = floats[f"{own}.{name}.weight"].float() * floats[f"{own}.{norm}.weight"].float()
            after = weight(f"{own}.{name}") * read[f"{own}.{norm}.module.weight"].float()
            assert ((after - before).norm() / before.norm()).item() < 0.03
            assert torch.equal(read[f"{own}.{norm}.weight"], floats[f"{own}.{norm}.weight"])
        v, o = (floats[f"{own}.self_attn.{n}_proj.weight"].float() for n in "vo")
        before = o[:, :32] @ v[:32]  # the first query head, and the KV head that it reads
        before = before * floats[f"{own}.input_layernorm.weight"].float()
        after = weight(f"{own}.self_attn.o_proj")[:, :32] @ weight(f"{own}.self_attn.v_proj")[:32]
        after = after * read[f"{own}.input_layernorm.module.weight"].float()
        assert ((after - before).norm() / before.norm()).item() < 0.03
    key = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(read[key], floats[key]), "what stays in float keeps its weights"


@pytest.mark.parametrize(
    ("flags", "kind"), [({"a_bit": 16}, "W8A16"), ({"is_dynamic": True}, "W8A16"), ({"w_bit": 4, "fraction": 0.011}, "W8A8S")]
)
def test_a_tied_head_of_its_own(flags: dict[str, Any], kind: str, tmp_path: Path) -> None:
    quantized(DEMO / "dense", tmp_path / "made", quantize_lm_head=True, **flags)
    config = ModelConfig.load(tmp_path / "made")
    assert not config.tie_word_embeddings
    assert config.quantization is not None
    assert config.quantization.type_of("lm_head.weight") == kind
    assert replace(config, quantization=None, tie_word_embeddings=True, eos_token_ids=()) == replace(
        ModelConfig.load(DEMO / "dense"), eos_token_ids=()
    )


def test_float16_models_have_their_scales_as_bits(tmp_path: Path) -> None:
    source = tmp_path / "float"
    shutil.copytree(DEMO / "dense", source)
    tensors = {name: x.half() for name, x in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float16", "torch_dtype": "float16"}), encoding="utf-8")
    quantized(source, tmp_path / "made", count=5)
    read = {name: x for file in (tmp_path / "made").glob("*.safetensors") for name, x in load_file(file).items()}
    assert read["model.layers.0.self_attn.q_proj.deq_scale"].dtype == torch.int64
    assert scored(tmp_path / "made") <= scored(source) * 1.01


@pytest.mark.parametrize("preset", ["qwen_w8a8", "qwen_w4a8"])
def test_a_row_of_zeros_keeps_its_bias(preset: str, tmp_path: Path) -> None:
    source, name = tmp_path / "float", "model.layers.0.self_attn.q_proj"
    shutil.copytree(DEMO / "dense", source)
    tensors = load_file(source / "model.safetensors")
    tensors[f"{name}.weight"][3] = 0
    bias = tensors[f"{name}.bias"][3] = 0.75
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantized(source, tmp_path / "made", count=5, **PRESETS[preset])
    read = {key: x for file in (tmp_path / "made").glob("*.safetensors") for key, x in load_file(file).items()}
    assert (read[f"{name}.weight"][3] == 0).all()
    step = read[f"{name}.deq_scale"][3].item()
    assert 0 < step < 0.05 * bias
    assert abs(read[f"{name}.quant_bias"][3].item() * step - bias) <= 0.5001 * step


def test_a_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(outcome: Outcome, folder: Path) -> None:
        assert (folder / "config.json").exists()
        assert not (tmp_path / "made" / "config.json").exists(), "nothing appears before the end"
        raise OSError("no room")

    asked = settings(with_preset("qwen_w8a16", {})[0])
    with pytest.raises(OSError, match="no room"):
        make(Source.open(DEMO / "dense"), tmp_path / "made", asked, [], Solo(torch.device("cpu")), finishing=fail)
    assert not (tmp_path / "made").exists()

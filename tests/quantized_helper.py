"""Random quantized checkpoints of every format, written here by other code than qtp.quantize, and what plain float64 arithmetic
makes of them by the documented formulas: what the tests of quantized inference compare.

T tokens, D hidden, V vocabulary, H query heads, K KV heads, d head_dim.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models_helper import make_checkpoint, random_ids
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtp.sparse_compressor import command as compress

GATE = ("gate.weight", "shared_expert_gate.weight")


class Plain:
    """A Qwen2 or Qwen2-MoE model in float64: each linear layer by its type in `types`, from tensors under the checkpoint's names.
    Rope is plain. `ranges` has the smallest and largest input of each linear layer that ran, and of keys, values and queries;
    `margin` is the smallest distance of a rounded value from where it would have been rounded to another integer: where it is
    large, float32 rounds alike."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], types: dict[str, str], group_size: int = 0) -> None:
        self.config, self.types, self.group_size = config, types, group_size
        self.tensors = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        self.kv = next((t for t in types.values() if t in ("C8", "FAQuant")), None)
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        self.margin = 0.5

    def _round(self, x: Tensor) -> Tensor:
        whole = x.round()
        within = (x - whole)[(x > -129) & (x < 128)]
        self.margin = min(self.margin, 0.5 - float(within.abs().max()) if len(within) else 0.5)
        return whole.clamp(-128, 127)

    def _round_e4m3(self, x: Tensor) -> Tensor:
        self._round(x / e4m3_steps(x))  # for the margin
        return e4m3(x)

    def logits(self, ids: list[int]) -> Tensor:
        """[T, V]."""
        c = self.config
        x = self.tensors["model.embed_tokens.weight"][ids]
        for i in range(c["num_hidden_layers"]):
            own = f"model.layers.{i}"
            x = x + self._attention(f"{own}.self_attn", *self._norms(f"{own}.input_layernorm", x))
            plain, anti = self._norms(f"{own}.post_attention_layernorm", x)
            sparse = f"{own}.mlp.gate.weight" in self.tensors
            x = x + (self._moe(f"{own}.mlp", plain, anti) if sparse else self._mlp(f"{own}.mlp", plain, anti))
        plain, anti = self._norms("model.norm", x)
        if c.get("tie_word_embeddings"):
            return plain @ self.tensors["model.embed_tokens.weight"].T
        return self._linear("lm_head", plain, anti)

    def _norms(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """What float layers take, and what quantized ones do."""
        unit = x / (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        plain = unit * self.tensors[f"{name}.weight"]
        if f"{name}.module.weight" not in self.tensors:
            return plain, plain
        return plain, unit * self.tensors[f"{name}.module.weight"] + self.tensors[f"{name}.module.bias"]

    def _linear(self, name: str, plain: Tensor, anti: Tensor) -> Tensor:
        kind = self.types.get(f"{name}.weight", "FLOAT")
        x = plain if kind == "FLOAT" else anti
        self._see(name, x.flatten())
        weight = self.tensors[f"{name}.weight"].double()
        bias = self.tensors.get(f"{name}.bias", torch.zeros(len(weight), dtype=torch.float64))
        if kind == "FLOAT":
            return x @ weight.T + bias
        if kind in ("W8A8", "W8A8S"):
            scale, offset = self.tensors[f"{name}.input_scale"], self.tensors[f"{name}.input_offset"]
            x_q = self._round(x / scale + offset)
            deq = self.tensors[f"{name}.deq_scale"]
            if deq.dtype == torch.int64:
                deq = deq.to(torch.int32).view(torch.float32).double()
            return (x_q @ weight.T + self.tensors[f"{name}.quant_bias"]) * deq
        scale = self.tensors[f"{name}.weight_scale"]
        if kind == "W8A8_FP8":
            s_x = x.abs().amax(-1, keepdim=True) / 448
            return (self._round_e4m3(x / s_x) * s_x) @ (weight * scale).T + bias
        offset = self.tensors[f"{name}.weight_offset"]
        if kind == "W8A8_DYNAMIC":
            s_x = x.abs().amax(-1, keepdim=True) / 127
            return (self._round(x / s_x) * s_x) @ (weight * scale).T + bias
        assert kind == "W8A16", kind
        group = self.group_size or weight.shape[1]
        of = torch.arange(weight.shape[1]) // group
        return x @ ((weight - offset[:, of]) * scale[:, of]).T + bias

    def _attention(self, own: str, plain: Tensor, anti: Tensor) -> Tensor:
        c = self.config
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        d = c.get("head_dim") or c["hidden_size"] // heads
        q, k, v = (self._linear(f"{own}.{n}_proj", plain, anti).unflatten(-1, (-1, d)) for n in "qkv")
        theta = c["rope_parameters"]["rope_theta"]
        angle = torch.arange(len(q))[:, None] / theta ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
        cos, sin = (torch.cat((f(angle), f(angle)), -1)[:, None] for f in (torch.cos, torch.sin))

        def turn(x: Tensor) -> Tensor:
            return x * cos + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * sin

        q, k, v = self._cached(own, turn(q), turn(k), v)
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / d**0.5
        scores = scores + torch.full(scores.shape[1:], float("-inf"), dtype=torch.float64).triu(1)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        return self._linear(f"{own}.o_proj", out, out)

    def _cached(self, own: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """After the round through int8: keys behind rope and values by channel, or all three by head."""
        self._see(f"{own}.k_channels", k.flatten(1)), self._see(f"{own}.v_channels", v.flatten(1))
        for n, x in zip("qkv", (q, k, v), strict=True):
            self._see(f"{own}.fa_{n}", x.transpose(1, 2).flatten(0, 1))

        def through(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
            return (self._round(x / scale + offset) - offset) * scale

        if self.kv == "C8":
            names = [f"{own}.{n}_proj.kv_cache" for n in "kv"]
            k, v = (
                through(x.flatten(1), self.tensors[f"{n}_scale"], self.tensors[f"{n}_offset"]).view_as(x)
                for n, x in zip(names, (k, v), strict=True)
            )
        if self.kv == "FAQuant":
            q, k, v = (
                through(x, self.tensors[f"{own}.fa_{n}.scale"], self.tensors[f"{own}.fa_{n}.offset"])
                for n, x in zip("qkv", (q, k, v), strict=True)
            )
        return q, k, v

    def _mlp(self, own: str, plain: Tensor, anti: Tensor) -> Tensor:
        gate, up = (self._linear(f"{own}.{n}_proj", plain, anti) for n in ("gate", "up"))
        inner = gate * gate.sigmoid() * up
        return self._linear(f"{own}.down_proj", inner, inner)

    def _moe(self, own: str, plain: Tensor, anti: Tensor) -> Tensor:
        weights, chosen = (plain @ self.tensors[f"{own}.gate.weight"].T).softmax(-1).topk(self.config["num_experts_per_tok"])
        if self.config["norm_topk_prob"]:
            weights = weights / weights.sum(-1, keepdim=True)
        out = (plain @ self.tensors[f"{own}.shared_expert_gate.weight"].T).sigmoid() * self._mlp(
            f"{own}.shared_expert", plain, anti
        )
        for e in chosen.unique().tolist():
            tokens, place = torch.where(chosen == e)
            out[tokens] += weights[tokens, place, None] * self._mlp(f"{own}.experts.{e}", plain[tokens], anti[tokens])
        return out

    def _see(self, name: str, x: Tensor) -> None:
        low, high = x.amin(0), x.amax(0)
        if name in self.ranges:
            low, high = torch.minimum(low, self.ranges[name][0]), torch.maximum(high, self.ranges[name][1])
        self.ranges[name] = low, high


def e4m3_steps(x: Tensor) -> Tensor:
    """The distance between neighbouring values of float8 e4m3 where x lies: 3 bits behind the leading one, down to 2^-9."""
    return torch.exp2(x.abs().clamp(min=2.0**-6).log2().floor() - 3)


def e4m3(x: Tensor) -> Tensor:
    """x float64, rounded to float8 e4m3, half to even; what is beyond it is its largest, 448."""
    x = x.clamp(-448, 448)
    steps = e4m3_steps(x)
    return (x / steps).round() * steps


Choose = Callable[[str], str]


def quantized_checkpoint(
    source: Path,
    folder: Path,
    kind: str,
    *,
    seed: int,
    ids: list[int],
    choose: Choose = lambda name: "",
    group_size: int = 0,
    kv: str | None = None,
    anti: bool = False,
    apart: bool = False,
    old: bool = False,
    bits: bool = False,
) -> Plain:
    """Writes the float checkpoint `source` to `folder` in the type `kind` ("FLOAT", "W8A8", ...), and returns it in float64.

    choose: the type of single layers by their name, where it is not to be `kind`. ids: what the ranges of activations are taken
    from. anti: with anti-outlier norms. apart: values and up have other input scales than what they are packed with. old: with a
    description of the older form. bits: deq_scale as a float16 model's, its bits in int64. No offset, bias or scale is zero."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    floats = load_file(source / "model.safetensors")
    random = torch.Generator().manual_seed(seed)
    seen = Plain(config, floats, {})
    seen.logits(ids)
    types: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, x in floats.items():
        layer = name.removesuffix(".weight").removesuffix(".bias")
        linear = re.search(r"(proj|lm_head)\.(weight|bias)$", name)
        given = (choose(layer) or kind) if linear else "FLOAT"
        if given == "FLOAT":
            tensors[name], types[name] = x, "FLOAT"
        elif name.endswith("weight"):
            bias = floats.get(f"{layer}.bias", torch.zeros(len(x))).double()
            made = _QUANTIZE[given](
                x.double(),
                bias,
                _input(seen, layer, 1.3 if anti else 1.0 + 0.2 * (apart and layer.endswith(("v_proj", "up_proj")))),
                random,
                group_size,
                bits,
            )
            if given != "W8A8" and f"{layer}.bias" in floats:
                made["bias"] = floats[f"{layer}.bias"]
            tensors |= {f"{layer}.{suffix}": made[suffix] for suffix in made}
            types |= {f"{layer}.{suffix}": given for suffix in made}
    if anti:
        _add_anti_norms(config, tensors, types, random)
    if kv is not None:
        _add_kv(config, seen, tensors, types, kv, random)
    _write(folder, config, tensors, types, kind, group_size, kv, old)
    return Plain(config, tensors, types, group_size)


def _input(seen: Plain, layer: str, margin: float) -> tuple[Tensor, Tensor]:
    """The range of a layer's input; of q, k, v, and of gate and up, it is one. An expert that no token reached gets its shared
    expert's."""
    for name in (layer, re.sub(r"experts\.\d+", "shared_expert", layer)):
        if name in seen.ranges:
            low, high = seen.ranges[name]
            return margin * low, margin * high
    raise AssertionError(layer)


def _w8a8s(*given: Any) -> dict[str, Tensor]:
    """As W8A8, but all but a few values of each tensor are in -8 ... 7."""
    w, *rest = given
    bound = w.abs().amax(1, keepdim=True) * 7.4 / 127
    kept = torch.rand(w.shape, generator=given[3]) < 0.02
    kept[:, 0] = True  # so that the scale stays
    return _w8a8(torch.where(kept, w, torch.minimum(torch.maximum(w, -bound), bound)), *rest)


def _w8a8(
    w: Tensor, bias: Tensor, seen: tuple[Tensor, Tensor], random: torch.Generator, group_size: int, bits: bool
) -> dict[str, Tensor]:
    low, high = (float(x) for x in seen)
    scale = (max(high, 0.0) - min(low, 0.0)) / 255
    offset = round(-min(low, 0.0) / scale) - 128
    s_w = w.abs().amax(1) / 127
    w_q = (w / s_w[:, None]).round()
    deq = (s_w * scale).float()
    quant_bias = (bias / deq.double() - offset * w_q.sum(1)).round().to(torch.int32)
    return {
        "weight": w_q.to(torch.int8),
        "input_scale": torch.tensor([scale], dtype=torch.float32),
        "input_offset": torch.tensor([float(offset)]),
        "quant_bias": quant_bias,
        "deq_scale": deq.view(torch.int32).to(torch.int64) if bits else deq,
    }


def _w8a16(
    w: Tensor, bias: Tensor, seen: tuple[Tensor, Tensor], random: torch.Generator, group_size: int, bits: bool
) -> dict[str, Tensor]:
    """With offsets, as w_sym false has them."""
    group = group_size or w.shape[1]
    count = -(-w.shape[1] // group)
    of = torch.arange(w.shape[1]) // group
    parts = w.split(group, dim=1)
    low = torch.stack([p.amin(1) for p in parts], 1).clamp(max=0)
    high = torch.stack([p.amax(1) for p in parts], 1).clamp(min=0)
    scale = ((high - low) / 255).float().double()
    offset = (-low / scale).round() - 128
    assert scale.shape == (len(w), count)
    w_q = (w / scale[:, of] + offset[:, of]).round().clamp(-128, 127)
    return {"weight": w_q.to(torch.int8), "weight_scale": scale.float(), "weight_offset": offset.float()}


def _dynamic(
    w: Tensor, bias: Tensor, seen: tuple[Tensor, Tensor], random: torch.Generator, group_size: int, bits: bool
) -> dict[str, Tensor]:
    scale = w.abs().amax(1, keepdim=True) / 127
    return {
        "weight": (w / scale).round().to(torch.int8),
        "weight_scale": scale.float(),
        "weight_offset": torch.zeros_like(scale, dtype=torch.float32),
    }


def _fp8(
    w: Tensor, bias: Tensor, seen: tuple[Tensor, Tensor], random: torch.Generator, group_size: int, bits: bool
) -> dict[str, Tensor]:
    scale = (w.abs().amax(1, keepdim=True) / 448).float()
    return {"weight": e4m3(w / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


_QUANTIZE = {"W8A8": _w8a8, "W8A8S": _w8a8s, "W8A16": _w8a16, "W8A8_DYNAMIC": _dynamic, "W8A8_FP8": _fp8}


def _add_anti_norms(config: dict[str, Any], tensors: dict[str, Tensor], types: dict[str, str], random: torch.Generator) -> None:
    """Others than the plain ones by a random factor and bias: not what any method would give, but not to be mistaken either."""
    for i in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{i}.{norm}"
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.module.weight"] = weight * (1 + 0.2 * torch.rand(weight.shape, generator=random))
            tensors[f"{name}.module.bias"] = 0.1 * torch.randn(weight.shape, generator=random)
            types |= {f"{name}.module.{suffix}": "FLOAT" for suffix in ("weight", "bias")}


def _add_kv(
    config: dict[str, Any], seen: Plain, tensors: dict[str, Tensor], types: dict[str, str], kv: str, random: torch.Generator
) -> None:
    for i in range(config["num_hidden_layers"]):
        own = f"model.layers.{i}.self_attn"
        made: dict[str, Tensor] = {}
        if kv == "C8":
            for n in "kv":
                low, high = seen.ranges[f"{own}.{n}_channels"]
                scale = (high.clamp(min=0) - low.clamp(max=0)) / 255
                made[f"{own}.{n}_proj.kv_cache_scale"] = scale.float()
                made[f"{own}.{n}_proj.kv_cache_offset"] = ((-low.clamp(max=0) / scale).round() - 128).float()
        else:
            for n in "qkv":
                low, high = seen.ranges[f"{own}.fa_{n}"]
                scale = torch.maximum(low.abs(), high.abs())[:, None] / 120
                made[f"{own}.fa_{n}.scale"] = scale.float()
                made[f"{own}.fa_{n}.offset"] = torch.randint(-5, 6, scale.shape, generator=random).float()
        tensors |= made
        types |= dict.fromkeys(made, kv)


def _write(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    types: dict[str, str],
    kind: str,
    group_size: int,
    kv: str | None,
    old: bool,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"group_size": group_size} | ({} if kv is None else _KV_WORDS[kv])
    if kind != "FLOAT":
        config = config | {"quantize": kind.lower()}
    config = config | {"torch_dtype": config["dtype"], "quantization" if old else "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    description: dict[str, Any] = dict(types)
    word = "float" if kind == "FLOAT" else kind.lower()
    if not old:
        description |= {"version": "1.0.0", "model_quant_type": kind, "group_size": group_size} | (
            {} if kv is None else _KV_WORDS[kv]
        )
    name = f"quant_model_description_{word}.json" if old else "quant_model_description.json"
    (folder / name).write_text(json.dumps(description), encoding="utf-8")
    stem = "model" if kind == "FLOAT" else f"quant_model_weight_{word}"
    save_file({k: x.contiguous() for k, x in tensors.items()}, folder / f"{stem}.safetensors", metadata={"format": "pt"})


_KV_WORDS = {"C8": {"kv_quant_type": "C8"}, "FAQuant": {"fa_quant_type": "FAQuant"}}


def float_checkpoint(folder: Path, family: str, seed: int, **config: Any) -> Path:
    """A small random one of odd sizes."""
    sizes: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 96,
        "intermediate_size": 83,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "tie_word_embeddings": False,
    }
    if family == "qwen2_moe":
        sizes |= {
            "num_experts": 9,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 42,
            "shared_expert_intermediate_size": 58,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        }
    return make_checkpoint(folder, family, seed=seed, **{**sizes, **config})


TOKENS = 12
MARGIN = 5e-5  # of an integer, several times what float32 errs here


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


def mixed_fp8(layer: str) -> str:
    """Beside float, and other types of which one rounds the same input by token too."""
    if layer.endswith(("0.self_attn.q_proj", "1.mlp.up_proj")):
        return "FLOAT"
    if layer.endswith("experts.2.gate_proj"):
        return "W8A16"
    return "W8A8_DYNAMIC" if layer.endswith(("self_attn.v_proj", "experts.3.up_proj", "1.mlp.down_proj")) else ""


@dataclass(frozen=True, kw_only=True)
class Case:
    kind: str
    how: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


CASES = {
    "w8a8": Case(kind="W8A8"),
    "w8a8-bits": Case(kind="W8A8", how={"bits": True}),
    "w8a8-presets": Case(kind="W8A8", how={"choose": presets, "old": True}),
    "w8a8-apart": Case(kind="W8A8", how={"apart": True}),
    "w8a8-anti": Case(kind="W8A8", how={"anti": True}),
    "w8a8-anti-mixed": Case(kind="W8A8", how={"anti": True, "choose": lambda n: "FLOAT" if n.endswith("v_proj") else ""}),
    "w8a8-mixed": Case(kind="W8A8", how={"choose": mixed}),
    "w8a8s": Case(kind="W8A8S"),
    "w8a8s-apart": Case(kind="W8A8S", how={"apart": True}),
    "dynamic": Case(kind="W8A8_DYNAMIC"),
    "fp8": Case(kind="W8A8_FP8"),
    "fp8-mixed": Case(kind="W8A8_FP8", how={"choose": mixed_fp8, "anti": True}),
    "w8a16": Case(kind="W8A16"),
    "w8a16-64": Case(kind="W8A16", how={"group_size": 64}, config={"intermediate_size": 260, "moe_intermediate_size": 140}),
    "w8a16-128": Case(kind="W8A16", how={"group_size": 128}, config={"intermediate_size": 650, "hidden_size": 192}),
    "w8a16-256": Case(kind="W8A16", how={"group_size": 256}, config={"intermediate_size": 700}),
    "kv": Case(kind="FLOAT", how={"kv": "C8"}),
    "kv-w8a8": Case(kind="W8A8", how={"kv": "C8", "old": True, "choose": presets}),
    "fa3": Case(kind="FLOAT", how={"kv": "FAQuant"}),
    "fa3-w8a16": Case(kind="W8A16", how={"kv": "FAQuant"}),
}


def make(family: str, name: str, folder: Path, **config: Any) -> tuple[Path, list[int], Tensor]:
    """(checkpoint, ids, their logits in float64) of a family and a case by name; with ids of which no value is rounded that lies
    between two integers. config: over what the case says."""
    case = CASES[name]
    sizes = {k: v for k, v in (case.config | config).items() if family == "qwen2_moe" or not k.startswith("moe")}
    source = float_checkpoint(folder / "float", family, 7, **sizes)
    for seed in range(200):
        ids = random_ids(TOKENS, 131, seed)
        plain = quantized_checkpoint(source, folder / "made", case.kind, seed=seed, ids=ids, **case.how)
        logits = plain.logits(ids)
        if plain.margin > MARGIN:
            return folder / "made", ids, logits
    raise AssertionError("no ids without a near tie")


def compressed(folder: Path, out: Path, tp: int, *words: str) -> Path:
    """A W8A8S checkpoint as W8A8SC for `tp` ranks. words: more of the command line."""
    if not out.exists():
        assert compress(["--model_path", str(folder), "--save_directory", str(out), "--tp", str(tp), *words]) == 0
    return out


def error(logprobs: Tensor, logits: Tensor) -> float:
    """Of the worst row: relative, of what remains when its mean is taken away (log-probabilities know no more)."""
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (logprobs, logits))
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())

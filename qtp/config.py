"""What is configured: `ModelConfig`, a strict reader of a checkpoint's config.json, and `EngineConfig`, the choices of a run.

Neither imports torch. Both refuse what they do not know in one line (ValueError).
"""

import json
from dataclasses import dataclass, replace
from math import inf, log
from pathlib import Path
from typing import Any

from qtp.layout.split import Grid, Heads
from qtp.quantization import Quantization, read_quantization

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen2MoeForCausalLM": "qwen2_moe"}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary embedding. `factor` 1.0 is plain rope; otherwise static YaRN (arXiv 2309.00071) from a context of
    `original_max_position` tokens. `attention_factor` multiplies cos and sin."""

    theta: float
    factor: float = 1.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """The mixture-of-experts layers. `layers` holds the indices of the layers that are sparse."""

    num_experts: int
    top_k: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    norm_topk_prob: bool
    layers: frozenset[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One Qwen2 or Qwen2-MoE model. `sliding_window[i]` is layer i's window in tokens, or None for full attention.
    dtype: what the weights are said to be, None if config.json does not say."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    dtype: str | None
    rope: RopeConfig
    sliding_window: tuple[int | None, ...]
    moe: MoeConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: Quantization | None = None

    @property
    def heads(self) -> Heads:
        return Heads(self.num_heads, self.num_kv_heads)

    @property
    def weight_files(self) -> str:
        """What the names of the weight files begin with."""
        return "model" if self.quantization is None else self.quantization.stem

    def check_world(self, size: int) -> None:
        """Raises ValueError if some rank would have no query head."""
        if size > self.num_heads:
            raise ValueError(
                f"tp {size} is more than the {self.num_heads} query heads of this model; use tp {self.num_heads} or less"
            )

    @classmethod
    def load(cls, folder: Path) -> "ModelConfig":
        """Reads folder/config.json (and the eos ids of generation_config.json).

        Accepts the older words (rope_theta, rope_scaling, torch_dtype) and those of transformers 5 (rope_parameters, dtype,
        layer_types, qkv_bias). Raises ValueError naming the key for whatever is missing, malformed or unknown.
        """
        if not folder.is_dir():
            raise ValueError(f"model {folder}: no such folder; give a checkpoint folder or a hub id such as Qwen/Qwen2.5-0.5B")
        raw = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        eos = [raw.get("eos_token_id")] + ([read_json(generation).get("eos_token_id")] if generation.exists() else [])
        source = str(folder / "config.json")
        config = cls.from_dict(raw, source)
        return replace(config, eos_token_ids=_ids(eos), quantization=read_quantization(folder, raw, source))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """As `load`, from the parsed content of config.json alone, without what it says of quantization; `source` names it in
        errors."""
        raw = {key: value for key, value in raw.items() if value is not None or key == "sliding_window"}
        read = _Reader(raw, source)
        family = _family(raw, source)
        heads = read.int("num_attention_heads")
        layers = read.int("num_hidden_layers")
        kv_heads = read.int("num_key_value_heads", heads)
        hidden = read.int("hidden_size")
        if heads % kv_heads:
            raise ValueError(f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if raw.get("head_dim") is None and hidden % heads:
            raise ValueError(
                f"{source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads} and head_dim is not given"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported; this family uses 'silu'")
        max_position = read.int("max_position_embeddings", 32768)
        head_dim = read.int("head_dim", hidden // heads)
        if head_dim % 2:
            raise ValueError(f"{source}: head_dim {head_dim} is odd; rotary halves need an even one")
        chunked = raw.get("dual_chunk_attention_config")
        if chunked:  # identical to plain attention up to this length, and refused beyond it
            if not isinstance(chunked, dict):
                raise ValueError(f"{source}: dual_chunk_attention_config must be an object, not {chunked!r}")
            sizes = _Reader(chunked, f"{source}: dual_chunk_attention_config")
            max_position = min(max_position, sizes.int("chunk_size") - sizes.int("local_size"))
        moe = _moe(raw, read, layers, source) if family == "qwen2_moe" else None
        dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "").removeprefix("torch.")
        return cls(
            family=family if moe is not None else "qwen2",
            vocab_size=read.int("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.int("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position=max_position,
            rms_norm_eps=read.float("rms_norm_eps", 1e-6),
            tie_word_embeddings=read.bool("tie_word_embeddings", False),
            qkv_bias=read.bool("qkv_bias", True),
            dtype=check_dtype(dtype, source) if dtype else None,
            rope=_rope(raw, read, head_dim, max_position, source),
            sliding_window=_windows(raw, read, family, layers, source),
            moe=moe,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The choices of one run; the same on every rank. -1 or None: chosen from the model and the machine, and printed.

    max_num_seqs: sequences in a step; max_prefill_seqs: those among them that may start in one step;
    max_num_batched_tokens: tokens in a step (the budget of chunked prefill);
    max_model_len: tokens of prompt and output together; max_position_embeddings: the limit of these, in place of the model's;
    num_kv_blocks: blocks of block_size tokens in each rank's KV cache; timeout: seconds a collective may take.

    kv_cache_gib: of a rank's KV cache; on CPUs 4 if neither this nor num_kv_blocks is given. Cards then run a step of the largest
    size once the weights are there, and the cache takes what that leaves of gpu_memory_utilization, a share of the card's memory
    that all ranks on the card, and whoever else uses it, have together.

    launcher: 'auto' (whoever started this process; a lone process starts local ranks), 'local' or 'ray' (at ray_address, or a
    cluster of its own). bind_cpu: pin ranks to cores. stall_timeout: seconds without progress in a step, or without a sign of
    life, after which a rank counts as hung; 0: never. on_death: what rank 0 does when another rank is gone: 'raise' RankDied
    from the call that runs or comes next, or 'exit', the process, at once.

    kernels: 'auto', 'native' (compiled code, on CPUs), 'triton' (on cuda) or 'torch' (torch's own operations, on any device).
    load_format: 'auto', or 'dummy': random weights of the shapes that config.json tells, which needs no weight files.
    enforce_eager: no CUDA graphs of decode steps, which cost seconds at start and some memory.
    deterministic: tokens and logprobs of a request are the same bits whatever else runs, however its prompt is cut, and at 1, 2,
    4 and 8 ranks.
    """

    model: str
    tp: int = -1
    moe_ep: int = -1
    moe_tp: int = -1
    dtype: str = "auto"
    device: str = "auto"
    communicator: str = "auto"
    block_size: int = 128
    max_num_seqs: int = 64
    max_prefill_seqs: int | None = None
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    max_position_embeddings: int | None = None
    num_kv_blocks: int | None = None
    kv_cache_gib: float | None = None
    gpu_memory_utilization: float = 0.9
    vocab_limit: int | None = None
    threads: int | None = None
    timeout: float = 300.0
    launcher: str = "auto"
    ray_address: str | None = None
    bind_cpu: bool = True
    stall_timeout: float = 60.0
    on_death: str = "raise"
    kernels: str = "auto"
    enforce_eager: bool = False
    load_format: str = "auto"
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("max_model_len", "max_position_embeddings", "max_prefill_seqs", "num_kv_blocks", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        for name in ("kv_cache_gib", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise ValueError(f"{name} {value} must be a number above 0")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization {self.gpu_memory_utilization} must be above 0 and at most 1")
        if self.dtype != "auto":
            check_dtype(self.dtype, "dtype")
        if not 0 <= self.stall_timeout < inf:
            raise ValueError(f"stall_timeout {self.stall_timeout} must be a number of seconds, or 0 for never")
        _check_choice("device", self.device, ("auto", "cpu", "cuda", "npu"))
        _check_choice("launcher", self.launcher, ("auto", "local", "ray"))
        _check_choice("on_death", self.on_death, ("raise", "exit"))
        _check_choice("load_format", self.load_format, ("auto", "dummy"))
        _check_choice("kernels", self.kernels, ("auto", "native", "triton", "torch"))
        if self.ray_address is not None and self.launcher != "ray":
            raise ValueError(f"ray_address {self.ray_address!r} needs launcher 'ray'")

    def grid(self) -> Grid:
        return Grid.of(self.tp, moe_ep=self.moe_ep, moe_tp=self.moe_tp)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError naming the file if it is missing or is not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; a checkpoint folder needs this file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; choose {', '.join(known[:-1])} or {known[-1]}")


def check_dtype(name: str, source: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"{source}: dtype {name!r} is not supported; choose {', '.join(DTYPES)}")
    return name


@dataclass(frozen=True, slots=True)
class _Reader:
    raw: dict[str, Any]
    source: str

    def int(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.source}: {key} is {value!r}; a positive integer is needed")
        return value

    def float(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{self.source}: {key} is {value!r}; a positive number is needed")
        return float(value)

    def bool(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.source}: {key} is {value!r}; true or false is needed")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{self.source}: {key} is missing")
        return value


def _ids(values: list[Any]) -> tuple[int, ...]:
    flat = [i for value in values for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    return tuple(dict.fromkeys(flat))


def _family(raw: dict[str, Any], source: str) -> str:
    named = raw.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(architecture, str) for architecture in named):
        raise ValueError(f"{source}: architectures must be a list of names, not {named!r}")
    for architecture in named:
        if architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture]
    if not named and raw.get("model_type") in ARCHITECTURES.values():
        return str(raw["model_type"])
    shown = ", ".join(map(str, named)) or raw.get("model_type") or "missing"
    raise ValueError(f"{source}: architecture {shown} is not supported; supported are {', '.join(ARCHITECTURES)}")


def _rope(raw: dict[str, Any], read: _Reader, head_dim: int, max_position: int, source: str) -> RopeConfig:
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise ValueError(f"{source}: rope_parameters / rope_scaling must be an object, not {old or new!r}")
    kind = old.get("rope_type") or old.get("type") or new.get("rope_type") or new.get("type") or "default"
    scaling = {key: value for key, value in {**new, **old}.items() if value is not None}  # as transformers: what is added wins
    inner = _Reader(scaling, f"{source}: rope")
    theta = inner.float("rope_theta", read.float("rope_theta", 10000.0))
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{source}: partial_rotary_factor {scaling['partial_rotary_factor']} is not supported; only 1.0 is")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "yarn":
        raise ValueError(f"{source}: rope type {kind!r} is not supported; supported are 'default' and 'yarn'")
    original = inner.int("original_max_position_embeddings", max_position)
    factor = inner.float("factor", max_position / original)
    return RopeConfig(
        theta=theta,
        factor=factor,
        original_max_position=original,
        beta_fast=inner.float("beta_fast", 32.0),
        beta_slow=inner.float("beta_slow", 1.0),
        truncate=inner.bool("truncate", True),
        attention_factor=inner.float("attention_factor", _yarn_attention_factor(scaling, factor)),
    )


def _yarn_attention_factor(scaling: dict[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * log(factor) + 1.0 if factor > 1.0 else 1.0

    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return mscale(above) / mscale(below) if above and below else mscale(1.0)


def _windows(raw: dict[str, Any], read: _Reader, family: str, layers: int, source: str) -> tuple[int | None, ...]:
    """The rule of transformers: layer_types if given, otherwise by max_window_layers, which the families count differently."""
    if not read.bool("use_sliding_window", False) or ("sliding_window" in raw and not raw["sliding_window"]):
        return (None,) * layers
    window, first = read.int("sliding_window", 4096), raw.get("max_window_layers", 28)
    if type(first) is not int:
        raise ValueError(f"{source}: max_window_layers is {first!r}; an integer is needed")
    types = raw.get("layer_types")
    if types is None:
        slides = [i >= first if family == "qwen2" else i % 2 == 0 and i < first for i in range(layers)]
    elif (
        not isinstance(types, list)
        or len(types) != layers
        or any(t not in ("full_attention", "sliding_attention") for t in types)
    ):
        raise ValueError(f"{source}: layer_types must name full_attention or sliding_attention for each of the {layers} layers")
    else:
        slides = [kind == "sliding_attention" for kind in types]
    return tuple(window if slide else None for slide in slides)


def _moe(raw: dict[str, Any], read: _Reader, layers: int, source: str) -> MoeConfig | None:
    if raw.get("num_experts") == 0:
        return None
    experts, top_k = read.int("num_experts", 60), read.int("num_experts_per_tok", 4)
    if top_k > experts:
        raise ValueError(f"{source}: num_experts_per_tok {top_k} is more than num_experts {experts}")
    step, dense = read.int("decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"{source}: mlp_only_layers must be a list of layer indices, not {dense!r}")
    sparse = frozenset(i for i in range(layers) if i not in dense and (i + 1) % step == 0)
    return MoeConfig(
        num_experts=experts,
        top_k=top_k,
        expert_intermediate_size=read.int("moe_intermediate_size"),
        shared_intermediate_size=read.int("shared_expert_intermediate_size"),
        norm_topk_prob=read.bool("norm_topk_prob", False),
        layers=sparse,
    )

"""What is to be made of a checkpoint: the choices of a run, the presets, and what is refused. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from qtp.quantization import C8, FAQUANT, FLOAT, GROUP_SIZES

STATIC = ("W8A8", "W8A8S")
ANTI_METHODS = ("", "m1", "m3", "m4", "m6")
_TYPES = {(8, 8): "W8A8", (8, 16): "W8A16", (4, 8): "W8A8S", (16, 16): FLOAT}
_BY_TOKEN = {"is_dynamic": "W8A8_DYNAMIC", "is_fp8": "W8A8_FP8"}
_LEVELS = tuple(f"L{n}" for n in range(6))
_PER_GROUP = 64

PRESETS: dict[str, dict[str, Any]] = {
    "qwen_w8a8": {"w_bit": 8, "a_bit": 8, "down_proj": "none"},
    "qwen_w8a16": {"w_bit": 8, "a_bit": 16, "down_proj": "all"},
    "qwen_fp8": {"w_bit": 8, "a_bit": 8, "is_fp8": True, "down_proj": "all"},
    "qwen_w4a8": {
        "w_bit": 4,
        "a_bit": 8,
        "fraction": 0.011,
        "co_sparse": False,
        "use_sigma": True,
        "is_lowbit": True,
        "down_proj": "none",
    },
    "qwencode_w8a8s": {
        "w_bit": 4,
        "a_bit": 8,
        "fraction": 0.02,
        "co_sparse": True,
        "use_sigma": True,
        "is_lowbit": False,
        "down_proj": "none",
    },
    "qwen_kv8": {"w_bit": 16, "a_bit": 16, "use_kvcache_quant": True},
}
DEFAULTS: dict[str, Any] = {
    "w_bit": 8,
    "a_bit": 8,
    "act_method": 1,
    "anti_method": "",
    "disable_names": (),
    "disable_level": "L0",
    "fraction": 0.01,
    "use_sigma": False,
    "sigma_factor": 3.0,
    "is_lowbit": False,
    "co_sparse": False,
    "do_smooth": False,
    "w_sym": True,
    "open_outlier": True,
    "group_size": None,
    "use_kvcache_quant": False,
    "use_fa_quant": False,
    "is_dynamic": False,
    "is_fp8": False,
    "down_proj": None,
    "quantize_lm_head": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """kind: the type of the linear layers, FLOAT where the KV cache alone is quantized; kv: C8, FAQUANT or None. group_size:
    input columns that share a scale in W8A16, 0 for all. act_method: 1 the whole range of an activation, 2 the range of least
    error over its histogram, 3 that one where it is better by a tenth. disable_names: of linear layers, or patterns, that stay in
    float; disable_level: how many more. fraction, sigma_factor (None: off), search, protect: see `lowbit.low_bit`.
    symmetric: of W8A16 weights. down_proj: whether they are quantized; lm_head: likewise, see head_kind."""

    kind: str
    kv: str | None = None
    group_size: int = 0
    act_method: int = 1
    anti_method: str = ""
    disable_names: tuple[str, ...] = ()
    disable_level: int = 0
    fraction: float = 0.01
    sigma_factor: float | None = None
    search: bool = True
    protect: bool = True
    symmetric: bool = True
    down_proj: bool = True
    lm_head: bool = False

    @property
    def head_kind(self) -> str:
        """The type of lm_head: W8A16, for its outputs are compared with one another; W8A8S beside W8A8S, to be compressed too."""
        return FLOAT if not self.lm_head else "W8A8S" if self.kind == "W8A8S" else "W8A16"

    @property
    def calibrated(self) -> bool:
        """Whether activations must be seen at all."""
        return self.kind in STATIC or self.kv is not None or bool(self.anti_method) or self.disable_level > 0

    @property
    def word(self) -> str:
        """config.json's `quantize`."""
        return "float" if self.kind == FLOAT else self.kind.lower()

    @property
    def stem(self) -> str:
        """What the names of the weight files begin with."""
        return "model" if self.kind == FLOAT else f"quant_model_weight_{self.word}"


def with_preset(preset: str | None, explicit: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(all flags: the defaults, then the preset's, then those given; what the preset set)."""
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    chosen = {key: value for key, value in PRESETS.get(preset or "", {}).items() if key not in explicit}
    return {**DEFAULTS, **chosen, **explicit}, chosen


def settings(flags: Mapping[str, Any]) -> Settings:
    """From flags as `with_preset` gives them. Raises ValueError, in one line, for what cannot be."""
    kind = _kind(flags)
    kv = C8 if flags["use_kvcache_quant"] else None
    if flags["use_fa_quant"]:
        if kv is not None:
            raise ValueError(
                "--use_kvcache_quant and --use_fa_quant exclude each other: a KV cache is of one type; give one of them"
            )
        kv = FAQUANT
    if kind == FLOAT and kv is None:
        raise ValueError(
            "--w_bit 16 --a_bit 16 leaves all layers in float, and so needs --use_kvcache_quant or --use_fa_quant; give one"
        )
    anti = _anti(flags, kind)
    if flags["act_method"] not in (1, 2, 3):
        raise ValueError(f"--act_method {flags['act_method']} is unknown; choose 1 (min-max), 2 (histogram) or 3 (auto)")
    if flags["disable_level"] not in _LEVELS:
        raise ValueError(f"--disable_level {flags['disable_level']!r} is unknown; choose L0 to L5")
    if not 0 <= flags["fraction"] < 1:
        raise ValueError(f"--fraction {flags['fraction']} must be a share from 0 to 1")
    if not 0 < flags["sigma_factor"] < inf:
        raise ValueError(f"--sigma_factor {flags['sigma_factor']} must be a number above 0")
    if not flags["w_sym"] and kind != "W8A16":
        raise ValueError(f"--w_sym False is for W8A16; {kind} weights are symmetric, leave it out")
    if flags["quantize_lm_head"] and kind == FLOAT:
        raise ValueError("--quantize_lm_head needs layers to quantize, and --w_bit 16 leaves none; leave it out")
    down = flags["down_proj"]
    return Settings(
        kind=kind,
        kv=kv,
        group_size=_group_size(flags, kind),
        act_method=flags["act_method"],
        anti_method=anti,
        disable_names=tuple(flags["disable_names"]),
        disable_level=_LEVELS.index(flags["disable_level"]),
        fraction=flags["fraction"],
        sigma_factor=flags["sigma_factor"] if flags["use_sigma"] else None,
        search=flags["is_lowbit"] or not flags["co_sparse"],
        protect=flags["open_outlier"],
        symmetric=flags["w_sym"],
        down_proj=kind not in STATIC if down is None else down == "all",
        lm_head=flags["quantize_lm_head"],
    )


def _kind(flags: Mapping[str, Any]) -> str:
    bits = (flags["w_bit"], flags["a_bit"])
    if bits not in _TYPES:
        known = ", ".join(f"--w_bit {w} --a_bit {a} ({name})" for (w, a), name in _TYPES.items() if name != FLOAT)
        raise ValueError(
            f"--w_bit {bits[0]} --a_bit {bits[1]} is not supported; choose {known}, or 16 and 16 for the KV cache alone"
        )
    kind = _TYPES[bits]
    asked = [flag for flag in _BY_TOKEN if flags[flag]]
    if not asked:
        return kind
    if len(asked) > 1:
        raise ValueError("--is_dynamic and --is_fp8 exclude each other: the first asks for int8, the other for float8; give one")
    if kind != "W8A8":
        raise ValueError(f"--{asked[0]} is for --w_bit 8 --a_bit 8, not for {kind}; leave it out")
    return _BY_TOKEN[asked[0]]


def _anti(flags: Mapping[str, Any], kind: str) -> str:
    method = flags["anti_method"].lower()
    if method in ("m2", "m5"):
        raise ValueError(f"--anti_method {method} is not public, and so not supported; choose m1, m3, m4 or m6")
    if method not in ANTI_METHODS:
        raise ValueError(f"--anti_method {method!r} is unknown; choose m1, m3, m4 or m6")
    if flags["do_smooth"]:
        if method not in ("", "m1"):
            raise ValueError(f"--do_smooth True is anti_method m1, and --anti_method says {method}; give one of them")
        method = "m1"
    if method and kind == FLOAT:
        raise ValueError(f"--anti_method {method} needs layers to quantize, and --w_bit 16 leaves none; leave it out")
    return str(method)


def _group_size(flags: Mapping[str, Any], kind: str) -> int:
    size = flags["group_size"]
    if kind != "W8A16":
        if size:
            raise ValueError(f"--group_size {size} is for W8A16 (--w_bit 8 --a_bit 16), not for {kind}; leave it out")
        return 0
    if size is None:
        return _PER_GROUP if flags["is_lowbit"] and not flags["open_outlier"] else 0
    if size not in GROUP_SIZES:
        raise ValueError(f"--group_size {size} is not supported; choose {', '.join(map(str, GROUP_SIZES))} (0: a whole row)")
    return int(size)

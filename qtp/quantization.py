"""What a checkpoint folder says of its quantization: `quantize` and `quantization_config` of config.json, and the description
file with the type of each tensor. The format is msModelSlim's, in whose words W8A8_FP8 is described too; or else
llm-compressor's (`compressed_tensors`). Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtp.compressed_tensors import METHOD, Scheme, read_scheme

FLOAT, FP8 = "FLOAT", "W8A8_FP8"
WEIGHT_TYPES = (FLOAT, "W8A8", "W8A8S", "W8A8SC", "W8A8_DYNAMIC", FP8, "W8A16")
C8, FAQUANT = "C8", "FAQuant"
GROUP_SIZES = (0, 64, 128, 256)
_WORDS = tuple(word.lower() for word in WEIGHT_TYPES)
_DESCRIPTION = "quant_model_description"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """word: as config.json's `quantize`, "float" where only the KV cache is quantized. types: of each tensor of the checkpoint.
    group_size: input columns that share a scale in W8A16, 0 for all. kv_cache: "C8", an int8 KV cache with a scale and an offset
    for each channel; "FAQuant", int8 queries, keys and values with a scale for each head; or None. source: the description's
    path, or config.json's where that says all by a `scheme`; types is empty then."""

    word: str
    types: Mapping[str, str] = field(hash=False)
    group_size: int
    kv_cache: str | None
    source: str
    scheme: Scheme | None = None

    @property
    def stem(self) -> str:
        """What the names of the weight files begin with."""
        return "model" if self.word == "float" or self.scheme is not None else f"quant_model_weight_{self.word}"

    def type_of(self, weight: str) -> str:
        """The type of a linear layer by the name of its weight. ValueError if the description lacks it or it is unknown."""
        if self.scheme is not None:
            return FP8 if self.scheme.quantizes(weight) else FLOAT
        kind = self.types.get(weight)
        if kind is None:
            raise ValueError(f"{self.source}: says nothing of {weight}; the description and config.json do not belong together")
        if kind not in WEIGHT_TYPES:
            raise ValueError(f"{self.source}: {weight} is of type {kind!r}, which is not supported; {_supported(WEIGHT_TYPES)}")
        return kind


def read_quantization(folder: Path, raw: dict[str, Any], source: str) -> Quantization | None:
    """From config.json's content `raw`, read from `source`, and the description in `folder`; None for a float checkpoint.
    ValueError, in one line, for what is unknown, missing or in disagreement."""
    word = raw.get("quantize")
    settings = raw.get("quantization_config") or raw.get("quantization") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{source}: quantization_config must be an object, not {settings!r}")
    if settings.get("quant_method") == METHOD:
        scheme = read_scheme(settings, source)
        return Quantization(word=FP8.lower(), types={}, group_size=0, kv_cache=None, source=source, scheme=scheme)
    if "quant_method" in settings:
        raise ValueError(
            f"{source}: quant_method {settings['quant_method']!r} is not supported; supported are {METHOD} in float8, and the "
            f"types of msModelSlim ({', '.join(_WORDS[1:])}), which python -m qtp.quantize makes from a float checkpoint"
        )
    if not word and not settings:
        return None
    if word is not None and (not isinstance(word, str) or word.lower() not in _WORDS):
        raise ValueError(f"{source}: quantize {word!r} is not supported; {_supported(_WORDS[1:])}")
    word = (word or "float").lower()
    path, content = _description(folder, word, source)
    kind = content.get("model_quant_type")
    if kind is not None and str(kind).lower() != word:
        raise ValueError(
            f"{path}: model_quant_type {kind!r} disagrees with quantize {word!r} in {source}; fetch both files again"
        )
    return Quantization(
        word=word,
        types={key: value for key, value in content.items() if isinstance(value, str)},
        group_size=_group_size(settings, content, source, path),
        kv_cache=_kv_cache(settings, content, source, path),
        source=str(path),
    )


def _description(folder: Path, word: str, source: str) -> tuple[Path, dict[str, Any]]:
    """The new form, which has a version, before the old one."""
    new, old = folder / f"{_DESCRIPTION}.json", folder / f"{_DESCRIPTION}_{word}.json"
    for path in (new, old):
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error}); fetch the file again") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}: holds a {type(content).__name__}, not a JSON object")
        if path is old or "version" in content or not old.exists():
            return path, content
    raise ValueError(
        f"{source}: says quantize {word!r}, and neither {new.name} nor {old.name} is beside it; fetch the folder again"
    )


def _group_size(settings: dict[str, Any], content: dict[str, Any], source: str, path: Path) -> int:
    told = {where: given["group_size"] for where, given in ((source, settings), (path, content)) if "group_size" in given}
    for where, size in told.items():
        if isinstance(size, bool) or size not in GROUP_SIZES:
            raise ValueError(f"{where}: group_size {size!r} is not supported; {_supported(GROUP_SIZES)} (0: a whole row)")
    if len(set(told.values())) > 1:
        raise ValueError(f"{path}: group_size {content['group_size']} disagrees with {settings['group_size']} in {source}")
    return next(iter(told.values()), 0)


def _kv_cache(settings: dict[str, Any], content: dict[str, Any], source: str, path: Path) -> str | None:
    told = set()
    for where, given in ((source, settings), (path, content)):
        for key, known in (("kv_quant_type", C8), ("kv_cache_type", C8), ("fa_quant_type", FAQUANT)):
            if not (value := given.get(key)):
                continue
            if value != known:
                raise ValueError(f"{where}: {key} {value!r} is not supported; {_supported((known,))}")
            told.add(known)
    if len(told) > 1:
        raise ValueError(f"{path}: a KV cache is of type C8 or FAQuant, not of both; quantize again with one of them")
    return next(iter(told), None)


def _supported(known: tuple[object, ...]) -> str:
    return f"supported: {', '.join(map(str, known))}"

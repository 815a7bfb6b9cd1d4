"""What llm-compressor says of a float8 checkpoint in config.json's quantization_config, whose quant_method is compressed-tensors.
Imports no torch.

Of its many schemes the one that W8A8_FP8 can hold is read, which it calls FP8_DYNAMIC: float8 e4m3 weights with a scale for each
output, activations by token. The tensors then have the names and shapes that W8A8_FP8 has.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

METHOD, FORMAT = "compressed-tensors", "float-quantized"
_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
_INPUTS = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
_DEFAULTS = {"type": "int", "symmetric": True, "dynamic": False}


@dataclass(frozen=True, slots=True)
class Scheme:
    """targets, ignore: names of linear layers, or regular expressions after 're:' that match where a name begins; as a target
    'Linear' is each of them."""

    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    def quantizes(self, weight: str) -> bool:
        layer = weight.removesuffix(".weight")
        return ("Linear" in self.targets or _among(layer, self.targets)) and not _among(layer, self.ignore)


def read_scheme(settings: Mapping[str, Any], source: str) -> Scheme:
    """From quantization_config, read from `source`. Raises ValueError, in one line, for any other scheme."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"{source}: quantization_config has no config_groups; fetch the file again")
    found: list[tuple[str, object, object]] = [
        ("kv_cache_scheme", settings.get("kv_cache_scheme"), None),
        ("sparsity_config", settings.get("sparsity_config") or None, None),
    ]
    targets: list[str] = []
    for name, group in groups.items():
        found.append((f"{name}.format", group.get("format") or settings.get("format"), FORMAT))
        found.append((f"{name}.output_activations", group.get("output_activations"), None))
        for part, needed in (("weights", _WEIGHTS), ("input_activations", _INPUTS)):
            given = group.get(part)
            told: Mapping[str, object] = given if isinstance(given, dict) else {}
            found += [(f"{name}.{part}.{key}", told.get(key, _DEFAULTS.get(key)), value) for key, value in needed.items()]
        targets += _patterns(group.get("targets"), f"{source}: {name}.targets")
    for where, is_, wanted in found:
        if is_ != wanted:
            raise ValueError(
                f"{source}: {METHOD} with {where} {is_!r} is not supported; of its schemes FP8_DYNAMIC is, others are made "
                "from the float checkpoint by python -m qtp.quantize"
            )
    return Scheme(tuple(targets), tuple(_patterns(settings.get("ignore") or [], f"{source}: ignore")))


def _patterns(given: object, where: str) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(pattern, str) for pattern in given):
        raise ValueError(f"{where} must be a list of names, not {given!r}; fetch the file again")
    for pattern in given:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(
                    f"{where} has {pattern!r}, which is no regular expression ({error}); fetch the file again"
                ) from None
    return given


def _among(layer: str, patterns: tuple[str, ...]) -> bool:
    return any(re.match(p[3:], layer) is not None if p.startswith("re:") else p == layer for p in patterns)

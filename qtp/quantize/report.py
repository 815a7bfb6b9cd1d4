"""What came of a run: lines to print, report.json, and a picture of each layer's error."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtp.quantization import FLOAT
from qtp.quantize.evaluate import Perplexity
from qtp.quantize.make import Outcome
from qtp.quantize.settings import Settings
from qtp.quantize.write import write_json

REPORT, PICTURE = "quantization_report.json", "quantization_report.png"


def lines(asked: Settings, outcome: Outcome) -> list[str]:
    """For stdout."""
    told = [f"calibrated on {outcome.samples} texts, {outcome.tokens} tokens"] if outcome.samples else ["no calibration needed"]
    left = [name for name, form in outcome.forms.items() if form == FLOAT]
    if asked.kind != FLOAT:
        told.append(
            f"{len(outcome.errors)} linear layers in {asked.kind}, {len(left)} in float: {', '.join(_short(left)) or 'none'}"
        )
    if asked.disable_level:
        open_to = {name: outcome.strained[name] for name in left if name in outcome.strained}
        told += [f"left in float by --disable_level: {name}, max|act|/std(act) {strain:.1f}" for name, strain in open_to.items()]
    told += [
        f"no token of the calibration reached {name.removesuffix('.gate_up')}: its ranges are those of all tokens of its layer"
        for name in outcome.unreached
    ]
    by_kind = defaultdict(list)
    for name, made in outcome.errors.items():
        by_kind[name.rsplit(".", 1)[-1]].append((made.output_error or made.weight_error, name))
    outputs = any(made.output_error is not None for made in outcome.errors.values())
    if by_kind:
        told.append(f"relative error of {'outputs' if outputs else 'weights'}: mean, and the largest")
    for kind, errors in by_kind.items():
        mean, (worst, name) = sum(e for e, _ in errors) / len(errors), max(errors)
        told.append(f"  {kind:10} {mean:.4f}  {worst:.4f} ({name})")
    for i, which in enumerate(("keys", "values")):
        if outcome.kv_errors:
            errors_of = [pair[i] for pair in outcome.kv_errors]
            mean, largest = sum(errors_of) / len(errors_of), max(errors_of)
            told.append(f"  {which:10} {mean:.4f}  {largest:.4f} (layer {errors_of.index(largest)})")
    return told


def _short(names: list[str]) -> list[str]:
    """Names with layers' numbers taken together where many differ in nothing else."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[re.sub(r"\.\d+\.", ".*.", name)].append(name)
    return [shape if len(some) > 1 else some[0] for shape, some in groups.items()]


def as_json(asked: Settings, outcome: Outcome, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the report file holds; errors with four digits."""
    return {
        "model_quant_type": asked.kind,
        "kv_quant_type": asked.kv,
        "flags": {key: list(value) if isinstance(value, tuple) else value for key, value in flags.items()},
        "calibration": {"texts": outcome.samples, "tokens": outcome.tokens},
        "float": [name for name, form in outcome.forms.items() if form == FLOAT],
        "max_over_std": {name: _digits(x) for name, x in outcome.strained.items()},
        "experts_without_tokens": [name.removesuffix(".gate_up") for name in outcome.unreached],
        "layers": {
            name: {"weight_error": _digits(made.weight_error), "output_error": _digits(made.output_error)}
            for name, made in outcome.errors.items()
        },
        "kv_cache": [{"key_error": _digits(key), "value_error": _digits(value)} for key, value in outcome.kv_errors],
        "seconds": round(outcome.seconds, 1),
    }


def write(folder: Path, content: Mapping[str, Any]) -> None:
    write_json(folder / REPORT, content)


def perplexities(before: Perplexity, after: Perplexity) -> tuple[str, dict[str, Any]]:
    """A line, and the report's entry."""
    change = after.value / before.value - 1
    line = f"perplexity over {before.tokens} tokens: {before.value:.4f} before, {after.value:.4f} after ({change:+.2%})"
    return line, {"tokens": before.tokens, "before": before.value, "after": after.value}


def draw(folder: Path, content: Mapping[str, Any]) -> str:
    """Draws each layer's error by its kind. Returns the line to print."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture of the errors: matplotlib is not installed; pip install 'qtp[report]'"
    series: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    found = {name: re.search(r"\.layers\.(\d+)\.", name) for name in content["layers"]}
    head = 1 + max((int(layer[1]) for layer in found.values() if layer), default=-1)  # behind the last layer
    for name, errors in content["layers"].items():
        layer = found[name]
        error = errors["weight_error"] if errors["output_error"] is None else errors["output_error"]
        series[name.rsplit(".", 1)[-1]][int(layer[1]) if layer else head].append(error)
    for layer_number, pair in enumerate(content["kv_cache"]):
        for which in ("key", "value"):
            series[f"{which} cache"][layer_number].append(pair[f"{which}_error"])
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for kind, by_layer in series.items():
        axes.plot(list(by_layer), [sum(some) / len(some) for some in by_layer.values()], marker="o", markersize=3, label=kind)
    axes.set(xlabel="layer", ylabel="relative error", yscale="log", title=f"{content['model_quant_type']}: error per layer")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(folder / PICTURE, dpi=120)
    return f"errors per layer: {PICTURE}, {REPORT}"


def _digits(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.4g}")

"""Draws what compare.py measured: a panel a case, a bar an engine (median; whiskers from the slowest to the fastest round), the
limit of bfloat16 as a line, and that of an engine whose weights or cache are quantized as a mark on its bar's height.

    python scripts/bench/picture.py JSON OUT

OUT is a PNG or SVG file. Needs matplotlib, and nothing of this project.
"""

import json
import sys
from pathlib import Path

import matplotlib  # type: ignore[import-not-found]

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # type: ignore[import-not-found]

COLORS = {"qtp": "#2a6f97", "transformers": "#c9ada7", "llama": "#e09f3e", "vllm": "#7f9172"}
LABELS = {
    "qtp-tp1": "this project, tp 1",
    "qtp-tp2": "this project, tp 2",
    "qtp-tp2-deterministic": "the same, deterministic",
    "transformers": "transformers",
    "llama": "llama.cpp",
    "llama-q8_0": "llama.cpp, Q8_0",
    "llama-q4_0": "llama.cpp, Q4_0",
    "vllm-tp1": "vLLM, tp 1",
    "vllm-tp2": "vLLM, tp 2",
}


def label(name: str) -> str:
    """As a reader knows it; quantized engines of this project are called qtp-tpN-WORD."""
    kind, _, word = name.rpartition("-")
    return LABELS.get(name) or f"{LABELS[kind]}, {word}"


def main() -> None:
    source, out = map(Path, sys.argv[1:])
    report = json.loads(source.read_text())
    cases = report["cases"]
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for panel, (case, speeds) in zip(panels.flat, cases.items(), strict=False):
        names = [name for name in LABELS if name in speeds] + [name for name in speeds if name not in (*LABELS, "limit")]
        low, medians, high = ([speeds[name][key] for name in names] for key in ("min", "median", "max"))
        whiskers = [[m - x for m, x in zip(medians, low, strict=True)], [x - m for m, x in zip(medians, high, strict=True)]]
        places = range(len(names))[::-1]
        panel.barh(
            places,
            medians,
            xerr=whiskers,
            color=[COLORS[name.partition("-")[0]] for name in names],
            error_kw={"ecolor": "#444444", "elinewidth": 0.8, "capsize": 2},
        )
        limit = speeds["limit"]["median"]
        panel.axvline(limit, color="#9e2a2b", linestyle="--", linewidth=1.2)
        own = [(place, speeds[name]["limit"]) for place, name in zip(places, names, strict=True)]
        marked = [(place, value) for place, value in own if value > 1.01 * limit]
        panel.scatter([x for _, x in marked], [place for place, _ in marked], marker="|", s=160, color="#9e2a2b", linewidths=1.6)
        right = max(limit, *high, *(value for _, value in marked))
        panel.set_xlim(0, 1.18 * right)
        for place, value, end in zip(places, medians, high, strict=True):
            panel.text(end + 0.015 * right, place, f"{value:,.0f}", fontsize=8, va="center")
        panel.set_yticks(places, [label(name) for name in names], fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
        kind, _, shape = case.partition(" ")
        batch, _, length = shape.partition("x")
        panel.set_title(f"{kind}, {batch} x {length} tokens of prompt", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    quantized = any(engine["weights"] != "bf16" for engine in report["engines"].values())
    what = "dashed: what memory (decode) or cores (prefill) allow" + (
        " in bfloat16; red marks: the same for these bytes" * quantized
    )
    figure.suptitle(
        f"{report['model']}{', bfloat16' * (not quantized)}, {report['threads']} threads, tokens a second; {what}", fontsize=10
    )
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()

"""The table of compare.py, and the ratios that this project wants to know."""

import statistics
from typing import Any

LIMIT = "limit"
Speeds = dict[str, list[float]]  # tokens a second by engine, one figure a round; the limit is that of bfloat16
PAIRS = (("qtp-tp2-w8a8", "llama-q8_0"), ("qtp-tp2-w8a8sc", "llama-q4_0"))
PACKED = ("qtp-tp2-w8a8sc", "qtp-tp2-w8a8")
CACHE, CACHE_CASE = ("qtp-tp2-kv8", "qtp-tp2"), "decode 1x16384"


def summary(values: list[float], limits: list[float]) -> dict[str, Any]:
    of_limit = statistics.median(value / limit for value, limit in zip(values, limits, strict=True))
    row = {"median": statistics.median(values), "min": min(values), "max": max(values), "of_limit": of_limit}
    return {**row, "limit": statistics.median(limits), "all": values}


def show(figures: dict[str, Speeds], sizes: dict[str, dict[str, float]], base: str) -> dict[str, Any]:
    """Prints the table. Returns its content, for the JSON. sizes: bytes that a decode step reads, by decode case and engine. Each
    engine has its own limit: for decode that of bfloat16 in the ratio of the bytes, for prefill that of all."""
    report = {}
    for case, speeds in figures.items():
        read = sizes.get(case)
        rows: dict[str, dict[str, Any]] = {}
        print(f"\n{case:20} {'tokens/s':>10} {'min':>10} {'max':>10} {'of limit':>9} {'MB a step':>10}  {base} is")
        for name, values in speeds.items():
            more = read[LIMIT] / read[name] if read else 1.0
            rows[name] = row = summary(values, [more * limit for limit in speeds[LIMIT]])
            row["ratio"] = statistics.median(against(speeds, base, name))
            row["step_bytes"] = read[name] if read else None
            told = f"{read[name] / 1e6:10,.1f}" if read else " " * 10
            ratio = "" if name == base else f"{row['ratio']:5.2f} times this"
            print(
                f"  {name if name != LIMIT else 'limit (bf16)':18} {row['median']:10.1f} {row['min']:10.1f} {row['max']:10.1f} "
                f"{row['of_limit']:9.2f} {told}  {ratio}"
            )
        report[case] = rows
        rivals = {name: row for name, row in rows.items() if name.startswith("vllm")}
        if len(rivals) > 1:
            print(f"  vLLM's best here is {max(rivals, key=lambda name: rivals[name]['median'])}")
    return report


def ratios(figures: dict[str, Speeds], weights: dict[str, float]) -> list[dict[str, Any]]:
    """Prints those whose engines are both there, and returns them for the JSON: of speeds within each round, and of the bytes of
    weights that a step reads."""
    found: list[dict[str, Any]] = []
    for case, speeds in figures.items():
        for pair in (*PAIRS, CACHE) if case == CACHE_CASE else PAIRS:
            if all(name in speeds for name in pair):
                rounds = against(speeds, *pair)
                found.append({"what": f"{case}, speed", "of": pair[0], "to": pair[1], "ratio": statistics.median(rounds)})
                found[-1] |= {"min": min(rounds), "max": max(rounds)}
    if all(name in weights for name in PACKED):
        one, other = (weights[name] for name in PACKED)
        what = f"weights a step, {one / 1e6:,.1f} to {other / 1e6:,.1f} MB"
        found.append({"what": what, "of": PACKED[0], "to": PACKED[1], "ratio": one / other})
    for row in found:
        spread = f" ({row['min']:.2f} to {row['max']:.2f})" if "min" in row else ""
        heading = "\nratios (medians of rounds; least to greatest)\n" if row is found[0] else ""
        print(f"{heading}  {row['of']} / {row['to']}: {row['ratio']:.3f}{spread}, {row['what']}")
    return found


def against(speeds: Speeds, ours: str, theirs: str) -> list[float]:
    """How many times as fast, in each round."""
    return [a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True)]

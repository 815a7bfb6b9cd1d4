"""What config.json and the description say of W8A8S, said of W8A8SC, and back."""

import json
from pathlib import Path
from typing import Any

_OTHER = {"w8a8s": "w8a8sc", "w8a8sc": "w8a8s"}


def turned(source: Path, description: Path) -> dict[str, bytes]:
    """config.json and the description of a W8A8S folder as they are once it is compressed, or of a W8A8SC one once it is not, by
    their names then."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    told: dict[str, Any] = json.loads(description.read_text(encoding="utf-8"))
    was = str(config["quantize"]).lower()
    now = _OTHER[was]
    types: dict[str, Any] = {}
    for name, kind in told.items():
        if kind != was.upper():
            types[name] = kind
        elif not name.endswith((".index", ".info")):
            types[name] = now.upper()
            if now == "w8a8sc" and name.endswith(".weight"):
                types |= {f"{name.removesuffix('.weight')}.{word}": now.upper() for word in ("index", "info")}
    return {
        description.name.replace(f"{was}.json", f"{now}.json"): _text(types),
        "config.json": _text(config | {"quantize": now}),
    }


def _text(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

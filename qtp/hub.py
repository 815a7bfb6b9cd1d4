"""Where a model's files are: a local folder, or a hub id whose files are fetched."""

import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "merges.txt", "*.jinja"]


def folder_of(model: str) -> Path:
    """The folder of `model`. A hub id (org/name) that is no local folder is downloaded, or taken from the hub's cache.
    Raises ValueError if it is neither or cannot be fetched."""
    path = Path(model).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(model):
        return path
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except Exception as error:  # its errors share no base class
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model {model!r}: no such folder, and fetching it from the hub failed ({first}); check the name or the network"
        ) from None

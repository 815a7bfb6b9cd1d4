"""The texts of calibration: the user's, or the few dozen that come with the package, as token ids."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from qtp.tokenizer import Tokenizer

_KEYS = ("inputs_pretokenized", "text", "prompt", "input", "question", "content")


def texts(calib_file: Path | None, calib_texts: Sequence[str] | None, tokenizer: Tokenizer) -> list[str]:
    """calib_file before calib_texts before the package's own. Raises ValueError for a file that cannot be read."""
    if calib_file is not None:
        return _from_file(calib_file, tokenizer)
    if calib_texts:
        return list(calib_texts)
    content = files("qtp.quantize").joinpath("calibration.txt").read_text(encoding="utf-8")
    return [text.strip("\n") for text in content.split("\n%%\n")]


def samples(given: Sequence[str], tokenizer: Tokenizer, length: int, vocab_size: int) -> list[list[int]]:
    """The first `length` ids of each text that has any. Raises ValueError if none has, or an id is none of the model's."""
    found = [ids[:length] for ids in map(tokenizer.encode, given) if ids]
    if not found:
        raise ValueError("calibration has no text that is not empty; give others with --calib_texts or --calib_file")
    largest = max(map(max, found))
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives id {largest}, and the model has {vocab_size}; tokenizer and model do not belong together"
        )
    return found


def _from_file(path: Path, tokenizer: Tokenizer) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"--calib_file {path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise ValueError(f"--calib_file {path}: is not UTF-8 text; convert the file") from None
    found = [_text(path, number, line, tokenizer) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ValueError(f"--calib_file {path}: holds no text; give one JSON object with a text in each line")
    return found


def _text(path: Path, number: int, line: str, tokenizer: Tokenizer) -> str:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--calib_file {path} line {number}: not valid JSON ({error}); give one object in each line") from None
    if isinstance(entry, list) and entry and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in entry):
        return tokenizer.chat(entry)
    if isinstance(entry, dict):
        entry = next((entry[key] for key in _KEYS if isinstance(entry.get(key), str)), None)
    if not isinstance(entry, str):
        raise ValueError(
            f"--calib_file {path} line {number}: holds no text; give a text, messages, or an object with {', '.join(_KEYS)}"
        )
    return entry

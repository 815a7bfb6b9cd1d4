"""What run_pa is asked to run: its input flags, in order of priority, as prompts."""

import errno
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtp.tokenizer import Tokenizer

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """text is None where ids were given."""

    text: str | None
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The input flags of run_pa as given. Priority: input_dict, then input_ids, then input_file for chat models, then
    input_texts. A text that is the path of a file stands for the file's content."""

    texts: Sequence[str]
    ids: Sequence[str] | None
    file: str | None
    dict: str | None
    chat: bool
    chat_template: str | None

    def prompts(self, tokenizer: Tokenizer | None) -> list[Prompt]:
        """Raises ValueError naming the flag, line or entry that is malformed."""
        if self.chat_template is not None and not self.chat:
            raise ValueError("--chat_template is for chat models; add --is_chat_model")
        if self.dict is not None:
            return [self._from_text(text, tokenizer) for text in _from_dict(self.dict)]
        if self.ids is not None:
            return [Prompt(None, _ids(entry)) for entry in self.ids]
        if self.file is not None:
            if not self.chat:
                raise ValueError("--input_file holds conversations; add --is_chat_model")
            return [self._from_messages(messages, tokenizer) for messages in _from_file(Path(self.file))]
        return [self._from_text(_content(text), tokenizer) for text in self.texts]

    def _from_text(self, text: str, tokenizer: Tokenizer | None) -> Prompt:
        if not text:
            raise ValueError("an input text is empty; give at least one character")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"input text {text[:20]!r} is not valid UTF-8; mend its encoding")
        if self.chat:
            return self._from_messages([{"role": "user", "content": text}], tokenizer)
        return Prompt(text, tuple(_needed(tokenizer).encode(text)))

    def _from_messages(self, messages: Messages, tokenizer: Tokenizer | None) -> Prompt:
        template = None if self.chat_template is None else _template(self.chat_template)
        text = _needed(tokenizer).chat(messages, template)
        return Prompt(text, tuple(_needed(tokenizer).encode(text)))


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError("--load_tokenizer False takes --input_ids alone; give ids, or load the tokenizer")
    return tokenizer


def _content(text: str) -> str:
    """The content of the file that `text` names, or `text` itself if it names none."""
    try:
        return Path(text).read_text(encoding="utf-8") if Path(text).is_file() else text
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # then it is no path
            return text
        raise ValueError(f"{text}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{text}: is not UTF-8 text; convert the file") from None
    except ValueError:  # an embedded null
        return text


def _template(text: str) -> str:
    content = _content(text)
    if "{{" not in content and "{%" not in content:
        raise ValueError(f"--chat_template {text!r} is neither a file nor a jinja template; check the path")
    return content


def _ids(entry: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in entry.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--input_ids {entry!r} is not a list of ids such as 1,2,3") from None


def _from_dict(text: str) -> list[str]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--input_dict is not valid JSON ({error}); give a list of {{'prompt': text}}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError("--input_dict must be a JSON list of {'prompt': text, 'adapter': id} that is not empty")
    return [_entry(number, entry) for number, entry in enumerate(entries)]


def _entry(number: int, entry: Any) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f"--input_dict entry {number} has no text under 'prompt'")
    if (entry.get("adapter") or "base") != "base":
        raise ValueError(f"--input_dict entry {number} names adapter {entry['adapter']!r}; LoRA is not supported yet, use 'base'")
    return str(entry["prompt"])


def _from_file(path: Path) -> list[Messages]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"--input_file {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"--input_file {path}: is not UTF-8 text") from None
    conversations = [_messages(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not conversations:
        raise ValueError(f"--input_file {path}: holds no conversation")
    return conversations


def _messages(path: Path, number: int, line: str) -> Messages:
    try:
        messages = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--input_file {path} line {number}: not valid JSON ({error})") from None
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f"--input_file {path} line {number}: must be a list of {{'role': text, 'content': text}}")
    return list(messages)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)

"""Text to ids and back, and chat templates, from the files of a checkpoint folder.

The libraries for either are imported where they are used: a run on token ids needs neither.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtp.config import read_json

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer as Backend

_QWEN2_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer:
    """The tokenizer of a Qwen checkpoint: tokenizer.json, or vocab.json with merges.txt.

    Raises ValueError naming the file if neither is there or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = folder / "tokenizer_config.json"
        self._settings: dict[str, Any] = read_json(settings) if settings.exists() else {}
        self._backend = _backend(folder, self._settings)
        self.size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        eos = self._backend.token_to_id(_content(self._settings.get("eos_token")) or "")
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Without special tokens; ids that the tokenizer does not know give nothing."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return text

    def chat(self, messages: Sequence[dict[str, str]], template: str | None = None) -> str:
        """The prompt for `messages` ({"role", "content"} each), ready for the assistant's turn. `template` is jinja text; None:
        the checkpoint's own. Raises ValueError if there is none, or if it rejects the messages."""
        source = template or self._chat_template()
        special = {key: _content(self._settings.get(key)) or "" for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            compiled = _environment().from_string(source)
            return compiled.render(messages=list(messages), add_generation_prompt=True, tools=None, **special)
        except Exception as error:  # a template is the user's code and may raise anything
            cause = f"{type(error).__name__}: {error}"
            raise ValueError(f"chat template of {self.folder}: {cause}; mend it or the messages") from None

    def _chat_template(self) -> str:
        file = self.folder / "chat_template.jinja"
        if file.exists():
            return file.read_text(encoding="utf-8")
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if not isinstance(template, str):
            raise ValueError(f"{self.folder}: has no chat template; give one, or use plain prompts")
        return template


def _backend(folder: Path, settings: dict[str, Any]) -> "Backend":
    from tokenizers import Tokenizer as Backend

    whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if whole.exists():
            return Backend.from_file(str(whole))
        if vocab.exists() and merges.exists():
            return _byte_level(vocab, merges, settings)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{folder}: the tokenizer files cannot be read ({error}); fetch them again") from None
    raise ValueError(
        f"{folder}: no tokenizer.json and no vocab.json with merges.txt; fetch them, or give --load_tokenizer False with ids"
    )


def _byte_level(vocab: Path, merges: Path, settings: dict[str, Any]) -> "Backend":
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    backend = Backend(BPE.from_file(str(vocab), str(merges)))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN2_PATTERN), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    added = sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    backend.add_special_tokens([token["content"] for _, token in added if token.get("special")])
    backend.add_tokens([token["content"] for _, token in added if not token.get("special")])
    return backend


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _environment() -> "ImmutableSandboxedEnvironment":
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    return environment

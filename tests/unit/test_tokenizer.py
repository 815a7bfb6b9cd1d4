"""Ids, text and chat prompts are those of transformers, from tokenizer.json and from vocab.json with merges.txt."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qtp.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "qtp" / "demo" / "dense"
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "def mean(data):\n    return sum(data) / len(data)\n",
    "class Path:\n\tdef __init__(self, *, a=1, **kw) -> None: ...\r\n\r\n",
    "tabs\t\tand   many    spaces   \n\n\n  at the end   ",
    "I'll, you've, WE'RE, it's 'quoted' \u2019s",
    "12345 3.14159 0x7f 1e-6 \u0664\u0665\u0666 \u00bd",
    "na\u00efve caf\u00e9 \u2014 cafe\u0301 (decomposed) \u212b \ufb01",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002\u4f60\u597d\uff0c\u4e16\u754c",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947 \ud55c\uad6d\uc5b4",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5 \u270b\U0001f3fd",
    "\x00\x01\x7f\u200b\ufeff\ufffd\U0010ffff",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "half a <|im_start special <|im_end|><|im_end|> token |>",
    "a" * 300,
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(5)
    ranges = [(32, 126), (9, 13), (160, 591), (0x370, 0x5FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
    texts = []
    for _ in range(count):
        picked = [rng.choice(ranges) for _ in range(rng.randint(1, 60))]
        texts.append("".join(chr(rng.randint(*bounds)) for bounds in picked))
    return texts


@pytest.fixture(scope="module")
def oracle() -> Any:
    return AutoTokenizer.from_pretrained(str(DEMO))


@pytest.fixture(scope="module")
def from_merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the older pair of files, taken out of tokenizer.json."""
    folder = tmp_path_factory.mktemp("merges")
    model = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    shutil.copy(DEMO / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.json and merges.txt"])
def tokenizer(request: pytest.FixtureRequest, from_merges: Path) -> Tokenizer:
    return Tokenizer(DEMO if request.param == "tokenizer.json" else from_merges)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_and_text_equal_transformers(text: str, tokenizer: Tokenizer, oracle: Any) -> None:
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text)
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


def test_random_texts_equal_transformers(tokenizer: Tokenizer, oracle: Any) -> None:
    for text in random_texts(150):
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text), repr(text)
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True), repr(text)


def test_random_ids_decode_as_in_transformers(tokenizer: Tokenizer, oracle: Any) -> None:
    rng = random.Random(6)
    for _ in range(150):
        ids = [rng.randrange(tokenizer.size) for _ in range(rng.randint(1, 12))]
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True), ids


def test_special_tokens_and_size(tokenizer: Tokenizer, oracle: Any) -> None:
    assert tokenizer.size == len(oracle) == 4099
    assert tokenizer.eos_token_ids == (oracle.eos_token_id,) == (4098,)
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [4096, 4097, 4098]
    assert tokenizer.decode([4097, *tokenizer.encode("hi"), 4098]) == "hi"
    assert tokenizer.decode([tokenizer.size, 4159, 10**6]) == ""


CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?\n"}],
    [
        {"role": "user", "content": "caf\u00e9 \U0001f600 <b>&amp;</b> {{ braces }}"},
        {"role": "assistant", "content": "  spaces  "},
        {"role": "user", "content": ""},
    ],
    [{"role": "system", "content": "only a system turn"}],
]


@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
def test_chat_equals_transformers(messages: list[dict[str, str]], tokenizer: Tokenizer, oracle: Any) -> None:
    prompt = tokenizer.chat(messages)
    assert prompt == oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")


TEMPLATES = [
    "{%- for m in messages %}\n  {%- if m.role == 'user' %}\n    {{- m.content | trim }}\n  {%- endif %}\n{%- endfor %}",
    "{% for m in messages %}\n{% if loop.index > 1 %}{% break %}{% endif %}\n    {{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{% if not tools %}no tools{% endif %}",
    "{{ eos_token }}|{{ pad_token }}{% if add_generation_prompt %}|go{% endif %}",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
def test_other_templates_equal_transformers(
    messages: list[dict[str, str]], template: str, tokenizer: Tokenizer, oracle: Any
) -> None:
    expected = oracle.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert tokenizer.chat(messages, template) == expected


def test_a_template_can_refuse(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"chat template of .*roles must alternate"):
        tokenizer.chat(CHATS[0], "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="chat template of"):
        tokenizer.chat(CHATS[0], "{% for m in messages %}")


def test_a_template_is_sandboxed(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="chat template of"):
        tokenizer.chat(CHATS[0], "{{ ''.__class__.__mro__[1].__subclasses__() }}")


def test_templates_are_found_where_checkpoints_keep_them(tmp_path: Path) -> None:
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(tmp_path).chat(CHATS[0])
    named = [{"name": "rag", "template": "wrong"}, {"name": "default", "template": "one {{ messages[0].content }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer(tmp_path).chat(CHATS[0]) == "one Hi"
    (tmp_path / "chat_template.jinja").write_text("two {{ messages[0].content }}", encoding="utf-8")
    assert Tokenizer(tmp_path).chat(CHATS[0]) == "two Hi"


def test_missing_or_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json and no vocab\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer files cannot be read"):
        Tokenizer(tmp_path)

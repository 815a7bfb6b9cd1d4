"""The parts of the engine that need no model: the block pool, text from tokens, stop texts, sampling parameters."""

import math
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qtp.engine.detokenize import Detokenizer, find_stop
from qtp.engine.sampling_params import SamplingParams
from qtp.kv.blocks import BlockPool
from qtp.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "qtp" / "demo" / "dense"
REPLACEMENT = "\ufffd"


class PoolMachine(RuleBasedStateMachine):
    """The pool beside a plain queue that says what must be given out next."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.expected, self.owners = BlockPool(7, 4), deque(range(7)), list[list[int]]()

    @rule(count=st.integers(0, 9))
    def take(self, count: int) -> None:
        blocks = self.pool.take(count)
        if count > len(self.expected):
            assert blocks is None
            return
        assert blocks == [self.expected.popleft() for _ in range(count)]
        self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        blocks = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.pool.give_back(blocks)
        self.expected.extend(blocks)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def give_back_what_is_free(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.expected)))
        with pytest.raises(AssertionError):
            self.pool.give_back([block])

    @precondition(lambda self: any(self.owners))
    @rule()
    def give_back_twice_at_once(self) -> None:
        block = next(blocks[0] for blocks in self.owners if blocks)
        with pytest.raises(AssertionError):
            self.pool.give_back([block, block])

    @invariant()
    def no_block_has_two_owners(self) -> None:
        owned = [block for blocks in self.owners for block in blocks]
        assert sorted([*owned, *self.expected]) == list(range(7))
        assert self.pool.num_free == len(self.expected)


TestBlockPool = PoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(tokens=st.integers(0, 2000), block_size=st.integers(1, 130))
def test_needed_blocks_hold_the_tokens(tokens: int, block_size: int) -> None:
    needed = BlockPool(1, block_size).needed(tokens)
    assert needed * block_size >= tokens > (needed - 1) * block_size or needed == tokens == 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO)


def fed(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[list[str], Detokenizer]:
    """The text after each token, and the detokenizer."""
    detokenizer, texts = Detokenizer(tokenizer), []
    for i in ids:
        detokenizer.add(i)
        texts.append(detokenizer.text)
    return texts, detokenizer


unicode_texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters=REPLACEMENT), max_size=25)


@settings(max_examples=200, deadline=None)
@given(text=unicode_texts)
def test_text_of_growing_tokens_is_the_text_of_all(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    texts, detokenizer = fed(tokenizer, ids)
    assert all(whole.startswith(so_far) for so_far in texts)
    assert all(REPLACEMENT not in so_far for so_far in texts)
    assert texts == sorted(texts, key=len)
    assert detokenizer.text == whole
    detokenizer.flush()
    assert detokenizer.text == whole


@pytest.mark.parametrize(
    "text", ["\U0001f468\u200d\U0001f469\u200d\U0001f467!", "\u6771\u4eac\u90fd", "caf\u00e9 \u2603 \U0010ffff."]
)
def test_characters_of_several_tokens_come_whole(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert any(REPLACEMENT in tokenizer.decode([i]) for i in ids), "no character of this text is split over tokens"
    texts, detokenizer = fed(tokenizer, ids)
    assert texts[-1] == text
    assert REPLACEMENT not in "".join(texts)
    assert len(set(texts)) > 1
    for cut in range(len(ids)):
        texts, detokenizer = fed(tokenizer, ids[:cut])
        assert text.startswith(detokenizer.text)
        detokenizer.flush()
        assert detokenizer.text == tokenizer.decode(ids[:cut])


def test_text_of_any_tokens_is_the_text_of_all_after_a_flush(tokenizer: Tokenizer) -> None:
    """A model may sample bytes that are no UTF-8, special tokens, and ids that the tokenizer does not know."""
    rng = random.Random(8)
    single_bytes = [i for i in range(256) if REPLACEMENT in tokenizer.decode([i])]
    for _ in range(300):
        known = [rng.randrange(tokenizer.size + 3) for _ in range(rng.randint(0, 12))]
        ids = [rng.choice(single_bytes) if rng.random() < 0.4 else i for i in known]
        texts, detokenizer = fed(tokenizer, ids)
        detokenizer.flush()
        assert detokenizer.text == tokenizer.decode(ids), ids
        assert all(not so_far.endswith(REPLACEMENT) for so_far in texts)


def test_text_may_be_asked_for_at_any_time(tokenizer: Tokenizer) -> None:
    """What was decoded at once is what comes token by token, where characters are complete and where they are not."""
    rng = random.Random(9)
    single_bytes = [i for i in range(256) if REPLACEMENT in tokenizer.decode([i])]
    held = 0
    for _ in range(300):
        ids = [rng.choice(single_bytes) if rng.random() < 0.3 else rng.randrange(tokenizer.size + 3) for _ in range(20)]
        texts, _ = fed(tokenizer, ids)
        detokenizer = Detokenizer(tokenizer)
        for token_id, text in zip(ids, texts, strict=True):
            detokenizer.add(token_id)
            if rng.random() < 0.2:
                assert detokenizer.text == text
                held += text != tokenizer.decode(detokenizer._ids)
        detokenizer.flush()
        assert detokenizer.text == tokenizer.decode(ids)
    assert held > 100


@settings(max_examples=200)
@given(
    pieces=st.lists(st.text("ab<>", min_size=0, max_size=3), max_size=12),
    stops=st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_are_found_across_pieces(pieces: list[str], stops: list[str]) -> None:
    """Searching after each piece finds the place that a search of the whole finds first complete."""
    text = ""
    for piece in pieces:
        known, text = len(text), text + piece
        place = find_stop(text, stops, known)
        anywhere = [text.find(stop) for stop in stops if stop in text]
        assert place == (min(anywhere) if anywhere else None)
        if place is not None:
            break


@pytest.mark.parametrize(
    ("text", "stops", "known", "place"),
    [
        ("one<|two", ["<|"], 4, 3),
        ("one<|two", ["<|"], 3, 3),
        ("one<|two", ["<|"], 5, None),
        ("abc", ["c", "bc"], 1, 1),
        ("xxENDyyEND", ["END"], 4, 2),
        ("xx", [], 0, None),
        ("xx", ["xxx"], 0, None),
    ],
)
def test_find_stop(text: str, stops: list[str], known: int, place: int | None) -> None:
    assert find_stop(text, stops, known) == place


BAD: list[tuple[str, Any]] = [
    *(("max_tokens", v) for v in (0, -1, 1.5, "9", True)),
    *(("min_tokens", v) for v in (-1, 17, 0.5, None, True)),
    *(("temperature", v) for v in (-0.1, math.inf, math.nan, "1", None, True)),
    *(("top_p", v) for v in (0, 0.0, 1.01, -1, math.nan, "x", None)),
    *(("top_k", v) for v in (-2, 0.5, None, True, "5")),
    *(("min_p", v) for v in (-0.01, 1.01, math.nan, None)),
    *(("repetition_penalty", v) for v in (0, -1.0, math.inf, math.nan, None)),
    *(("presence_penalty", v) for v in (-2.01, 2.01, math.nan, "0")),
    *(("frequency_penalty", v) for v in (-2.01, 2.01, math.nan, None)),
    *(("seed", v) for v in (-1, 2**63, 1.0, True, "7")),
    *(("n", v) for v in (0, -1, 1025, 1.0, None)),
    *(("logprobs", v) for v in (-2, 1.5, True, "all")),
    *(("prompt_logprobs", v) for v in (-2, 0.0, False)),
    *(("stop", v) for v in ("", [""], ["a", ""], [3], ["a", None], 3, b"x")),
    *(("stop_token_ids", v) for v in (["a"], [1.0], [None], 7)),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_parameter_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} ") as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)


GOOD: list[dict[str, Any]] = [
    {},
    {"max_tokens": None, "min_tokens": 50},
    {"max_tokens": 3, "min_tokens": 3},
    {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 1, "n": 1024},
    {"temperature": 100.0, "top_p": 1e-9, "top_k": 10**6, "min_p": 0},
    {"repetition_penalty": 0.01, "presence_penalty": -2, "frequency_penalty": 2.0, "seed": 2**63 - 1},
    {"logprobs": -1, "prompt_logprobs": 0, "stop_token_ids": [], "stop": []},
    {"stop": "x", "stop_token_ids": (1, 2)},
]


@pytest.mark.parametrize("words", GOOD, ids=range(len(GOOD)))
def test_the_ends_of_each_range_are_allowed(words: dict[str, Any]) -> None:
    params = SamplingParams(**words)
    assert {name: getattr(params, name) for name in words} == words


def test_stop_texts_in_all_their_forms() -> None:
    assert SamplingParams().stops == SamplingParams(stop=[]).stops == ()
    assert SamplingParams(stop="ab").stops == SamplingParams(stop=["ab"]).stops == ("ab",)
    assert SamplingParams(stop=("a", "b")).stops == ("a", "b")

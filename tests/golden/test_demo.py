"""Proves that the checkpoints which ship with the package give transformers' text and perplexity at tp 1 to 4, in float32.

The weights may be trained anew: nothing here depends on them, but that the recorded perplexity is theirs.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from device_helper import between_processes
from models_helper import Reference, open_llm, refer

import qtp
from qtp import LLM, SamplingParams
from qtp.tokenizer import Tokenizer

DEMO = Path(qtp.__file__).parent / "demo"
NAMES = ("dense", "moe")
TOKENS = 200
PROMPT = "def _integer_sqrt_of_frac"
WORLD_SIZES = (1, 2, 3, 4)

Refer = Callable[[str], Reference]


def _held_out(name: str) -> list[int]:
    """The token ids of the held-out text."""
    return Tokenizer(DEMO / name).encode((DEMO / "held_out.txt").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def refer_to() -> Refer:
    """The Reference of a demo checkpoint, which continues 200 tokens of the held-out text from PROMPT on; made once."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            text = (DEMO / "held_out.txt").read_text(encoding="utf-8")
            prompt = Tokenizer(DEMO / name).encode(text[text.index(PROMPT) :])[:200]
            made[name] = refer(DEMO / name, prompt, TOKENS, distinct=8, least_margin=1e-4)
        return made[name]

    return get


def _greedy(llm: LLM, prompt: list[int]) -> list[int]:
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))[0]
    return list(output.outputs[0].token_ids)


@pytest.mark.parametrize("tp", WORLD_SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_that_of_transformers(name: str, tp: int, refer_to: Refer) -> None:
    with open_llm(DEMO / name, tp) as llm:
        assert _greedy(llm, refer_to(name).prompt) == refer_to(name).tokens


def test_greedy_text_of_two_processes_is_that_of_transformers(refer_to: Refer) -> None:
    with open_llm(DEMO / "moe", 2, communicator="auto") as llm:
        assert llm.config.communicator == between_processes(2)
        assert _greedy(llm, refer_to("moe").prompt) == refer_to("moe").tokens


@pytest.mark.parametrize("tp", WORLD_SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_held_out_perplexity_is_the_recorded_one(name: str, tp: int) -> None:
    """The definition is `perplexity` in scripts/train_demo.py, by which transformers' value was recorded. Each world size is
    held to it within 1e-5, so any two agree to more than four digits."""
    recorded = json.loads((DEMO / name / "perplexity.json").read_text(encoding="utf-8"))
    ids, length = _held_out(name), recorded["window"]
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    with open_llm(DEMO / name, tp, block_size=128, max_num_batched_tokens=2048) as llm:
        outputs = llm.generate(windows, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    told = []
    for window, output in zip(windows, outputs, strict=True):
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(window)
        told += [row[token].logprob for row, token in zip(output.prompt_logprobs[1:], window[1:], strict=True) if row]
    assert len(told) == recorded["tokens"]
    assert math.exp(-math.fsum(told) / len(told)) == pytest.approx(recorded["held_out_perplexity"], rel=1e-5)

"""Proves over shared memory and gloo what tests/loopback/test_deterministic.py proves over threads."""

from pathlib import Path

import pytest
from models_helper import make_checkpoint, random_ids

from qtp import LLM, RequestOutput, SamplingParams

SIZES = {
    "qwen2": {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56, "intermediate_size": 90},
    "qwen2_moe": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "num_experts": 13,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 34,
        "shared_expert_intermediate_size": 45,
    },
}
PROMPTS = [random_ids(length, 131, length) for length in (61, 5, 33)]
PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=4, prompt_logprobs=2)


def told(llm: LLM) -> list[object]:
    def one(output: RequestOutput) -> object:
        return output.outputs[0].token_ids, output.outputs[0].logprobs, output.prompt_logprobs

    return [one(output) for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("family", SIZES)
def test_the_same_bits_over_every_transport(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", family, seed=5, vocab_size=131, num_hidden_layers=2, **SIZES[family])

    def run(tp: int, communicator: str = "auto") -> list[object]:
        choices = {"dtype": "bfloat16", "communicator": communicator, "threads": 1, "block_size": 8, "max_num_batched_tokens": 40}
        with LLM(str(folder), tp, deterministic=True, load_tokenizer=False, **choices) as llm:
            return told(llm)

    expected = run(1)
    for tp, communicator in ((2, "shm"), (4, "shm"), (2, "gloo"), (4, "gloo"), (8 if family == "qwen2_moe" else 2, "loopback")):
        assert run(tp, communicator) == expected, (tp, communicator)

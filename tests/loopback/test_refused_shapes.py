"""Proves that the published head, expert and vocabulary counts which other runtimes refuse give transformers' numbers here.

Counts are the published ones; head_dim, columns and depth are cut down, and keep what does not divide the world size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models_helper import Reference, check, make_checkpoint, open_llm, random_ids, refer, run_workers

from qtp import SamplingParams

TOKENS = 16
QWEN2_57B = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 320}
QWEN15_MOE = {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 22, "shared_expert_intermediate_size": 88}

# family, query heads, KV heads, seed, the rest, world sizes
SHAPES: dict[str, tuple[str, int, int, int, dict[str, Any], tuple[int, ...]]] = {
    "qwen2-7b": ("qwen2", 28, 4, 1, {"intermediate_size": 148, "vocab_size": 297}, (3, 5, 6, 7, 8)),
    "qwen2-0.5b": (
        "qwen2",
        14,
        2,
        1,
        {"head_dim": 8, "intermediate_size": 76, "vocab_size": 211, "tie_word_embeddings": True},
        (3, 4, 5, 6, 7, 8),
    ),
    "qwen2-1.5b": (
        "qwen2",
        12,
        2,
        1,
        {"head_dim": 8, "intermediate_size": 70, "vocab_size": 211, "tie_word_embeddings": True},
        (8,),
    ),
    "qwen2.5-14b": ("qwen2", 40, 8, 1, {"intermediate_size": 108, "vocab_size": 297}, (3, 5, 6, 7)),
    "qwen1.5-moe": ("qwen2_moe", 16, 16, 1, {"intermediate_size": 88, "vocab_size": 211, **QWEN15_MOE}, (7, 8)),
    "qwen2-57b": ("qwen2_moe", 28, 4, 1, {"intermediate_size": 148, "vocab_size": 211, **QWEN2_57B}, (3, 5, 6)),
}

Refer = Callable[[str], Reference]


def _write(folder: Path, family: str, heads: int, kv_heads: int, seed: int, rest: dict[str, Any]) -> Path:
    sizes = {"hidden_size": heads * 4, "head_dim": 4, "num_hidden_layers": 2, "rope_parameters": {"rope_theta": 1e6}}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return make_checkpoint(folder, family, seed=seed, **{**sizes, **rest})


@pytest.fixture(scope="module")
def refer_to(tmp_path_factory: pytest.TempPathFactory) -> Refer:
    """The Reference of a shape by name; made once."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            family, heads, kv_heads, seed, rest, _ = SHAPES[name]
            folder = _write(tmp_path_factory.mktemp(name), family, heads, kv_heads, seed, rest)
            made[name] = refer(folder, random_ids(11, rest["vocab_size"], seed), TOKENS, distinct=8)
        return made[name]

    return get


@pytest.mark.parametrize(("name", "tp"), [(name, tp) for name, shape in SHAPES.items() for tp in shape[-1]])
def test_counts_that_do_not_divide(name: str, tp: int, refer_to: Refer) -> None:
    with open_llm(refer_to(name).folder, tp) as llm:
        check(llm, refer_to(name))


def test_vocabulary_of_151646_on_four_ranks(tmp_path: Path) -> None:
    rest = {"hidden_size": 16, "intermediate_size": 37, "vocab_size": 151646}
    folder = _write(tmp_path, "qwen2", 28, 4, 1, rest)
    reference = refer(folder, random_ids(5, 151646, 1), TOKENS, distinct=8)
    assert (run_workers(folder, 4, reference.ids) - reference.logprobs).abs().max().item() <= 1e-4
    with open_llm(folder, 4) as llm:
        output = llm.generate(reference.prompt, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))[0]
    assert list(output.outputs[0].token_ids) == reference.tokens

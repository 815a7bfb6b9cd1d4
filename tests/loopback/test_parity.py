"""Proves that small random models of both families give transformers' numbers at every world size that their heads allow.

In float32 each log-probability at each position is within 1e-4 of transformers' and 64 greedy tokens are identical, whatever
does not divide the world size: query heads, KV heads, columns, vocabulary, experts. In half precision the error is that of
transformers in the same dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from device_helper import CHOSEN
from models_helper import Reference, check, make_checkpoint, open_llm, oracle, oracle_logprobs, random_ids, refer, run

TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint: heads, then what is particular to it in the words of transformers' config classes."""

    family: str
    heads: tuple[int, int]
    seed: int
    config: dict[str, Any] = field(default_factory=dict)
    old_words: bool = False

    @property
    def largest_tp(self) -> int:
        return min(8, self.heads[0])


def _rope(theta: float, **yarn: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": "yarn" if yarn else "default", **yarn}


def _dense(heads: int, kv_heads: int, seed: int, *, old_words: bool = False, **config: Any) -> Case:
    return Case(family="qwen2", heads=(heads, kv_heads), seed=seed, config=config, old_words=old_words)


def _moe(heads: int, kv_heads: int, seed: int, experts: int, top_k: int, *, old_words: bool = False, **config: Any) -> Case:
    config = {"num_experts": experts, "num_experts_per_tok": top_k, **config}
    return Case(family="qwen2_moe", heads=(heads, kv_heads), seed=seed, config=config, old_words=old_words)


SLIDING, FULL = "sliding_attention", "full_attention"

CASES = {
    "7-1-tied": _dense(7, 1, 3, hidden_size=56, tie_word_embeddings=True, rope_parameters=_rope(1e4)),
    "14-2-untied-old-words": _dense(14, 2, 3, hidden_size=84, rope_parameters=_rope(1e6), old_words=True),
    "6-3-yarn-old-words-own-head-dim": _dense(
        6,
        3,
        1,
        hidden_size=50,
        head_dim=16,
        old_words=True,
        rope_parameters=_rope(1e4, factor=4.0, original_max_position_embeddings=64),
    ),
    "10-5-yarn-attention-factor-tied": _dense(
        10,
        5,
        6,
        hidden_size=80,
        tie_word_embeddings=True,
        rope_parameters=_rope(1e4, factor=2.5, original_max_position_embeddings=64, attention_factor=1.4, truncate=False),
    ),
    "12-4-sliding-by-layer-types": _dense(
        12,
        4,
        3,
        hidden_size=72,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=[SLIDING, FULL, SLIDING],
        rope_parameters=_rope(1e5),
    ),
    "8-8-sliding-old-words": _dense(
        8,
        8,
        1,
        hidden_size=64,
        num_hidden_layers=3,
        old_words=True,
        use_sliding_window=True,
        sliding_window=19,
        max_window_layers=1,
        rope_parameters=_rope(5e6),
    ),
    "9-3-yarn-betas": _dense(
        9,
        3,
        1,
        hidden_size=46,
        head_dim=14,
        rms_norm_eps=1e-3,
        rope_parameters=_rope(
            5e5, factor=3.0, original_max_position_embeddings=100, beta_fast=2.0, beta_slow=0.1, attention_factor=0.8
        ),
    ),
    "moe-8-2-60-experts-top-4": _moe(8, 2, 2, 60, 4, hidden_size=64, norm_topk_prob=False),
    "moe-14-2-one-expert": _moe(14, 2, 6, 1, 1, hidden_size=56, norm_topk_prob=False, tie_word_embeddings=True),
    "moe-7-1-no-bias-normalised": _moe(7, 1, 3, 5, 2, hidden_size=42, qkv_bias=False, norm_topk_prob=True),
    "moe-12-4-sparse-step-2": _moe(
        12, 4, 3, 16, 3, hidden_size=72, num_hidden_layers=3, decoder_sparse_step=2, norm_topk_prob=True, old_words=True
    ),
    "moe-8-8-dense-layer-all-experts": _moe(
        8,
        8,
        5,
        10,
        10,
        hidden_size=48,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        norm_topk_prob=False,
        use_sliding_window=True,
        sliding_window=11,
        layer_types=[FULL, SLIDING, SLIDING],
    ),
    "moe-10-5-yarn-top-1": _moe(
        10,
        5,
        2,
        13,
        1,
        hidden_size=54,
        head_dim=8,
        old_words=True,
        rope_parameters=_rope(1e4, factor=4.0, original_max_position_embeddings=64, attention_factor=1.2),
    ),
    "moe-16-16-sliding-old-words": _moe(
        16,
        16,
        2,
        9,
        3,
        hidden_size=64,
        num_hidden_layers=3,
        mlp_only_layers=[0],
        old_words=True,
        norm_topk_prob=True,
        use_sliding_window=True,
        sliding_window=13,
        max_window_layers=3,
    ),
}
SIZES: dict[str, Any] = {"vocab_size": 131, "intermediate_size": 37, "num_hidden_layers": 2}
MOE_SIZES = {"moe_intermediate_size": 19, "shared_expert_intermediate_size": 29}

Refer = Callable[[str], Reference]


@pytest.fixture(scope="module")
def refer_to(tmp_path_factory: pytest.TempPathFactory) -> Refer:
    """The Reference of a case by name; made once."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            case = CASES[name]
            heads = {"num_attention_heads": case.heads[0], "num_key_value_heads": case.heads[1]}
            sizes = {**SIZES, **(MOE_SIZES if case.family == "qwen2_moe" else {}), **heads, **case.config}
            folder = make_checkpoint(
                tmp_path_factory.mktemp(name), case.family, seed=case.seed, old_words=case.old_words, **sizes
            )
            made[name] = refer(folder, random_ids(26, sizes["vocab_size"], case.seed), TOKENS, distinct=16)
        return made[name]

    return get


@pytest.mark.parametrize(("name", "tp"), [(name, tp) for name, case in CASES.items() for tp in range(1, case.largest_tp + 1)])
def test_float32_gives_the_numbers_of_transformers(name: str, tp: int, refer_to: Refer) -> None:
    with open_llm(refer_to(name).folder, tp) as llm:
        assert llm.config.kernels == CHOSEN.kernels[0]
        check(llm, refer_to(name))


@pytest.mark.parametrize(("name", "tp"), [(name, tp) for name, case in CASES.items() for tp in {1, 3, case.largest_tp}])
def test_so_do_the_kernels_in_torch(name: str, tp: int, refer_to: Refer) -> None:
    with open_llm(refer_to(name).folder, tp, kernels="torch") as llm:
        check(llm, refer_to(name))


@pytest.mark.parametrize(("name", "tp"), [(name, tp) for name in CASES for tp in (1, 4)])
def test_so_do_sums_by_leaves(name: str, tp: int, refer_to: Refer) -> None:
    with open_llm(refer_to(name).folder, tp, deterministic=True) as llm:
        check(llm, refer_to(name))


SPLITS = [
    ("moe-8-2-60-experts-top-4", 3, 1, 3),
    ("moe-8-2-60-experts-top-4", 4, 2, 2),
    ("moe-8-2-60-experts-top-4", 5, 5, 1),
    ("moe-8-2-60-experts-top-4", 8, 4, 2),
    ("moe-10-5-yarn-top-1", 4, 1, 4),
    ("moe-10-5-yarn-top-1", 6, 3, 2),
    ("moe-12-4-sparse-step-2", 6, 2, 3),
    ("moe-16-16-sliding-old-words", 8, 2, 4),
]


@pytest.mark.parametrize(("name", "tp", "moe_ep", "moe_tp"), SPLITS)
def test_experts_cut_by_expert_and_by_column(name: str, tp: int, moe_ep: int, moe_tp: int, refer_to: Refer) -> None:
    with open_llm(refer_to(name).folder, tp, moe_ep=moe_ep, moe_tp=moe_tp) as llm:
        check(llm, refer_to(name))


@pytest.mark.parametrize("kernels", CHOSEN.kernels)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["10-5-yarn-attention-factor-tied", "moe-8-8-dense-layer-all-experts"])
@pytest.mark.parametrize("tp", [1, 3, 8])
def test_half_precision_errs_no_more_than_transformers(
    name: str, dtype: torch.dtype, tp: int, kernels: str, refer_to: Refer
) -> None:
    """The yardstick is the root mean square error of transformers in the same dtype. No router chooses here (all experts are
    taken), so that rounding cannot flip a choice."""
    reference = refer_to(name)
    peer = oracle_logprobs(oracle(reference.folder, dtype), reference.ids)
    with open_llm(reference.folder, tp, dtype=str(dtype).removeprefix("torch."), kernels=kernels) as llm:
        logprobs, _ = run(llm, reference.ids, reference.prompt, 1)
    yardstick = _rms(peer - reference.logprobs)
    assert 0.5 < _rms(logprobs - reference.logprobs) / yardstick < 1.25


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()

"""Proves that with `deterministic` a request's tokens and logprobs are the same bits in any company, however its prompt is cut
into chunks, after preemption, and at 1, 2, 4 and 8 ranks, dense and with experts, in bfloat16 and float32."""

from pathlib import Path
from typing import Any

import pytest
from models_helper import make_checkpoint, random_ids

from qtp import LLM, RequestOutput, SamplingParams

VOCAB = 151
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 112, "intermediate_size": 203},
    "qwen2_moe": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 64,
        "num_experts": 11,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 38,
        "shared_expert_intermediate_size": 77,
        "norm_topk_prob": True,
    },
}
PROMPT = random_ids(83, VOCAB, 1)
OTHERS = [random_ids(5 + 11 * i % 97, VOCAB, 100 + i) for i in range(31)]
SCORED = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=5, prompt_logprobs=3)
DRAWN = SamplingParams(temperature=0.9, top_k=20, seed=7, max_tokens=20, ignore_eos=True)
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
MINE = [(PROMPT, SCORED), (PROMPT[:31], DRAWN), (PROMPT[5:], GREEDY)]


@pytest.fixture(scope="module", params=[(family, dtype) for family in SHAPES for dtype in ("bfloat16", "float32")], ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    family, dtype = request.param
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, **SHAPES[family]}
    return make_checkpoint(tmp_path_factory.mktemp(family), family, seed=3, **sizes), dtype


def open_llm(model: tuple[Path, str], tp: int = 1, **choices: Any) -> LLM:
    folder, dtype = model
    settings = {"communicator": "loopback", "threads": 1, "max_num_batched_tokens": 512, "block_size": 8}
    return LLM(str(folder), tp, dtype=dtype, deterministic=True, load_tokenizer=False, **{**settings, **choices})


def told(output: RequestOutput) -> object:
    """All that a request gave, floats and all."""
    one = output.outputs[0]
    return output.prompt_token_ids, one.token_ids, one.logprobs, output.prompt_logprobs


@pytest.fixture(scope="module")
def alone(model: tuple[Path, str]) -> list[object]:
    """Each request by itself, at tp 1, its prompt in one chunk."""
    with open_llm(model, max_num_seqs=1) as llm:
        return [told(llm.generate([ids], params)[0]) for ids, params in MINE]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("chunk", [7, 40, 512])
def test_world_and_chunk_size(model: tuple[Path, str], alone: list[object], tp: int, chunk: int) -> None:
    with open_llm(model, tp, max_num_batched_tokens=chunk, block_size=(8, 32, 5)[chunk % 3]) as llm:
        assert [told(o) for o in llm.generate([ids for ids, _ in MINE], [params for _, params in MINE])] == alone


@pytest.mark.parametrize("company", [1, 7, 29])
@pytest.mark.parametrize("tp", [1, 4])
def test_company(model: tuple[Path, str], alone: list[object], tp: int, company: int) -> None:
    with open_llm(model, tp, max_num_seqs=32, max_num_batched_tokens=128) as llm:
        jobs = [*MINE[:1], *((ids, GREEDY) for ids in OTHERS[:company]), *MINE[1:]]
        outputs = llm.generate([ids for ids, _ in jobs], [params for _, params in jobs])
        assert [told(outputs[i]) for i in (0, -2, -1)] == alone


@pytest.mark.parametrize("tp", [1, 2])
def test_preemption(model: tuple[Path, str], alone: list[object], tp: int) -> None:
    with open_llm(model, tp, num_kv_blocks=26, max_num_batched_tokens=64) as llm:
        jobs = [*MINE, *((ids, GREEDY) for ids in OTHERS[:3])]
        outputs = llm.generate([ids for ids, _ in jobs], [params for _, params in jobs])
        assert llm.engine.scheduler.preemptions > 0
        assert [told(o) for o in outputs[:3]] == alone


def test_threads(model: tuple[Path, str], alone: list[object]) -> None:
    with open_llm(model, threads=3) as llm:
        assert [told(o) for o in llm.generate([ids for ids, _ in MINE], [params for _, params in MINE])] == alone


@pytest.mark.parametrize(
    ("choices", "line"),
    [
        ({"tp": 3}, "need 1, 2, 4 or 8 ranks, not 3"),
        ({"tp": 2, "kernels": "torch"}, "deterministic needs the native kernels: torch was chosen"),
        ({"tp": 2, "moe_tp": 2}, "need whole experts on a rank, not moe_tp 2"),
    ],
)
def test_what_cannot_be_is_refused(model: tuple[Path, str], choices: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        open_llm(model, **choices)

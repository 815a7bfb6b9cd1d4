"""logprobs and prompt_logprobs are those of transformers, rank and order included, whatever the chunks and the world size."""

from random import Random

import pytest
import torch
from batching_helper import TEXT_VOCAB, VOCAB, make, oracle_logits, serve

from qtp import SamplingParams
from qtp.engine.outputs import Logprob

PROMPT = Random(2).choices(range(VOCAB), k=70)
CLOSE = 1e-4


def assert_told(told: dict[int, Logprob], expected_V: torch.Tensor, token: int, count: int) -> None:
    """`told` is the token itself and the `count` most likely ids under log-probabilities expected_V."""
    expected = expected_V.tolist()
    assert next(iter(told)) == token
    best = sorted(expected, reverse=True)[:count]
    top = sorted((entry for i, entry in told.items() if entry.rank <= count), key=lambda entry: entry.rank)
    assert [entry.rank for entry in top] == list(range(1, count + 1))
    assert [entry.logprob for entry in top] == pytest.approx(best, abs=CLOSE)
    assert len(told) == count + (told[token].rank > count)
    for i, entry in told.items():
        assert entry.logprob == pytest.approx(expected[i], abs=CLOSE)
        above = sum(value > expected[i] + 1e-5 for value in expected)
        at_least = sum(value > expected[i] - 1e-5 for value in expected)
        assert above < entry.rank <= at_least


@pytest.mark.parametrize("count", [0, 3, -1])
@pytest.mark.parametrize(
    ("kind", "tp", "chunk"),
    [("dense", 1, 1), ("dense", 3, 7), ("dense", 1, 128), ("sliding", 2, 3), ("moe", 1, 3), ("moe", 3, 7)],
)
def test_logprobs_are_those_of_transformers(kind: str, tp: int, chunk: int, count: int) -> None:
    """In company, so that chunks begin and end at odd places; 70 prompt tokens at once are more than one tile of logits."""
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=8, logprobs=count, prompt_logprobs=count, ignore_eos=True)
    plain = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    prompt = PROMPT if chunk > 7 else PROMPT[:23]
    with make(kind, tp, num_kv_blocks=80, block_size=4, max_num_batched_tokens=chunk) as llm:
        _, output, _ = serve(llm, [([5, 6, 7, 8], plain), (prompt, params), ([9, 9], plain)])
    completion = output.outputs[0]
    logprobs = torch.log_softmax(oracle_logits(kind, [*prompt, *completion.token_ids]), dim=-1)
    wanted = VOCAB if count < 0 else count
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for place, told in enumerate(output.prompt_logprobs[1:], start=1):
        assert told is not None
        assert_told(told, logprobs[place - 1], prompt[place], wanted)
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids) == 6
    for place, (told, token) in enumerate(zip(completion.logprobs, completion.token_ids, strict=True), start=len(prompt)):
        assert_told(told, logprobs[place - 1], token, wanted)


def test_logprobs_are_before_penalties_and_temperature_and_carry_text() -> None:
    params = SamplingParams(
        max_tokens=8, temperature=0.3, seed=1, repetition_penalty=1.9, frequency_penalty=1.5, logprobs=5, ignore_eos=True
    )
    with make("dense", load_tokenizer=True, num_kv_blocks=20, block_size=8) as llm:
        (output,) = serve(llm, [(PROMPT[:9], params)])
        assert llm.tokenizer is not None
        completion = output.outputs[0]
        assert completion.logprobs is not None
        assert output.prompt_logprobs is None
        logprobs = torch.log_softmax(oracle_logits("dense", [*PROMPT[:9], *completion.token_ids]), dim=-1)
        ranks = []
        for place, (told, token) in enumerate(zip(completion.logprobs, completion.token_ids, strict=True), start=9):
            assert_told(told, logprobs[place - 1], token, 5)
            assert all(entry.decoded_token == llm.tokenizer.decode([i]) for i, entry in told.items())
            ranks.append(told[token].rank)
        assert max(ranks) > 1, "the penalties must have moved some choice"
        assert max(completion.token_ids) < TEXT_VOCAB


def test_each_sequence_of_a_request_reports_but_the_prompt_is_told_once() -> None:
    params = SamplingParams(max_tokens=5, temperature=1.0, seed=3, n=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    with make("dense", 2, num_kv_blocks=30, block_size=4, max_num_batched_tokens=5) as llm:
        (output,) = serve(llm, [(PROMPT[:12], params)])
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 12
    assert len({completion.token_ids for completion in output.outputs}) == 3
    for completion in output.outputs:
        logprobs = torch.log_softmax(oracle_logits("dense", [*PROMPT[:12], *completion.token_ids]), dim=-1)
        assert completion.logprobs is not None
        for place, (told, token) in enumerate(zip(completion.logprobs, completion.token_ids, strict=True), start=12):
            assert_told(told, logprobs[place - 1], token, 2)

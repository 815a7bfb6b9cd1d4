"""Several streams over one engine, and an LLM whose step was interrupted."""

from dataclasses import replace
from pathlib import Path

import pytest

from qtp import LLM, RequestOutput, SamplingParams

DENSE = Path(__file__).parents[2] / "qtp/demo/dense"
PROMPTS = [[5, 6, 7], [9, 8], [11, 12, 13, 14]]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def open_llm(tp: int) -> LLM:
    return LLM(str(DENSE), tp=tp, dtype="float32", communicator="solo" if tp == 1 else "loopback", block_size=4, max_num_seqs=4)


@pytest.mark.parametrize("tp", [1, 2])
def test_streams_read_in_turns_do_not_take_each_others_outputs(tp: int) -> None:
    with open_llm(tp) as llm:
        alone = [llm.generate(prompt, PARAMS)[0].outputs[0].token_ids for prompt in PROMPTS]
        first = llm.stream([(None, PROMPTS[0], PARAMS)])
        second = llm.stream([(None, PROMPTS[1], PARAMS)])
        next(first)
        next(second)
        (whole,) = llm.generate(PROMPTS[2], PARAMS)
        assert whole.outputs[0].token_ids == alone[2]
        assert [list(stream)[-1].outputs[0].token_ids for stream in (first, second)] == alone[:2]
        abandoned = llm.stream([(None, PROMPTS[0], PARAMS)])
        next(abandoned)
        abandoned.close()
        assert not llm.engine.has_work
        assert llm.engine.pool.num_free == llm.engine.pool.num_blocks


def test_a_stream_ends_with_what_generate_gives() -> None:
    """generate makes an output of a request, and its text, when it is finished; a stream after every step."""
    drawn = replace(PARAMS, temperature=1.0, seed=3, max_tokens=30)
    with open_llm(1) as llm:
        (whole,) = llm.generate(PROMPTS[1], drawn)
        stop = whole.outputs[0].text[20:24]
        assert stop
        params = [PARAMS, replace(drawn, stop=stop), replace(drawn, n=2, logprobs=1, prompt_logprobs=1, ignore_eos=False)]
        finished = llm.generate(PROMPTS, params)
        streamed: dict[int, list[RequestOutput]] = {}
        for output in llm.stream([(None, prompt, p) for prompt, p in zip(PROMPTS, params, strict=True)]):
            streamed.setdefault(output.request_id, []).append(output)
    assert finished[1].outputs[0].text == whole.outputs[0].text[: whole.outputs[0].text.index(stop)]
    for due, outputs in zip(finished, streamed.values(), strict=True):
        last = outputs[-1]
        assert (last.outputs, last.prompt_logprobs, last.finished) == (due.outputs, due.prompt_logprobs, True)
        assert [len(output.outputs[0].token_ids) for output in outputs][:3] == [1, 2, 3]
        texts = [output.outputs[0].text for output in outputs]
        assert len(set(texts)) > 3
        assert not any(output.finished for output in outputs[:-1])


@pytest.mark.parametrize("tp", [1, 2])
def test_an_interrupted_step_ends_the_llm_and_says_so(tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = open_llm(tp)
    calls = []

    def interrupted(batch: object) -> None:
        calls.append(batch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.ranks.worker.model, "hidden", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS[0], PARAMS)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="this LLM is closed"):
        llm.generate(PROMPTS[0], PARAMS)
    llm.close()

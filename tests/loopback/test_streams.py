"""Several streams over one engine, and an LLM whose step was interrupted."""

from pathlib import Path

import pytest

from qtp import LLM, SamplingParams

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

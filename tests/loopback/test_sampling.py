"""How a request is sampled survives everything that happens around it: preemptions, company, world size.

Each request of one mixed list has another feature on. Its output is first taken where it runs alone with KV blocks to spare,
then among the others with so few that it is preempted with tokens in its output, in every order of arrival.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from batching_helper import EOS, SeenWorkers, blocks_for, idle, make, serve

from qtp import LLM, CompletionOutput, RequestOutput, SamplingParams
from qtp.engine.outputs import Logprob
from qtp.engine.request import Sequence
from qtp.engine.scheduler import Scheduler

PROMPTS = [[3, 17, 60], [44, 45, 46, 47, 48, 49], [9], [70, 1, 70, 2, 71], [12, 13], [80, 81, 82, 83], [50, 50, 51], [29, 94]]
BASE = SamplingParams(max_tokens=14, ignore_eos=True, temperature=0.0)
Told = dict[int, Logprob] | None


@cache
def plain(temperature: float) -> tuple[RequestOutput, ...]:
    """The prompts continued with nothing special, to find out which tokens and texts come."""
    with make("dense", load_tokenizer=True, num_kv_blocks=20, block_size=32) as llm:
        return tuple(serve(llm, [(ids, replace(BASE, temperature=temperature, seed=5))])[0] for ids in PROMPTS)


def across(output: CompletionOutput, pieces: list[str]) -> tuple[str, int, int]:
    """A stop text made of the end of one token and the start of the next one, where it first begins in the text, and how many
    tokens it takes to complete it. Searched from the fifth token on."""
    for place in range(4, len(pieces) - 1):
        if pieces[place] and pieces[place + 1]:
            stop = pieces[place][-1] + pieces[place + 1][0]
            at = output.text.index(stop)
            if at == len("".join(pieces[:place])) + len(pieces[place]) - 1:
                return stop, at, place + 2
    raise AssertionError("no text across two tokens; choose other prompts")


@cache
def features() -> dict[str, tuple[list[int], SamplingParams]]:
    with make("dense", load_tokenizer=True, num_kv_blocks=20) as llm:
        assert llm.tokenizer is not None
        greedy, drawn = plain(0.0), plain(1.0)
        stop_text, _, _ = across(drawn[4].outputs[0], [llm.tokenizer.decode([i]) for i in drawn[4].outputs[0].token_ids])
    stop_id = drawn[5].outputs[0].token_ids[6]
    held = greedy[6].outputs[0].token_ids[2]
    sampled = replace(BASE, temperature=1.0, seed=5)
    return {
        "n": (PROMPTS[0], replace(BASE, temperature=0.9, n=3, seed=11)),
        "penalties": (
            PROMPTS[1],
            replace(BASE, repetition_penalty=1.3, presence_penalty=0.6, frequency_penalty=0.5, temperature=0.7, top_k=30, seed=3),
        ),
        "repetition": (PROMPTS[2], replace(BASE, repetition_penalty=1.8)),
        "logprobs": (PROMPTS[3], replace(BASE, logprobs=4, prompt_logprobs=2, temperature=0.8, seed=4)),
        "stop text": (PROMPTS[4], replace(sampled, stop=["never", stop_text])),
        "stop id": (PROMPTS[5], replace(sampled, stop_token_ids=[stop_id])),
        "min_tokens": (PROMPTS[6], replace(BASE, min_tokens=9, stop_token_ids=[held])),
        "shape": (PROMPTS[7], replace(BASE, temperature=1.3, top_p=0.9, min_p=0.02, seed=9)),
    }


def said(output: RequestOutput) -> list[Any]:
    """All that an output says in plain values, except the values of its log-probabilities."""

    def named(places: tuple[Told, ...] | None) -> list[Any] | None:
        return None if places is None else [p and {i: (e.rank, e.decoded_token) for i, e in p.items()} for p in places]

    each = [(c.index, c.text, c.token_ids, c.finish_reason, named(c.logprobs)) for c in output.outputs]
    return [output.prompt_token_ids, each, named(output.prompt_logprobs), output.finished]


def values(output: RequestOutput) -> list[float]:
    """All log-probabilities of an output."""
    places = [*(output.prompt_logprobs or ()), *(place for c in output.outputs for place in c.logprobs or ())]
    return [entry.logprob for place in places for entry in (place or {}).values()]


def assert_as_alone(outputs: dict[str, RequestOutput]) -> None:
    """Log-probabilities may round another way when the steps are cut another way; nothing else may differ."""
    for name, expected in alone().items():
        assert said(outputs[name]) == said(expected), name
        assert values(outputs[name]) == pytest.approx(values(expected), abs=1e-4)


@cache
def alone() -> dict[str, RequestOutput]:
    """Each feature by itself on one rank with blocks to spare."""
    with make("dense", load_tokenizer=True, num_kv_blocks=20, block_size=32) as llm:
        expected = {name: serve(llm, [job])[0] for name, job in features().items()}
        assert llm.engine.scheduler.preemptions == 0
    return expected


@dataclass(frozen=True)
class Preempted:
    """request_id and index of a sequence that was preempted, and how many tokens it had sampled."""

    request_id: int
    index: int
    sampled: int


def note_preemptions(monkeypatch: pytest.MonkeyPatch) -> list[Preempted]:
    noted: list[Preempted] = []
    preempt = Scheduler._preempt

    def noting(self: Scheduler, s: Sequence) -> None:
        noted.append(Preempted(s.request.request_id, s.index, len(s.output_ids)))
        preempt(self, s)

    monkeypatch.setattr(Scheduler, "_preempt", noting)
    return noted


@pytest.mark.parametrize(("tp", "block", "chunk"), [(1, 2, 9), (1, 1, 40), (2, 3, 16), (3, 2, 12)])
def test_every_feature_survives_preemptions(tp: int, block: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = features()
    alone()
    noted = note_preemptions(monkeypatch)
    seen = SeenWorkers(monkeypatch)
    choices = {"block_size": block, "max_num_batched_tokens": chunk, "num_kv_blocks": blocks_for(list(jobs.values()), block) + 2}
    preempted = set()
    with make("dense", tp, load_tokenizer=True, max_num_seqs=5, **choices) as llm:
        for turn in range(len(jobs)):
            names = [*list(jobs)[turn:], *list(jobs)[:turn]]
            before, start = len(noted), llm.engine._next_request
            outputs = serve(llm, [jobs[name] for name in names])
            assert_as_alone(dict(zip(names, outputs, strict=True)))
            preempted |= {names[p.request_id - start] for p in noted[before:] if p.sampled}
            assert idle(llm)
        assert llm.engine.scheduler.preemptions == len(noted)
        assert seen.forgot()
    assert preempted == jobs.keys(), "each one must have been preempted with tokens in its output"


def test_company_and_world_size_change_nothing() -> None:
    """As above, but with blocks for all, all in one batch."""
    jobs = features()
    for tp in (1, 2, 3):
        with make("dense", tp, load_tokenizer=True, num_kv_blocks=40, block_size=8) as llm:
            outputs = serve(llm, list(jobs.values()))
            assert llm.engine.scheduler.preemptions == 0
        assert_as_alone(dict(zip(jobs, outputs, strict=True)))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_seeds(kind: str) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    drawn = []
    for tp in (1, 2, 3):
        with make(kind, tp, num_kv_blocks=60, block_size=8) as llm:
            seeded = [(PROMPTS[1], replace(params, seed=seed, n=3)) for seed in (1, 2, 1, 2**63 - 1)]
            first, second, again, last = serve(llm, seeded)
            unseeded = serve(llm, [(PROMPTS[1], params), (PROMPTS[1], params)])
        assert [c.token_ids for c in first.outputs] == [c.token_ids for c in again.outputs]
        different = {c.token_ids for output in (first, second, last, *unseeded) for c in output.outputs}
        assert len(different) == 3 * 3 + 2, "sequences of one request, other seeds and no seed all draw their own tokens"
        assert [c.index for c in first.outputs] == [0, 1, 2]
        drawn.append([[c.token_ids for c in output.outputs] for output in (first, second, last)])
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.fixture
def llm() -> Any:
    with make("dense", load_tokenizer=True, num_kv_blocks=40, block_size=8) as made:
        yield made


def test_stop_text_across_tokens_is_cut_off(llm: LLM) -> None:
    for reference, ids in zip(plain(1.0), PROMPTS, strict=True):
        output = reference.outputs[0]
        assert llm.tokenizer is not None
        pieces = [llm.tokenizer.decode([i]) for i in output.token_ids]
        if "\ufffd" in "".join(pieces):
            continue
        stop, at, count = across(output, pieces)
        params = replace(BASE, temperature=1.0, seed=5)
        (stopped,) = serve(llm, [(ids, replace(params, stop=stop))])
        assert stopped.outputs[0].text == output.text[:at]
        assert stopped.outputs[0].token_ids == output.token_ids[:count]
        assert stopped.outputs[0].finish_reason == "stop"
        (earliest,) = serve(llm, [(ids, replace(params, stop=[stop, output.text[at - 1 : at + 1]]))])
        assert earliest.outputs[0].text == output.text[: output.text.index(output.text[at - 1 : at + 1])]
        break
    else:
        raise AssertionError("no prompt gave text without parts of characters")


def test_stop_ids_are_kept_and_end_at_their_first_place(llm: LLM) -> None:
    for reference, ids in zip(plain(1.0), PROMPTS, strict=True):
        whole = reference.outputs[0].token_ids
        wanted = whole[5]
        (stopped,) = serve(llm, [(ids, replace(BASE, temperature=1.0, seed=5, stop_token_ids=[wanted]))])
        assert stopped.outputs[0].token_ids == whole[: whole.index(wanted) + 1]
        assert stopped.outputs[0].finish_reason == "stop"


def test_eos_ends_unless_it_is_ignored(llm: LLM) -> None:
    """Penalties cannot force an id; a seed that draws eos is looked for."""
    params = SamplingParams(temperature=3.0, max_tokens=40)
    ended = [output.outputs[0] for seed in range(12) for output in serve(llm, [([1, 2, 3], replace(params, seed=seed))])]
    free = [
        output.outputs[0]
        for seed in range(12)
        for output in serve(llm, [([1, 2, 3], replace(params, seed=seed, ignore_eos=True))])
    ]
    stopped = [(a, b) for a, b in zip(ended, free, strict=True) if EOS in b.token_ids]
    assert stopped
    for end, whole in zip(ended, free, strict=True):
        assert len(whole.token_ids) == 40
        assert whole.finish_reason == "length"
        if EOS in whole.token_ids:
            assert end.token_ids == whole.token_ids[: whole.token_ids.index(EOS) + 1]
            assert end.finish_reason == "stop"
        else:
            assert end == whole
    held = [
        output.outputs[0] for seed in range(12) for output in serve(llm, [([1, 2, 3], replace(params, seed=seed, min_tokens=40))])
    ]
    assert all(len(c.token_ids) == 40 and EOS not in c.token_ids for c in held)


def test_min_tokens_changes_only_what_it_must(llm: LLM) -> None:
    whole = plain(0.0)[6].outputs[0].token_ids
    stop = whole[2]
    (early,) = serve(llm, [(PROMPTS[6], replace(BASE, stop_token_ids=[stop]))])
    assert early.outputs[0].token_ids == whole[: whole.index(stop) + 1]
    (late,) = serve(llm, [(PROMPTS[6], replace(BASE, stop_token_ids=[stop], min_tokens=9))])
    tokens = late.outputs[0].token_ids
    assert len(tokens) > 9
    assert stop not in tokens[:9]
    assert tokens[: whole.index(stop)] == whole[: whole.index(stop)]


def test_min_tokens_holds_stop_texts_back(llm: LLM) -> None:
    """A stop text that is complete before there are min_tokens tokens is passed over; a later one counts."""
    whole = plain(0.0)[6].outputs[0]
    assert llm.tokenizer is not None
    pieces = [llm.tokenizer.decode([i]) for i in whole.token_ids]
    early, late = pieces[1], "".join(pieces[9:11])
    assert "\ufffd" not in whole.text
    assert whole.text.index(early) < whole.text.index(late)
    assert len("".join(pieces[:9])) == whole.text.index(late)
    params = replace(BASE, stop=[early, late])
    (soon,) = serve(llm, [(PROMPTS[6], params)])
    assert soon.outputs[0].text == whole.text[: whole.text.index(early)]
    (held,) = serve(llm, [(PROMPTS[6], replace(params, stop=[late, pieces[1]], min_tokens=9))])
    at = min(i for i in (whole.text.find(early, len("".join(pieces[:8]))), whole.text.index(late)) if i >= 0)
    assert held.outputs[0].text == whole.text[:at]
    assert held.outputs[0].finish_reason == "stop"
    assert len(held.outputs[0].token_ids) >= 9

"""Tokens are drawn from the distribution that was asked for, by the same rule on every road and at every world size.

The sampler is run on logits of our own, cut by vocabulary over ranks that are threads. What it should do is computed here in
plain Python, or by transformers.
"""

from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import replace
from itertools import accumulate
from math import exp, sqrt

import pytest
import torch
from batching_helper import on_threads
from device_helper import HOST
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from collectives.communicator import Communicator
from qtp.layout.split import even
from qtp.wire.messages import SamplingSpec, TokenLogprobs
from qtp.worker.sampling import CANDIDATES, Best, Sampler, adjusted
from qtp.worker.sequence import Sequence

V = 97
DRAWS = 3000
Answer = tuple[int, TokenLogprobs | None]


def row(seed: int, spread: float = 2.0) -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * spread


def sequence(spec: SamplingSpec, prompt: tuple[int, ...] = (5, 6), output: tuple[int, ...] = ()) -> Sequence:
    return Sequence(token_ids=[*prompt, *output], prompt_len=len(prompt), sampling=spec)


def search(part_RV: Tensor) -> Best:
    """A Best by its definition."""

    def best(rows: Rows[int], count: int, allowed: int) -> tuple[Tensor, Tensor]:
        assert 1 <= count <= allowed <= part_RV.shape[1]
        assert list(rows) == sorted(set(rows))
        order = [sorted(range(allowed), key=lambda i: (-float(part_RV[row, i]), i))[:count] for row in rows]
        columns = torch.tensor(order)
        return part_RV[list(rows)].gather(1, columns), columns

    return best


def answers(
    logits_RV: Tensor,
    sequences: list[Sequence],
    size: int = 1,
    allowed: int = V,
    sizes: list[int] | None = None,
    searching: bool = False,
) -> list[Answer]:
    """Rank 0's answers with the columns cut over `size` ranks. searching: the best come from a Best, and the logits of rows for
    which they are enough are not to be had."""
    cut = sizes or [len(even(logits_RV.shape[1], size, rank)) for rank in range(size)]
    starts = [0, *accumulate(cut)]

    def body(comm: Communicator) -> list[Answer]:
        part = logits_RV[:, starts[comm.rank] : starts[comm.rank + 1]]

        def logits(rows: Rows[int]) -> Tensor:
            specs = [sequences[row].sampling for row in rows]
            assert not searching or all(spec != SamplingSpec() for spec in specs), "a plain greedy row needs no logits"
            return part[list(rows)]

        return Sampler(comm, cut, allowed).sample(logits, sequences, search(part) if searching else None)

    first, *others = on_threads(len(cut), body, HOST)
    assert all(other == [] for other in others)
    return first


def tokens(logits_RV: Tensor, sequences: list[Sequence], size: int = 1, allowed: int = V) -> list[int]:
    return [token for token, _ in answers(logits_RV, sequences, size, allowed)]


def probabilities(scores: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The distribution of the next token, by the definitions: the k best ids, of those the fewest that reach top_p, of those
    the ones that have min_p times the best one's probability."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[: top_k or None]
    best = float(scores[order[0]])
    heights = [exp((float(scores[i]) - best) / temperature) for i in order]
    total, kept, reached = sum(heights), {}, 0.0
    for i, height in zip(order, heights, strict=True):
        if reached >= top_p:
            break
        kept[i] = height / total
        reached += height / total
    kept = {i: p for i, p in kept.items() if p >= min_p * kept[order[0]]}
    return {i: p / sum(kept.values()) for i, p in kept.items()}


def assert_drawn_from(drawn: list[int], expected: dict[int, float]) -> None:
    """Pearson's chi-square; the rare ids go together. The bound is five standard deviations above the mean of the statistic."""
    counts = Counter(drawn)
    assert counts.keys() <= expected.keys(), "an id was drawn that is cut off"
    bins: list[tuple[float, int]] = []
    rare, rare_count = 0.0, 0
    for i, p in expected.items():
        if p * len(drawn) < 5:
            rare, rare_count = rare + p * len(drawn), rare_count + counts[i]
        else:
            bins.append((p * len(drawn), counts[i]))
    if rare >= 5:
        bins.append((rare, rare_count))
    assert len(bins) > 2
    freedom = len(bins) - 1
    statistic = sum((seen - due) ** 2 / due for due, seen in bins)
    assert statistic < freedom + 5 * sqrt(2 * freedom)


SHAPES = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.8},
    "top_k": {"temperature": 1.3, "top_k": 9},
    "top_k_wide": {"temperature": 2.0, "top_k": CANDIDATES},
    "top_k_beyond": {"temperature": 2.0, "top_k": CANDIDATES + 5},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
    "min_p": {"temperature": 1.5, "min_p": 0.08},
    "all": {"temperature": 1.6, "top_k": 20, "top_p": 0.85, "min_p": 0.05},
}


@pytest.mark.parametrize("name", SHAPES)
def test_draws_follow_the_distribution(name: str) -> None:
    shape = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **SHAPES[name]}
    logits = row(3)
    expected = probabilities(logits, **shape)  # type: ignore[arg-type]
    cut_off = V - len(expected)
    assert (cut_off > 0) == (name not in ("temperature", "hot"))
    drawn = tokens(logits.expand(DRAWS, V), [sequence(SamplingSpec(**shape, seed=seed)) for seed in range(DRAWS)])
    assert_drawn_from(drawn, expected)


def test_draws_of_one_sequence_are_independent_of_each_other() -> None:
    """One seed, the place in the output going up: pairs of neighbouring draws fall as two independent draws do."""
    logits, spec = row(4), SamplingSpec(temperature=1.0, top_k=4, seed=2**62 + 12345)
    drawn = tokens(logits.expand(DRAWS, V), [sequence(spec, output=(1,) * (place % 1500)) for place in range(DRAWS)])
    assert drawn[:1500] == drawn[1500:], "a draw is fixed by seed and place"
    expected = probabilities(logits, 1.0, 4, 1.0, 0.0)
    assert_drawn_from(drawn[:1500], expected)
    pairs = {a * V + b: p * q for a, p in expected.items() for b, q in expected.items()}
    assert_drawn_from([a * V + b for a, b in zip(drawn[0:1500:2], drawn[1:1500:2], strict=True)], pairs)


def test_a_draw_depends_on_seed_and_place_alone() -> None:
    """Not on the prompt, its length, the tokens before or the rows beside it."""
    logits, spec = row(5), SamplingSpec(temperature=1.5, seed=77)
    prompts = [(1,), (2, 3, 4), (9,) * 30]
    drawn = [tokens(logits[None], [sequence(spec, p, tuple(range(n)))])[0] for n in range(25) for p in prompts]
    assert drawn[0::3] == drawn[1::3] == drawn[2::3]
    assert len(set(drawn)) > 8


@pytest.mark.parametrize("name", SHAPES)
def test_every_world_size_and_road_draws_the_same(name: str) -> None:
    count = 150
    logits = torch.stack([row(seed) for seed in range(count)])
    specs = [SamplingSpec(**SHAPES[name], seed=7 * seed) for seed in range(count)]  # type: ignore[arg-type]
    alone = tokens(logits, [sequence(spec) for spec in specs])
    assert len(set(alone)) > 20
    assert tokens(logits, [sequence(spec) for spec in specs], size=3) == alone
    full = [sequence(replace(spec, logprobs=0)) for spec in specs]  # logprobs need all logits
    for size in (1, 3):
        told = answers(logits, full, size)
        assert [token for token, _ in told] == alone
        assert all(logprobs is not None and logprobs.token_ids == (token,) for token, logprobs in told)


def test_rows_of_a_mixed_batch_do_not_mix() -> None:
    """Greedy, candidates, full and penalised rows in one step: each row's answer is what it gets alone."""
    kinds = [
        SamplingSpec(),
        SamplingSpec(temperature=0.9, top_k=10, seed=4),
        SamplingSpec(temperature=0.9, seed=5),
        SamplingSpec(repetition_penalty=1.7),
        SamplingSpec(temperature=1.1, top_k=30, presence_penalty=1.5, seed=6),
        SamplingSpec(logprobs=3),
    ]
    order = [0, 3, 1, 5, 2, 4, 4, 2, 0, 5, 1, 3]
    logits = torch.stack([row(20 + i) for i in range(len(order))])
    sequences = [sequence(kinds[k], output=(i, i + 1, i + 1)) for i, k in enumerate(order)]
    one_by_one = [answers(logits[i : i + 1], [s])[0] for i, s in enumerate(sequences)]
    assert len({token for token, _ in one_by_one}) > 6
    for size in (1, 2, 3):
        for searching in (False, True):
            assert answers(logits, sequences, size, searching=searching) == one_by_one


@pytest.mark.parametrize("allowed", [97, 66, 40, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_the_best_of_each_rank_are_enough(allowed: int, size: int) -> None:
    """Values in steps, so that many are equal: whoever looks for the best, the same tokens come."""
    logits = torch.stack([(row(seed) * 2).round() / 2 for seed in range(80)])
    wide = {"temperature": 90.0, "top_k": CANDIDATES}
    for spec in ({}, {"temperature": 1.5, "top_k": 7}, wide, {**wide, "top_p": 0.9, "min_p": 0.01}):
        sequences = [sequence(SamplingSpec(**spec, seed=seed)) for seed in range(80)]  # type: ignore[arg-type]
        sequences[5:9] = [sequence(SamplingSpec()) for _ in range(4)]
        whole = [sequence(replace(s.sampling, logprobs=0)) for s in sequences]
        due = tokens(logits, whole, size, allowed)
        assert tokens(logits, sequences, size, allowed) == due
        assert [token for token, _ in answers(logits, sequences, size, allowed, searching=True)] == due


@pytest.mark.parametrize("allowed", [97, 66, 40, 2])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_every_rank_knows_the_best_of_all(allowed: int, size: int) -> None:
    """Of equal ones the lowest, a whole row of -inf included, and where ranks have none that may be chosen."""
    logits = torch.stack([(row(seed) * 2).round() / 2 for seed in range(80)])
    logits[7] = -torch.inf
    due = [max(range(allowed), key=lambda i: (float(scores[i]), -i)) for scores in logits]
    cut = [len(even(V, size, rank)) for rank in range(size)]
    starts = [0, *accumulate(cut)]

    def body(comm: Communicator) -> list[int]:
        sampler, part = Sampler(comm, cut, allowed), logits[:, starts[comm.rank] : starts[comm.rank + 1]]
        here = sampler.allowed_here
        found = search(part)(range(80), 1, here) if here else None
        return sampler.best_of_all(found, 80).tolist()

    assert on_threads(size, body, HOST) == [due] * size


PROMPT, OUTPUT = (5, 6, 90, 5, 40), (40, 7, 7, 7, 96, 0)


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = row(8)
    reference = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[*PROMPT, *OUTPUT]]), logits[None].clone())[0]
    assert (reference != logits).sum() == len({*PROMPT, *OUTPUT})
    s = sequence(SamplingSpec(repetition_penalty=penalty), PROMPT, OUTPUT)
    kept = logits.clone()
    assert torch.equal(adjusted(logits, s, 0), reference)
    assert torch.equal(logits, kept), "the row itself is left as it is"
    cut = [adjusted(logits[part.start : part.stop], s, part.start) for part in (even(V, 3, rank) for rank in range(3))]
    assert torch.equal(torch.cat(cut), reference)


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.4), (-1.1, 0.3), (1.9, -0.6)])
def test_presence_and_frequency_count_the_output_alone(presence: float, frequency: float) -> None:
    logits = row(9)
    reference = [
        float(x) - (presence * (i in OUTPUT) + frequency * OUTPUT.count(i) if i in OUTPUT else 0.0) for i, x in enumerate(logits)
    ]
    s = sequence(SamplingSpec(presence_penalty=presence, frequency_penalty=frequency), PROMPT, OUTPUT)
    torch.testing.assert_close(adjusted(logits, s, 0), torch.tensor(reference), atol=1e-6, rtol=0)
    cut = [adjusted(logits[part.start : part.stop], s, part.start) for part in (even(V, 4, rank) for rank in range(4))]
    torch.testing.assert_close(torch.cat(cut), torch.tensor(reference), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "road",
    [SamplingSpec(), SamplingSpec(temperature=0.8, top_k=1), SamplingSpec(logprobs=0)],
    ids=["greedy", "candidates", "full"],
)
def test_penalties_act_on_every_road(road: SamplingSpec, size: int) -> None:
    """The best id is in the output and loses its place to the second best, on whichever rank either lies."""
    compared = 0
    for seed in range(12):
        logits = row(30 + seed)
        best, second = logits.topk(2).indices.tolist()
        gap = float(logits[best] - logits[second])
        if gap >= 1.9:
            continue
        weak, strong = replace(road, presence_penalty=gap - 0.05), replace(road, presence_penalty=gap + 0.05)
        batch = [sequence(weak, output=(best,)), sequence(strong, output=(best,)), sequence(strong, prompt=(best,))]
        assert tokens(logits.expand(3, V), batch, size) == [best, second, best]
        compared += 1
    assert compared > 5


@pytest.mark.parametrize("size", [1, 3])
def test_min_tokens_holds_stop_ids_back_until_there_are_enough(size: int) -> None:
    logits = row(12)
    best, second, third = logits.topk(3).indices.tolist()
    roads = [{}, {"temperature": 0.5, "top_k": 1}, {"logprobs": 0}]
    for extra in roads:
        spec = SamplingSpec(min_tokens=3, stop_token_ids=(best, second), **extra)  # type: ignore[arg-type]
        batch = [sequence(spec, output=(1,) * count) for count in range(5)]
        assert tokens(logits.expand(5, V), batch, size) == [third, third, third, best, best]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("tied", [(0, 96), (11, 12), (30, 40, 70), (96,), (48, 49), (32, 33, 64, 65)])
def test_greedy_ties_go_to_the_lowest_id(tied: tuple[int, ...], size: int) -> None:
    logits = row(13)
    logits[list(tied)] = 11.0
    roads = [SamplingSpec(), SamplingSpec(logprobs=0), SamplingSpec(temperature=0.7, top_k=1), SamplingSpec(presence_penalty=1.0)]
    assert tokens(logits.expand(4, V), [sequence(spec) for spec in roads], size) == [tied[0]] * 4


@pytest.mark.parametrize("allowed", [90, 65, 33, 20, 1])
@pytest.mark.parametrize("size", [1, 3])
def test_ids_beyond_the_tokenizer_are_never_chosen(allowed: int, size: int) -> None:
    """Their logits are made huge; with few allowed ids, whole ranks have nothing to offer."""
    logits = torch.stack([row(seed) for seed in range(60)])
    logits[:, allowed:] = 1e6
    for spec in (
        {},
        {"logprobs": 0},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 3.0, "top_k": CANDIDATES},
        {"temperature": 3.0},
        {"temperature": 3.0, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.4},
    ):
        sequences = [sequence(SamplingSpec(**spec, seed=seed)) for seed in range(60)]  # type: ignore[arg-type]
        drawn = tokens(logits, sequences, size, allowed)
        assert max(drawn) < allowed
        if not spec:
            assert drawn == logits[:, :allowed].argmax(dim=1).tolist()


@pytest.mark.parametrize("sizes", [[0, 50, 47], [97, 0, 0], [3, 90, 4]])
def test_uneven_and_empty_parts_of_the_vocabulary(sizes: list[int]) -> None:
    logits = torch.stack([row(seed) for seed in range(30)])
    for spec in ({}, {"temperature": 1.2, "top_k": 12}, {"temperature": 1.2, "top_p": 0.9}, {"logprobs": 2}):
        sequences = [sequence(SamplingSpec(**spec, seed=seed)) for seed in range(30)]  # type: ignore[arg-type]
        assert answers(logits, sequences, sizes=sizes) == answers(logits, sequences)

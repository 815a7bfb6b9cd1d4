"""Choosing tokens from logits that are cut by vocabulary: sampled once, on rank 0, from as little as need travel.

R rows (sequences), V this rank's part of the vocabulary. Three roads, chosen from the sampling settings alone so that all
ranks choose alike:
- greedy without logprobs: each rank sends its best (value, id);
- top_k up to CANDIDATES: each rank sends its best CANDIDATES pairs, among which the true ones must be;
- everything else: the whole logits of these rows are gathered.
A draw is fixed by the sequence's seed and the number of tokens it has sampled; order of ids and world size do not matter.
"""

from collections import Counter
from collections.abc import Sequence as Rows
from math import log
from random import Random

import torch
from torch import Tensor

from collectives.communicator import Communicator
from qtp.wire.messages import Sample, SamplingSpec, TokenLogprobs
from qtp.worker.sequence import Sequence

CANDIDATES = 64
PROMPT_TILE = 64
NEVER = float("-inf")


class Sampler:
    """sizes[r]: rank r's length of the vocabulary; `allowed`: ids from there on are never chosen (unknown to the tokenizer)."""

    def __init__(self, comm: Communicator, sizes: Rows[int], allowed: int) -> None:
        self.comm, self.sizes, self.allowed = comm, tuple(sizes), allowed
        self.start = sum(self.sizes[: comm.rank])

    def sample(self, logits_RV: Tensor, sequences: Rows[Sequence]) -> list[tuple[int, TokenLogprobs | None]]:
        """The next token of each row, with logprobs where asked for. Every rank must call it with its part of the same rows;
        rank 0's answer is the one that counts, the others get an empty list."""
        roads = [_road(s.sampling) for s in sequences]
        chosen: dict[int, tuple[int, TokenLogprobs | None]] = {}
        for road, choose in (("greedy", self._greedy), ("candidates", self._candidates), ("full", self._full)):
            rows = [i for i, r in enumerate(roads) if r == road]
            if rows:
                part = logits_RV if len(rows) == len(roads) else logits_RV[rows]
                answers = choose(part, [sequences[i] for i in rows])
                chosen.update(zip(rows, answers, strict=False))
        return [chosen[i] for i in range(len(roads))] if self.comm.rank == 0 else []

    def prompt_logprobs(self, logits_RV: Tensor, targets: Rows[int], count: int) -> tuple[TokenLogprobs, ...]:
        """TokenLogprobs of targets[i] under row i. Every rank must call it; rank 0 gets the answer."""
        full = self._gather(logits_RV)
        return tuple(token_logprobs(row, t, count) for row, t in zip(full, targets, strict=True)) if self.comm.rank == 0 else ()

    def _greedy(self, logits_RV: Tensor, sequences: Rows[Sequence]) -> list[tuple[int, None]]:
        pairs = self._best(self._processed(logits_RV, sequences), 1)
        return [(int(row[0, 1]), None) for row in pairs]

    def _candidates(self, logits_RV: Tensor, sequences: Rows[Sequence]) -> list[tuple[int, None]]:
        pairs = self._best(self._processed(logits_RV, sequences), CANDIDATES)
        return [(_draw(row[:, 0], row[:, 1], s), None) for row, s in zip(pairs, sequences, strict=True)]

    def _full(self, logits_RV: Tensor, sequences: Rows[Sequence]) -> list[tuple[int, TokenLogprobs | None]]:
        full = self._gather(logits_RV)
        if self.comm.rank != 0:
            return []
        answers: list[tuple[int, TokenLogprobs | None]] = []
        for raw, s in zip(full, sequences, strict=True):
            scores = adjusted(raw[: self.allowed], s, 0).to(torch.float64)
            token = int(scores.argmax()) if s.sampling.temperature == 0 else _draw(scores, torch.arange(len(scores)), s)
            wanted = s.sampling.logprobs
            answers.append((token, None if wanted is None else token_logprobs(raw, token, wanted)))
        return answers

    def _gather(self, logits_RV: Tensor) -> Tensor:
        return self.comm.all_gather(logits_RV, dim=1, sizes=self.sizes).cpu()

    def _processed(self, logits_RV: Tensor, sequences: Rows[Sequence]) -> Tensor:
        """The rows' allowed columns of this rank, with penalties."""
        here = logits_RV[:, : max(0, self.allowed - self.start)]
        if not any(_is_adjusted(s) for s in sequences):
            return here
        return torch.stack([adjusted(row, s, self.start) for row, s in zip(here, sequences, strict=True)])

    def _best(self, scores_RV: Tensor, count: int) -> Tensor:
        """The best `count` (value, id) pairs of each row over all ranks, [R, count, 2] float64 on the CPU, best first and
        the lower id first among equals; id -1 where there are fewer."""
        here = min(count, scores_RV.shape[1])
        values, columns = scores_RV.max(dim=1, keepdim=True) if here == count == 1 else _top(scores_RV, here)
        mine = torch.full((len(scores_RV), count, 2), -1.0, dtype=torch.float64, device=scores_RV.device)
        mine[:, :, 0] = NEVER
        mine[:, :here, 0] = values.to(torch.float64)
        mine[:, :here, 1] = (columns + self.start).to(torch.float64)
        pairs = self.comm.all_gather(mine, dim=1).cpu()
        by_id = pairs.gather(1, pairs[:, :, 1].argsort(dim=1)[:, :, None].expand_as(pairs))
        order = by_id[:, :, 0].argsort(dim=1, descending=True, stable=True)[:, :count]
        return by_id.gather(1, order[:, :, None].expand(-1, -1, 2))


def adjusted(scores_V: Tensor, s: Sequence, start: int) -> Tensor:
    """A row's scores for the ids start .. start + V - 1 after min_tokens and penalties; the row itself is left as it is.

    Repetition (arXiv 1909.05858) divides positive and multiplies negative scores of ids seen in prompt or output; presence
    and frequency are subtracted for ids in the output.
    """
    if not _is_adjusted(s):
        return scores_V
    scores_V = scores_V.clone()
    spec, output = s.sampling, Counter(s.output_ids)

    def here(ids: Rows[int]) -> Tensor:
        return torch.tensor([i - start for i in ids if 0 <= i - start < len(scores_V)], dtype=torch.int64, device=scores_V.device)

    if spec.repetition_penalty != 1.0:
        seen = here(sorted(set(s.token_ids)))
        values = scores_V[seen]
        scores_V[seen] = torch.where(values > 0, values / spec.repetition_penalty, values * spec.repetition_penalty)
    if output and (spec.presence_penalty or spec.frequency_penalty):
        local = here(list(output))
        counts = torch.tensor([output[i + start] for i in local.tolist()], dtype=scores_V.dtype, device=scores_V.device)
        scores_V[local] -= spec.presence_penalty + spec.frequency_penalty * counts
    if sum(output.values()) < spec.min_tokens:
        scores_V[here(spec.stop_token_ids)] = NEVER
    return scores_V


def token_logprobs(logits_V: Tensor, token: int, count: int) -> TokenLogprobs:
    """The token and the `count` most likely ones (all with -1) under softmax(logits)."""
    logprobs = torch.log_softmax(logits_V.to(torch.float32), dim=-1)
    values, ids = logprobs.topk(len(logprobs) if count < 0 else min(count, len(logprobs)))
    rank = int((logprobs > logprobs[token]).sum()) + 1
    return TokenLogprobs(
        token_ids=(token, *ids.tolist()),
        logprobs=(float(logprobs[token]), *values.tolist()),
        ranks=(rank, *range(1, len(values) + 1)),
    )


def _road(spec: SamplingSpec) -> str:
    if spec.logprobs is not None:
        return "full"
    if spec.temperature == 0:
        return "greedy"
    return "candidates" if 0 < spec.top_k <= CANDIDATES else "full"


def _is_adjusted(s: Sequence) -> bool:
    spec = s.sampling
    penalised = spec.repetition_penalty != 1.0 or spec.presence_penalty != 0.0 or spec.frequency_penalty != 0.0
    return penalised or len(s.token_ids) - s.prompt_len < spec.min_tokens


def _draw(scores: Tensor, ids: Tensor, s: Sequence) -> int:
    """One id from scores (float64, -inf excluded) after temperature, min_p, top_k and top_p, in that order."""
    spec = s.sampling
    scores = (scores - scores.max()) / spec.temperature
    if spec.min_p > 0.0:
        scores = torch.where(scores >= log(spec.min_p), scores, NEVER)
    if spec.top_k > 0 or spec.top_p < 1.0:
        scores, order = scores.sort(descending=True, stable=True)
        ids = ids[order]
        if spec.top_k > 0:
            scores, ids = scores[: spec.top_k], ids[: spec.top_k]
    weights = torch.softmax(scores, dim=0)
    if spec.top_p < 1.0:
        before = weights.cumsum(0) - weights
        weights = torch.where(before < spec.top_p, weights, 0.0)
    heights = weights.cumsum(0)
    index = len(s.token_ids) - s.prompt_len
    point = Random((spec.seed << 32) + index).random() * float(heights[-1])
    place = int(torch.searchsorted(heights, torch.tensor(point, dtype=torch.float64), right=True))
    place = min(place, len(ids) - 1)
    while weights[place] == 0:  # rounding at the very end of the heights
        place -= 1
    return int(ids[place])


def _top(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As torch.topk, which picks any of equal values; here the lower column is taken first. The ties that matter are those
    with the last value taken: where there are more of them than places, the row is sorted whole."""
    values, columns = scores_RV.topk(count, dim=1)
    tied = ((scores_RV == values[:, -1:]).sum(dim=1) > (values == values[:, -1:]).sum(dim=1)).nonzero()[:, 0]
    if len(tied):
        sorted_values, sorted_columns = scores_RV[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = sorted_values[:, :count], sorted_columns[:, :count]
    return values, columns


def as_sample(seq_id: int, answer: tuple[int, TokenLogprobs | None] | None, prompt: tuple[TokenLogprobs, ...]) -> Sample:
    token, logprobs = answer if answer is not None else (None, None)
    return Sample(seq_id=seq_id, token=token, logprobs=logprobs, prompt_logprobs=prompt)

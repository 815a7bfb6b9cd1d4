"""Choosing tokens from logits that are cut by vocabulary: sampled once, on rank 0, from as little as need travel.

R rows (sequences), V this rank's part of the vocabulary, C candidates of a row. Two roads, chosen from the sampling settings
alone so that all ranks choose alike:
- greedy, and top_k up to CANDIDATES, without logprobs: each rank sends its best (value, id) pairs, 1 or CANDIDATES of a row,
  among which the true ones must be. It needs no logits of its own for them, unless penalties or min_tokens change them;
- everything else: the whole logits of these rows are gathered.
A draw is fixed by the sequence's seed and the number of tokens it has sampled; order of ids and world size do not matter.
"""

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Rows
from math import inf, log
from random import Random

import torch
from torch import Tensor

from collectives.communicator import Communicator
from qtp.kernels.torch_kernels import top
from qtp.wire.messages import Sample, SamplingSpec, TokenLogprobs
from qtp.worker.sequence import Sequence

CANDIDATES = 64
PROMPT_TILE = 64
NEVER = -inf

Answer = tuple[int, TokenLogprobs | None]
Logits = Callable[[Rows[int]], Tensor]
"""logits(rows): [R, V] float32."""
Best = Callable[[Rows[int], int, int], tuple[Tensor, Tensor]]
"""best(rows, count, allowed): values [R, count] float32 and columns [R, count] int64 of the best logits of these rows among their
first `allowed` columns, best first and the lower column first among equals; 1 <= count <= allowed."""

Found = Rows[tuple[Tensor, Tensor]]


class Sampler:
    """sizes[r]: rank r's length of the vocabulary; `allowed`: ids from there on are never chosen (unknown to the tokenizer)."""

    def __init__(self, comm: Communicator, sizes: Rows[int], allowed: int) -> None:
        self.comm, self.sizes, self.allowed = comm, tuple(sizes), allowed
        self.start = sum(self.sizes[: comm.rank])
        self.allowed_here = max(0, min(self.sizes[comm.rank], allowed - self.start))

    def sample(self, logits: Logits, sequences: Rows[Sequence], best: Best | None = None) -> list[Answer]:
        """The next token of each sequence, with logprobs where asked for. Every rank must call it for the same sequences; rank
        0's answer is the one that counts, the others get an empty list. `logits` and `best` give this rank's part of the rows
        they are asked for, by number, ascending: row i is that of sequences[i]. Without `best` the logits are searched."""
        best = best or (lambda rows, count, allowed: top(logits(rows)[:, :allowed], count))
        counts = [_candidates(s.sampling) for s in sequences]
        dense = [i for i, s in enumerate(sequences) if not counts[i] or _is_adjusted(s)]
        raw = dict(zip(dense, logits(dense), strict=True)) if dense else {}
        plain = [i for i in range(len(sequences)) if i not in raw]
        changed = [i for i in dense if counts[i]]
        full = [i for i in dense if not counts[i]]
        answers: dict[int, Answer] = {}
        if plain or changed:
            count = max(counts)
            found: list[tuple[Tensor, Tensor]] = []
            here = min(count, self.allowed_here)
            if plain and here:
                found.append(best(plain, here, self.allowed_here))
            if changed and here:
                scores = [adjusted(raw[i][: self.allowed_here], sequences[i], self.start) for i in changed]
                found.append(top(torch.stack(scores), here))
            if not here:
                nothing = torch.empty(len(plain + changed), 0, device=self.comm.device)
                found.append((nothing, nothing.to(torch.int64)))
            tokens = self._from_best(found, count, [sequences[i] for i in plain + changed])
            answers.update(zip(plain + changed, ((token, None) for token in tokens), strict=False))
        if full:
            told = self._from_all(torch.stack([raw[i] for i in full]), [sequences[i] for i in full])
            answers.update(zip(full, told, strict=False))
        return [answers[i] for i in range(len(sequences))] if self.comm.rank == 0 else []

    def best_of_all(self, found: tuple[Tensor, Tensor] | None, rows: int) -> Tensor:
        """The id of each row's best logit over all ranks, the lower one among equals: [R] int64, on every rank. found: as `Best`
        gives it for a count of 1; None where no column of this rank may be chosen. Every rank must call it. No wait for a device.
        """
        if self.comm.size == 1:
            assert found is not None, "a vocabulary without ids"
            return found[1][:, 0]
        if found is None:
            nothing = torch.empty(rows, 0, device=self.comm.device)
            found = nothing, nothing.to(torch.int64)
        return _first(self._pairs(*found, 1))[1][:, 0].to(torch.int64)

    def prompt_logprobs(self, logits_RV: Tensor, targets: Rows[int], count: int) -> tuple[TokenLogprobs, ...]:
        """TokenLogprobs of targets[i] under row i. Every rank must call it; rank 0 gets the answer."""
        full = self._gather(logits_RV)
        return tuple(token_logprobs(row, t, count) for row, t in zip(full, targets, strict=True)) if self.comm.rank == 0 else ()

    def _from_best(self, found: Found, count: int, sequences: Rows[Sequence]) -> list[int]:
        """Tokens of the sequences, on rank 0. found: this rank's best (values, columns) of their rows, in one part or two."""
        scores, ids = self._merged(found, count)
        if self.comm.rank != 0:
            return []
        tokens: list[int] = ids[:, 0].tolist()
        drawn = [i for i, s in enumerate(sequences) if s.sampling.temperature > 0]
        if drawn:
            for i, token in zip(drawn, _draw(scores[drawn], ids[drawn], [sequences[i] for i in drawn]), strict=True):
                tokens[i] = token
        return tokens

    def _merged(self, found: Found, count: int) -> tuple[Tensor, Tensor]:
        """The best `count` values and ids of each row over all ranks, best first and the lower id first among equals, on the CPU;
        right on rank 0 only. What a rank lacks for `count` is filled up with -inf. Few operations, for each costs 10 microseconds
        after a forward has emptied the caches."""
        values, columns = found[0] if len(found) == 1 else (torch.cat([part[i] for part in found]) for i in (0, 1))
        if self.comm.size == 1:
            ids = columns.cpu()
            return (values.cpu() if count > 1 else values), ids
        pairs = self._pairs(values, columns, count).cpu()
        if self.comm.rank != 0:
            return pairs[:, :, 0], pairs[:, :, 1]
        scores, ids = _first(pairs, count)
        return scores, ids.to(torch.int64)

    def _pairs(self, values: Tensor, columns: Tensor, count: int) -> Tensor:
        """(value, id) of `count` of each rank, rank after rank: [R, ranks * count, 2] float64. What a rank lacks is filled up
        with -inf."""
        pairs = torch.stack((values.to(torch.float64), (columns + self.start).to(torch.float64)), dim=2)
        if (lacking := count - pairs.shape[1]) > 0:
            nothing = pairs.new_full((len(pairs), lacking, 2), -1.0)
            nothing[:, :, 0] = NEVER
            pairs = torch.cat((pairs, nothing), dim=1)
        return self.comm.all_gather(pairs, dim=1)

    def _from_all(self, logits_RV: Tensor, sequences: Rows[Sequence]) -> list[Answer]:
        full = self._gather(logits_RV)
        if self.comm.rank != 0:
            return []
        answers: list[Answer] = []
        for raw, s in zip(full, sequences, strict=True):
            scores, spec = adjusted(raw[: self.allowed], s, 0), s.sampling
            if spec.temperature == 0:
                token = int(scores.argmax())
            else:
                ids = torch.arange(len(scores))
                if spec.top_k > 0 or spec.top_p < 1.0:
                    scores, ids = scores.sort(descending=True, stable=True)
                (token,) = _draw(scores[None], ids[None], [s])
            answers.append((token, None if spec.logprobs is None else token_logprobs(raw, token, spec.logprobs)))
        return answers

    def _gather(self, logits_RV: Tensor) -> Tensor:
        return self.comm.all_gather(logits_RV, dim=1, sizes=self.sizes).cpu()


def _first(pairs: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """(values, ids) of the best `count` pairs of each row. Ranks come in the order of their ids, so the first of equals is the
    lowest."""
    seen = pairs[:, :, 0]
    order = seen.argmax(dim=1, keepdim=True) if count == 1 else seen.argsort(dim=1, descending=True, stable=True)
    scores, ids = pairs.gather(1, order[:, :count, None].expand(-1, -1, 2)).unbind(2)
    return scores, ids


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


def _candidates(spec: SamplingSpec) -> int:
    """How many of the best ids its choice needs to see; 0: all."""
    if spec.logprobs is not None:
        return 0
    if spec.temperature == 0:
        return 1
    return CANDIDATES if 0 < spec.top_k <= CANDIDATES else 0


def _is_adjusted(s: Sequence) -> bool:
    spec = s.sampling
    penalised = spec.repetition_penalty != 1.0 or spec.presence_penalty != 0.0 or spec.frequency_penalty != 0.0
    return penalised or len(s.token_ids) - s.prompt_len < spec.min_tokens


def _draw(scores_RC: Tensor, ids_RC: Tensor, sequences: Rows[Sequence]) -> list[int]:
    """One id of each row from scores (on the CPU; -inf is never drawn) after temperature, min_p, top_k and top_p, in
    that order. Rows with top_k or top_p come best first."""
    specs = [s.sampling for s in sequences]
    places = torch.arange(scores_RC.shape[1])

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[:, None]

    scores = scores_RC.to(torch.float64)
    scores = (scores - scores.amax(dim=1, keepdim=True)) / column([spec.temperature for spec in specs])
    if any(spec.min_p > 0.0 for spec in specs):
        floor = column([log(spec.min_p) if spec.min_p > 0.0 else NEVER for spec in specs])
        scores = scores.where(scores >= floor, NEVER)
    if any(spec.top_k > 0 for spec in specs):
        scores = scores.where(places < column([spec.top_k or inf for spec in specs]), NEVER)
    weights = torch.softmax(scores, dim=1)
    if any(spec.top_p < 1.0 for spec in specs):
        before = weights.cumsum(dim=1) - weights
        weights = weights.where(before < column([spec.top_p if spec.top_p < 1.0 else inf for spec in specs]), 0.0)
    heights = weights.cumsum(dim=1)
    points = column([_point(s) for s in sequences]) * heights[:, -1:]
    last = torch.where(weights > 0.0, places, 0).amax(dim=1, keepdim=True)  # rounding at the very end of the heights
    drawn = torch.minimum(torch.searchsorted(heights, points, right=True), last)
    tokens: list[int] = ids_RC.gather(1, drawn)[:, 0].tolist()
    return tokens


def _point(s: Sequence) -> float:
    """Where in [0, 1) the sequence's next draw falls."""
    spec, index = s.sampling, len(s.token_ids) - s.prompt_len
    return Random((spec.seed << 32) + index).random()


def as_sample(seq_id: int, answer: tuple[int, TokenLogprobs | None] | None, prompt: tuple[TokenLogprobs, ...]) -> Sample:
    token, logprobs = answer if answer is not None else (None, None)
    return Sample(seq_id=seq_id, token=token, logprobs=logprobs, prompt_logprobs=prompt)

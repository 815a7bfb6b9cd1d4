"""Decode steps as CUDA graphs give what steps without them give: on a card the real ones, elsewhere a stand-in, under which
kernels run in Triton's interpreter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count as counting
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from batching_helper import VOCAB, Job, blocks_for, checkpoint, idle, random_jobs, serve
from graph_helper import InGraphs, StandIn, stand_in
from quantized_helper import compressed, make
from torch import Tensor
from triton_helper import DEVICE, few_programs

from collectives.communicator import CollectiveError, Communicator
from collectives.solo import Solo
from qtp import LLM, RequestOutput, SamplingParams
from qtp.attention import triton_backend
from qtp.config import EngineConfig, ModelConfig
from qtp.kernels.triton import vocabulary
from qtp.wire.messages import StepPlan, StepResult
from qtp.worker import worker
from qtp.worker.graphs import DecodeGraphs, buckets
from qtp.worker.worker import Worker

CUDA = DEVICE.type == "cuda"
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of rows that are idle


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, 100, 511, 512, 513, 5000])
def test_buckets(most: int) -> None:
    found = buckets(most)
    assert list(found) == sorted(set(found))
    assert found[0] == 1
    assert found[-1] == min(most, 512), "steps of more sequences go without graphs"
    for count in range(1, found[-1] + 1):
        size = next(size for size in found if size >= count)
        assert size < 2 * count or size - count <= 15
        assert size - count <= 15


def test_buckets_are_few() -> None:
    assert buckets(5) == (1, 2, 4, 5)
    assert buckets(64) == (1, 2, 4, 8, 16, 32, 48, 64)
    assert len(buckets(512)) == 36


class Graphed(Worker):
    """With kernels in Triton, though on a CPU; several ranks are threads. limit: bytes that these can sum within a graph."""

    limit = 1 << 30

    def __init__(self, config: EngineConfig, model: ModelConfig, comm: Communicator, *args: Any, **kwargs: Any) -> None:
        comm = InGraphs(comm, self.limit) if comm.size > 1 else comm
        super().__init__(replace(config, kernels="triton"), model, comm, *args, **kwargs)


def an_llm(kind: str | Path, tp: int = 1, **choices: Any) -> LLM:
    """Of a folder, or of one that `checkpoint` makes."""
    settings = {"dtype": "float32", "max_num_seqs": 5, "max_num_batched_tokens": 16, "block_size": 4, "num_kv_blocks": 40}
    settings |= {"device": DEVICE.type, "kernels": "triton" if CUDA else "torch", "load_tokenizer": False, "threads": 1}
    folder = kind if isinstance(kind, Path) else checkpoint(kind)
    return LLM(str(folder), tp=tp, **{**settings, **choices})


Runs = list[tuple[int, bool]]


@contextmanager
def with_graphs(kind: str | Path, tp: int = 1, **choices: Any) -> Iterator[tuple[LLM, Runs]]:
    """An LLM, and of each step that ran in a graph how many sequences it had and whether it was greedy."""
    runs: Runs = []
    run = DecodeGraphs.run

    def noted(self: DecodeGraphs, steps: Sequence[Any], greedy: bool) -> Tensor:
        runs.append((len(steps), greedy))
        return run(self, steps, greedy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeGraphs, "run", noted)
        if not CUDA:
            few_programs(patch)
            patch.setattr(triton_backend, "_SPLIT_TILE", 16)  # so that contexts are cut
            patch.setattr(triton_backend, "_DECODE_TILE", 16)
            patch.setattr("qtp.worker.ranks.Worker", Graphed)
            patch.setattr("qtp.worker.follow.Worker", Graphed)
            patch.setattr("qtp.worker.worker._has_graphs", lambda *_: True)
            stand_in(patch)
        with an_llm(kind, tp, **choices) as llm:
            yield llm, runs


@contextmanager
def without(kind: str | Path, tp: int = 1, **choices: Any) -> Iterator[LLM]:
    with an_llm(kind, tp, enforce_eager=True, **choices) as llm:
        assert llm.ranks.worker.graphs is None
        yield llm


def check(found: list[RequestOutput], wanted: list[RequestOutput]) -> None:
    """The same tokens, and logprobs that float32 does not tell apart."""
    for mine, other in zip(found, wanted, strict=True):
        ours, theirs = mine.outputs[0], other.outputs[0]
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        for each in (ours.logprobs, theirs.logprobs):
            assert each is None or len(each) == len(ours.token_ids)
        for here, there in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
            assert here.keys() == there.keys()
            a, b = ([each[i].logprob for i in here] for each in (here, there))
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-4)


def shrinking(count: int, **params: Any) -> list[Job]:
    """As many as a step has room for, which end one after the other."""
    random = Random(3)
    prompts = [[random.randrange(VOCAB) for _ in range(n)] for n in (3, 1, 2, 1, 21 if CUDA else 4)]
    settings = {"temperature": 0.0, "ignore_eos": True, **params}
    return [(ids, SamplingParams(max_tokens=3 + i, **settings)) for i, ids in enumerate(prompts[:count])]


def mixed(count: int) -> list[Job]:
    """Greedy, drawn, penalised, and such that tell probabilities."""
    params: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 5},
        {"logprobs": 2},
        {"temperature": 1.3, "seed": 6, "top_p": 0.8, "logprobs": 1},
        {"repetition_penalty": 1.3},
    ]
    return [(ids, replace(job, **more)) for (ids, job), more in zip(shrinking(count), params, strict=False)]


@pytest.mark.parametrize(("kind", "seqs"), [("sliding", 5), ("moe", 5 if CUDA else 3)])
def test_batches_of_every_size(kind: str, seqs: int) -> None:
    """Rows of a bucket that no sequence has make no difference, nor does what ran in it before."""
    jobs = [shrinking(seqs), mixed(seqs), shrinking(seqs, temperature=0.7, seed=1)][: None if CUDA or kind == "sliding" else 1]
    with without(kind, max_num_seqs=seqs) as llm:
        wanted = [serve(llm, some) for some in jobs]
    with with_graphs(kind, max_num_seqs=seqs) as (llm, runs):
        for some, right in zip(jobs, wanted, strict=True):
            check(serve(llm, some), right)
        assert idle(llm)
    sizes = set(range(1, seqs + 1))
    assert {count for count, greedy in runs if greedy} == sizes
    assert len(jobs) == 1 or {count for count, greedy in runs if not greedy} == sizes


@pytest.mark.parametrize(("kind", "tp"), [("sliding", 2), ("sliding", 3), ("moe", 2)])
def test_ranks_choose_together(kind: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives inside the graphs; a step is begun before rank 0 has the tokens of the one before, by all ranks."""
    jobs, begun, pending = [shrinking(3), mixed(3)], [], []
    with without(kind, tp, communicator="loopback", max_num_seqs=3) as llm:
        wanted = [serve(llm, some) for some in jobs]
    with with_graphs(kind, tp, communicator="loopback", max_num_seqs=3) as (llm, runs):
        begin, follow = llm.ranks.begin, Worker.follow
        llm.ranks.begin = lambda plan: (begun.append(len(llm.ranks.worker._begun)), begin(plan))[1]
        monkeypatch.setattr(Graphed, "follow", lambda worker, plan: (follow(worker, plan), pending.append(len(worker._begun)))[0])
        for some, right in zip(jobs, wanted, strict=True):
            check(serve(llm, some), right)
        assert idle(llm)
    assert {count for count, greedy in runs if greedy} == {1, 2, 3}
    assert llm.ranks._pulse.entered >= len(begun), "a step counts, for nobody counts what is within its graph"
    assert max(begun) == 1
    assert max(pending) == 2, "one that runs, and one that waits for it"
    assert len(runs) % tp == 0


def test_one_rank_that_waits_for_the_device_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no rank has graphs, for there would be nobody to talk to within them."""
    prepare, made = worker._kernels, []

    def prepared(*args: Any) -> Any:
        kernels, attention = prepare(*args)
        made.append(kernels)
        kernels.waits = len(made) == 2
        return kernels, attention

    monkeypatch.setattr(worker, "_kernels", prepared)
    with with_graphs("sliding", 2, communicator="loopback", max_num_seqs=1, timeout=20.0) as (llm, runs):
        assert llm.ranks.worker.graphs is None
        serve(llm, shrinking(1))
    assert not runs


def test_a_sum_that_fails_within_a_graph_ends_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sees it before the ids are there, which are of no use then."""
    with with_graphs("sliding", 2, communicator="loopback", max_num_seqs=1) as (llm, runs):
        serve(llm, shrinking(1))

        def late(comm: InGraphs) -> None:
            comm.inner.abort()  # as a wait that was given up ends all that come after it
            raise CollectiveError("rank 1 did not come")

        monkeypatch.setattr(InGraphs, "check", late)
        with pytest.raises(CollectiveError, match=r"rank 1 did not come|a loopback rank left"):
            serve(llm, shrinking(1))
    assert runs


@pytest.mark.parametrize(
    ("moment", "error"),
    [("capture", torch.AcceleratorError), ("capture", KeyboardInterrupt), ("replay", torch.AcceleratorError), ("close", None)],
)
def test_no_graph_outlives_the_communicator(
    moment: str, error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nccl's would wait for those that the frames of an exception hold."""
    graphs: list[StandIn] = []
    begin, close, follow, steps = StandIn.__init__, Solo.close, vocabulary.follow, counting(1)

    def noted(self: StandIn) -> None:
        begin(self)
        graphs.append(self)

    def closing(self: Solo) -> None:
        assert len(graphs) == (2 if moment == "capture" else 4)
        assert not any(graph.steps for graph in graphs)
        graphs.clear()
        close(self)

    def fails(*args: Any) -> None:
        follow(*args)
        if error is not None and next(steps) == 4:  # while the second graph is captured
            raise error("no")

    monkeypatch.setattr(StandIn, "__init__", noted)
    monkeypatch.setattr(Solo, "close", closing)
    if moment == "capture":
        monkeypatch.setattr(vocabulary, "follow", fails)
    with pytest.raises(error) if error is not None else nullcontext(), with_graphs("sliding", max_num_seqs=2) as (llm, _):
        assert all(graph.steps for graph in graphs)
        if moment == "replay":
            monkeypatch.setattr(StandIn, "replay", Mock(side_effect=torch.AcceleratorError("no")))
        serve(llm, shrinking(2))
    assert not graphs


def test_other_ranks_free_theirs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[StandIn] = []
    begin = StandIn.__init__

    def noted(self: StandIn) -> None:
        begin(self)
        graphs.append(self)

    monkeypatch.setattr(StandIn, "__init__", noted)
    with with_graphs("sliding", 2, communicator="loopback", max_num_seqs=1):
        assert [bool(graph.steps) for graph in graphs] == [True] * 4, "two of each rank"
    assert not any(graph.steps for graph in graphs)


@pytest.mark.parametrize("tp", [1, 2])
def test_first_steps_meet_the_kernels_and_leave_nothing(tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    execute = Worker.execute

    def noted(self: Worker, plan: StepPlan) -> StepResult:
        assert self.graphs is None or not plan.started
        if self.comm.rank == 0 and plan.chunks:
            begun.append(sum(chunk.count for chunk in plan.chunks))
        return execute(self, plan)

    jobs = shrinking(2)
    with without("sliding", tp, communicator="loopback", max_num_seqs=2) as llm:
        wanted = serve(llm, jobs)
    monkeypatch.setattr(worker, "_compiles", lambda device: True)
    monkeypatch.setattr(Worker, "execute", noted)
    choices = {"communicator": "loopback", "max_num_batched_tokens": 4, "num_kv_blocks": 40}
    with with_graphs("sliding", tp, max_num_seqs=2, **choices) as (llm, _):
        assert begun == [1, 2] + [1] * 3 + [2] * 3
        assert llm.ranks.worker is not None
        assert not llm.ranks.worker.sequences
        check(serve(llm, jobs), wanted)


def test_graphs_hold_what_ranks_can_sum_within_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 columns of 4 bytes a sequence: two sequences fit, three do not and go without."""
    monkeypatch.setattr(Graphed, "limit", 2 * 32 * 4)
    with without("sliding", 2, communicator="loopback", max_num_seqs=3) as llm:
        wanted = serve(llm, shrinking(3))
    with with_graphs("sliding", 2, communicator="loopback", max_num_seqs=3) as (llm, runs):
        check(serve(llm, shrinking(3)), wanted)
    assert {count for count, _ in runs} == {1, 2}
    monkeypatch.setattr(Graphed, "limit", 100)
    with with_graphs("sliding", 2, communicator="loopback", max_num_seqs=3) as (llm, runs):
        assert llm.ranks.worker.graphs is None


def test_sequences_that_come_at_any_time_and_are_preempted() -> None:
    """Prefill beside decode goes without graphs, and blocks change hands between steps."""
    random = Random(2)
    jobs = random_jobs(random, 40 if CUDA else 4, 6, 30 if CUDA else 7)
    choices = {"num_kv_blocks": blocks_for(jobs, 4) + 1}
    with without("dense", **choices) as llm:
        wanted = serve(llm, jobs, Random(1))
    with with_graphs("dense", **choices) as (llm, runs):
        check(serve(llm, jobs, Random(1)), wanted)
        assert llm.engine.scheduler.preemptions > 0
        assert idle(llm)
    assert runs


@pytest.mark.parametrize("name", ["fp8", "w8a8s"])
def test_quantized_experts_are_in_them(name: str, tmp_path: Path) -> None:
    """In float8, and compressed."""
    folder, ids, _ = make("qwen2_moe", name, tmp_path, num_hidden_layers=1)
    folder = compressed(folder, tmp_path / "small", 1) if name == "w8a8s" else folder
    jobs: list[Job] = [(ids[:n], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)) for n in (3, 2)]
    with without(folder, max_num_seqs=2) as llm:
        wanted = serve(llm, jobs)
    with with_graphs(folder, max_num_seqs=2) as (llm, runs):
        check(serve(llm, jobs), wanted)
    assert (2, True) in runs


def test_experts_that_ask_the_device_go_without_graphs(tmp_path: Path) -> None:
    """Those in int8 by group go one by one."""
    folder, ids, _ = make("qwen2_moe", "w8a16-64", tmp_path)
    with with_graphs(folder) as (llm, runs):
        assert llm.ranks.worker.graphs is None
        (output,) = llm.generate([ids[:3]], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 2
        assert not runs

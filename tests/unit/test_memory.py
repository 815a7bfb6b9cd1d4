"""Proves how a card's memory becomes KV blocks, and what is said where it runs out, with cards that are made up."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from batching_helper import checkpoint, on_threads, serve, settled

from qtp import LLM, SamplingParams, run_pa
from qtp import llm as llm_module
from qtp.config import EngineConfig
from qtp.memory import STEPPING as STEP
from qtp.memory import Use, kv_blocks, ran_out, rooms, told
from qtp.worker import worker as worker_module
from qtp.worker.memory import Card, first_steps, largest_step, measure
from qtp.worker.worker import Worker

GIB = 2**30
OOM = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.30 GiB is free. "
    "Including non-PyTorch memory, this process has 77.8 GiB memory in use.\nSee documentation."
)


def config(**choices: Any) -> EngineConfig:
    settings = {"max_num_seqs": 8, "max_model_len": 1000, "block_size": 16, "max_num_batched_tokens": 512, "tp": 2}
    return EngineConfig(model="m", **{**settings, **choices})


def use(**changes: int) -> Use:
    """30 of 80 GiB used, 20 of them weights, a step takes 2 and a block 1 MiB."""
    settings = {
        "card": 1,
        "process": 1,
        "total": 80 * GIB,
        "used": 30 * GIB,
        "step": 2 * GIB,
        "weights": 20 * GIB,
        "block": 2**20,
    }
    return Use(**{**settings, **changes})


def test_what_is_left_of_a_card_becomes_blocks() -> None:
    (room,) = rooms([use()], 0.9)
    assert room.spare == 72 * GIB - 30 * GIB - 2 * GIB
    assert room.blocks == 40 * 1024
    assert kv_blocks([use()], config(max_num_seqs=10**6)) == 40 * 1024
    assert kv_blocks([use()], config()) == 8 * 63, "no more than all sequences can use"
    assert rooms([use()], 1.0)[0].blocks == 48 * 1024


def test_what_other_processes_hold_counts() -> None:
    most = config(max_num_seqs=10**6)
    assert kv_blocks([use(used=50 * GIB)], most) == kv_blocks([use()], most) - 20 * 1024


def test_a_remainder_is_no_block() -> None:
    """40 GiB and a byte less than a block more."""
    whole = use(used=30 * GIB - 2**20 + 1)
    assert rooms([whole], 0.9)[0].blocks == 40 * 1024
    assert rooms([replace(whole, used=30 * GIB - 2**20)], 0.9)[0].blocks == 40 * 1024 + 1


def test_the_fullest_card_decides_for_all() -> None:
    cards = [use(card=7, process=1), use(card=8, process=2, used=60 * GIB), use(card=9, process=3, block=2**21)]
    assert [room.blocks for room in rooms(cards, 0.9)] == [40 * 1024, 10 * 1024, 20 * 1024]
    assert kv_blocks(cards, config(max_num_seqs=10**6)) == 10 * 1024


def test_ranks_that_share_a_card_share_what_is_left() -> None:
    """Processes: each may be in a step at the same time. Blocks are as many on each, of what they take together."""
    shared = [use(process=1, used=55 * GIB), use(process=2, used=55 * GIB, block=3 * 2**20, step=3 * GIB)]
    (room,) = rooms(shared, 0.9)
    assert (room.weights, room.step, room.block) == (40 * GIB, 5 * GIB, 4 * 2**20)
    assert room.blocks == 12 * 1024 // 4
    assert room.blocks * room.block == 72 * GIB - 55 * GIB - 5 * GIB


def test_threads_of_one_process_are_measured_once() -> None:
    (room,) = rooms([use(), use(), use()], 0.9)
    assert (room.step, room.block, room.blocks) == (2 * GIB, 3 * 2**20, 40 * 1024 // 3)


@pytest.mark.parametrize(
    ("used", "words"),
    [
        (72 * GIB, ("so -2.00 GiB are left", "lower max_num_batched_tokens or max_num_seqs, raise tp or gpu_memory_utilization")),
        (
            70 * GIB - 50 * 2**20,
            ("so 0.05 GiB are left", "lower max_model_len to 800 or less, max_num_batched_tokens or max_num_seqs, raise tp"),
        ),
    ],
)
def test_too_little_is_one_line(used: int, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="gpu_memory_utilization") as caught:
        kv_blocks([use(card=1), use(card=2, process=2, used=used)], config())
    line = str(caught.value)
    assert line.startswith(
        "gpu_memory_utilization 0.9 of the 80.00 GiB of rank 1's card is 72.00 GiB: weights take 20.00, a step of"
    )
    assert "a step of 512 tokens 2.00, the libraries and other processes" in line
    assert "one sequence of max_model_len 1000 needs 0.06" in line
    assert all(word in line for word in words), line
    assert "\n" not in line
    with pytest.raises(ValueError, match="raise tp, or use a card that is free"):
        kv_blocks([use(used=80 * GIB)], config(gpu_memory_utilization=1.0))


def test_what_was_found_is_told() -> None:
    assert told([use()], 40960, config()) == (
        "40960 KV blocks of 16 tokens (40.00 GiB), all that fit: gpu_memory_utilization 0.9 of the 80.00 GiB of rank 0's card is "
        "72.00 GiB, weights take 20.00, a step of 512 tokens 2.00, the libraries and other processes 10.00"
    )
    assert ", all that 8 sequences can use: " in told([use()], 504, config())


@pytest.mark.parametrize(
    ("tokens", "seqs", "length", "lengths"),
    [
        (512, 4, 1000, [1, 1, 1, 509]),
        (512, 4, 200, [1, 111, 200, 200]),
        (512, 1, 1000, [512]),
        (6, 8, 1000, [1] * 6),
        (512, 3, 20, [20, 20, 20]),
    ],
)
def test_the_largest_step(tokens: int, seqs: int, length: int, lengths: list[int]) -> None:
    given = config(max_num_batched_tokens=tokens, max_num_seqs=seqs, max_model_len=length)
    plan, forget = largest_step(given, vocab_size=37)
    assert [chunk.count for chunk in plan.chunks] == [len(new.token_ids) for new in plan.started] == lengths
    assert all(chunk.sample and set(chunk.new_blocks) == {0} for chunk in plan.chunks)
    assert all(len(chunk.new_blocks) == -(-chunk.count // 16) for chunk in plan.chunks)
    assert {i for new in plan.started for i in new.token_ids} <= set(range(37))
    assert forget.dropped == tuple(range(len(lengths)))


@pytest.mark.parametrize(
    ("tokens", "seqs", "length", "prompts", "rows"),
    [
        (8192, 64, 9000, [1, 2, 5, 17, 33, 65, 129, 257, 1025], [1, 2, 5, 17, 33, 64]),
        (64, 300, 9000, [1, 2, 5, 17, 33], [1, 2, 5, 17, 33]),
        (64, 1, 5, [1, 2], [1]),
    ],
)
def test_the_first_steps(tokens: int, seqs: int, length: int, prompts: list[int], rows: list[int]) -> None:
    """Within what steps may have; each is forgotten before the next."""
    given = config(max_num_batched_tokens=tokens, max_num_seqs=seqs, max_model_len=length)
    plans = first_steps(given, vocab_size=37)
    steps, forgets = plans[::2], plans[1::2]
    assert [[c.count for c in plan.chunks] for plan in steps] == [[n] for n in prompts] + [
        [1] * n for n in rows for _ in range(3)
    ]
    assert [plan.dropped for plan in forgets] == [tuple(range(len(plan.chunks))) for plan in steps]
    kinds = [(s.only_best, s.logprobs, s.top_k) for plan in steps[len(prompts) :] for s in [plan.started[0].sampling]]
    assert kinds == [(True, None, 0), (False, 0, 0), (False, None, 2)] * len(rows)


@dataclass
class MadeUp:
    """A card of 1 MiB with a process that has `base` bytes on it, and `high` in a step; notes what it is asked."""

    place: int = 5
    process: int = 6
    base: int = 300_000
    high: int = 450_000
    others: int = 50_000
    asked: list[str] = field(default_factory=list)

    def release(self) -> None:
        self.asked.append("release")

    def peak(self) -> int:
        self.asked.append("peak")
        return self.high

    def taken(self) -> int:
        return self.base

    def card(self) -> tuple[int, int]:
        self.asked.append("card")
        return 2**20 - self.base - self.others, 2**20


def test_a_measurement_meets_all_ranks() -> None:
    cards = [MadeUp(high=450_000), MadeUp(high=460_000, process=7)]

    def body(comm: Any) -> list[Use]:
        own: Card = cards[comm.rank]
        return measure(own, comm, lambda: cards[comm.rank].asked.append("step"), weights=1000 + comm.rank, block=10)

    first, second = on_threads(2, body)
    assert first == second
    assert [(u.card, u.process, u.total, u.used, u.step, u.weights, u.block) for u in first] == [
        (5, 6, 2**20, 350_000, 150_000, 1000, 10),
        (5, 7, 2**20, 350_000, 160_000, 1001, 10),
    ]
    assert cards[0].asked == cards[1].asked == ["release", "step", "peak", "release", "card"]


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[MadeUp], None]:
    """Runs on CPUs leave their KV blocks to a measurement of the given card."""

    def use_card(card: MadeUp) -> None:
        resolve = llm_module.resolve
        monkeypatch.setattr(
            llm_module,
            "resolve",
            lambda config, *args, **words: replace(resolve(config, *args, **words), num_kv_blocks=config.num_kv_blocks),
        )
        monkeypatch.setattr(worker_module, "card_of", lambda device: card)

    return use_card


CHOICES: dict[str, Any] = {
    "communicator": "loopback",
    "device": "cpu",
    "kernels": "torch",
    "dtype": "float32",
    "block_size": 4,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 24,
    "load_tokenizer": False,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
JOBS = [([5, 6, 7], GREEDY), ([8] * 11, GREEDY), ([9, 2], GREEDY)]


@pytest.mark.parametrize("tp", [1, 2])
def test_an_llm_gets_the_blocks_that_its_workers_found(on_a_card: Callable[[MadeUp], None], tp: int) -> None:
    with LLM(str(checkpoint("dense")), tp, num_kv_blocks=30, max_model_len=64, **CHOICES) as llm:
        expected = [output.outputs[0].token_ids for output in serve(llm, JOBS)]
    on_a_card(MadeUp())
    with LLM(str(checkpoint("dense")), tp, max_model_len=64, **CHOICES) as llm:
        worker = llm.ranks.worker
        assert worker is not None
        spare = int(2**20 * 0.9) - 350_000 - 150_000
        due = min(spare // (tp * worker.cache.block_bytes), 3 * 16)
        assert 3 * 16 >= due >= 16
        assert llm.config.num_kv_blocks == llm.engine.pool.num_blocks == worker.num_kv_blocks == due
        assert worker.cache.keys.shape[1] == worker.cache.values.shape[1] == due
        assert not worker.sequences
        assert [output.outputs[0].token_ids for output in serve(llm, JOBS)] == expected


def test_a_card_that_is_too_small_is_one_line(on_a_card: Callable[[MadeUp], None], capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(checkpoint("dense")), "--load_tokenizer", "0", "--input_ids", "5,6,7", "--kernels", "torch"]
    on_a_card(MadeUp())
    assert run_pa.main([*flags, "--device", "cpu", "--gpu-memory-utilization", "0.95"]) == 0
    capfd.readouterr()
    assert run_pa.main([*flags, "--device", "cpu", "--gpu-memory-utilization", "0.4"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: gpu_memory_utilization 0.4 of the 0.00 GiB of rank 0's card is 0.00 GiB: ")
    assert run_pa.main([*flags, "--gpu_memory_utilization", "1.5"]) == 2
    assert capfd.readouterr().err == "error: gpu_memory_utilization 1.5 must be above 0 and at most 1\n"


def test_requests_bound_what_is_asked_of_a_card(on_a_card: Callable[[MadeUp], None], caplog: pytest.LogCaptureFixture) -> None:
    """Two sequences of 3 + 20 tokens: 6 blocks of 4 each, of a card that has room for many more."""
    on_a_card(MadeUp(base=0, high=0, others=0))
    caplog.set_level("INFO", logger="qtp")
    flags = {"load_tokenizer": 0, "input_ids": "5,6,7", "kernels": "torch", "device": "cpu", "block_size": 4, "max_batch_size": 2}
    argv = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    assert run_pa.main(["--model", str(checkpoint("dense")), *argv]) == 0
    assert "KV blocks of 4 tokens from gpu_memory_utilization 0.9, context 23" in caplog.text
    assert "12 KV blocks of 4 tokens (0.00 GiB), all that 2 sequences can use" in caplog.text


def fails(*args: Any, **words: Any) -> Any:
    raise torch.OutOfMemoryError(OOM)


def test_the_line_of_a_failed_allocation() -> None:
    assert ran_out(STEP, "cuda:1", torch.OutOfMemoryError(OOM)) == (
        "out of memory on cuda:1 while running a step (tried to allocate 2.50 GiB); lower gpu_memory_utilization, num_kv_blocks, "
        "max_num_batched_tokens or max_num_seqs"
    )
    assert ran_out(STEP, "npu:0", RuntimeError("no")).startswith("out of memory on npu:0 while running a step; lower")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("load", "while reading the weights (tried to allocate 2.50 GiB); raise tp"),
        ("KVCache", "while making the KV cache (tried to allocate 2.50 GiB); lower gpu_memory_utilization"),
        ("measure", "while running a step of the largest size (tried to allocate 2.50 GiB); lower max_num_batched_tokens"),
    ],
)
def test_memory_that_runs_out_at_start_says_in_what(
    name: str, words: str, on_a_card: Callable[[MadeUp], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_card(MadeUp())
    monkeypatch.setattr(worker_module, name, fails)
    with pytest.raises(ValueError, match=r"^out of memory on cpu while") as caught:
        LLM(str(checkpoint("dense")), 1, max_model_len=64, **CHOICES)
    assert words in str(caught.value)


def test_memory_that_runs_out_for_the_measured_cache(
    on_a_card: Callable[[MadeUp], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_card(MadeUp())
    monkeypatch.setattr(worker_module.KVCache, "resize", fails)
    with pytest.raises(ValueError, match=r"^out of memory on cpu while making the KV cache"):
        LLM(str(checkpoint("dense")), 1, max_model_len=64, **CHOICES)


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_runs_out_in_a_step_of_any_rank_ends_the_run_with_2(
    rank: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Full(Worker):
        def __init__(self, *args: Any, **words: Any) -> None:
            super().__init__(*args, **words)
            if self.comm.rank == rank:
                self.model.hidden = fails  # type: ignore[method-assign]

    for module in ("ranks", "follow"):
        monkeypatch.setattr(f"qtp.worker.{module}.Worker", Full)
    flags = ["--load_tokenizer", "0", "--input_ids", "5,6,7", "--tp", "2", "--communicator", "loopback", "--device", "cpu"]
    assert run_pa.main(["--model", str(checkpoint("dense")), *flags]) == 2
    _, err = capfd.readouterr()
    assert "Traceback" not in err
    who = "" if rank == 0 else "rank 1: "
    line = f"error: {who}out of memory on cpu while running a step (tried to allocate 2.50 GiB); lower gpu_memory_utilization"
    assert err.splitlines()[-1].startswith(line)


def test_a_worker_with_its_blocks_given_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "card_of", fails)
    given, model = settled("dense", 2, num_kv_blocks=7, block_size=4, device="cpu")
    assert on_threads(2, lambda comm: Worker(given, model, comm).num_kv_blocks, torch.device("cpu")) == [7, 7]


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_others_than_the_allocator_ask_for(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    given, model = settled("dense", 1, num_kv_blocks=7, block_size=4, device="cpu")
    monkeypatch.setattr(worker_module, "load", Mock(side_effect=error))
    with pytest.raises(ValueError, match=r"^out of memory on cpu while reading the weights; raise tp"):
        on_threads(1, lambda comm: Worker(given, model, comm), torch.device("cpu"))


def test_nothing_else_than_memory_is_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*args: Any, **words: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    given, model = settled("dense", 1, num_kv_blocks=7, block_size=4, device="cpu")
    monkeypatch.setattr(worker_module, "load", other)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        on_threads(1, lambda comm: Worker(given, model, comm), torch.device("cpu"))

"""An LLM whose other rank is a process: what it generates, that its child ends with it in every way it can end, and that a
child's death or failure is named, with rank, host and process id, instead of waited for."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch
from batching_helper import TEMPLATE, VOCAB, checkpoint, make

from collectives import built
from launch import local
from launch.watch import RankDied
from qtp import LLM, SamplingParams
from qtp.wire.messages import StepPlan, StepResult
from qtp.worker.worker import Worker

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
PATIENCE = 120.0

T = TypeVar("T")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The process ids of all children that LLMs start, in order."""
    pids: list[int] = []
    start = local.start

    def noting(*args: Any) -> Any:
        rendezvous, ranks = start(*args)
        pids.extend(child.pid for child in ranks.children)
        return rendezvous, ranks

    monkeypatch.setattr(local, "start", noting)
    yield pids
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def processes(kind: str = "dense", **choices: Any) -> LLM:
    return LLM(
        str(checkpoint(kind)), tp=2, **{"dtype": "float32", "block_size": 8, "num_kv_blocks": 200, "timeout": 60.0, **choices}
    )


def within_patience(call: Callable[[], T]) -> T:
    """What `call` returns or raises; fails the test if it does neither."""
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert outcome, "it hangs"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def tokens(llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in llm.generate(list(prompts), params)]


def test_texts_and_ids_side_by_side_and_chat(children: list[int]) -> None:
    """The same as the same model gives in one process."""
    prompts: list[Any] = ["hello there", [7, 8, 9], "q", [1]]
    params = [
        GREEDY,
        SamplingParams(temperature=0.9, seed=4, max_tokens=6),
        GREEDY,
        SamplingParams(temperature=0.0, max_tokens=3),
    ]
    talk = [{"role": "user", "content": "who are you"}, {"role": "assistant", "content": "me"}]
    with make("dense", load_tokenizer=True, num_kv_blocks=20) as single:
        expected = single.generate(prompts, params)
        assert single.tokenizer is not None
        ids = single.tokenizer.encode("user who are you assistant me a ")
        expected_talk = tokens(single, [ids])
    with processes() as llm:
        assert len(children) == 1
        outputs = llm.generate(prompts, params)
        for output, due, prompt in zip(outputs, expected, prompts, strict=True):
            assert output.finished
            assert output.prompt == (prompt if isinstance(prompt, str) else None)
            assert output.prompt_token_ids == due.prompt_token_ids
            assert output.outputs == due.outputs
        assert [len(output.outputs[0].token_ids) for output in outputs[::2]] == [8, 8]
        assert outputs[0].outputs[0].text
        assert llm.generate("hello there", GREEDY)[0].outputs == outputs[0].outputs
        assert llm.generate([7, 8, 9], params[1])[0].outputs == outputs[1].outputs
        (answer,) = llm.chat(talk, GREEDY)
        assert answer.prompt == "user who are you assistant me a "
        assert answer.outputs[0].token_ids == expected_talk[0]
        both = llm.chat([talk, talk[:1]], GREEDY, chat_template=TEMPLATE.replace("%}a ", "%}b "))
        assert [output.prompt for output in both] == ["user who are you assistant me b ", "user who are you b "]
        with pytest.raises(ValueError, match="4 prompts but 1 sampling_params"):
            llm.generate(prompts, [GREEDY])
        with pytest.raises(ValueError, match=f"token id {VOCAB} is outside the vocabulary"):
            llm.generate([[1, 2], [VOCAB]], GREEDY)
        assert not llm.engine.has_work, "one bad prompt: nothing is queued"
        assert tokens(llm, [[7, 8, 9]]) == tokens(llm, [[7, 8, 9]])
    assert not alive(children[0])
    llm.close()


@pytest.mark.parametrize("between_steps", [False, True])
def test_no_child_outlives_an_exception(between_steps: bool, children: list[int]) -> None:
    def run() -> None:
        with processes("moe", load_tokenizer=False) as llm:
            assert tokens(llm, [[1, 2, 3]])
            assert alive(children[0])
            if between_steps:
                for _ in llm.stream([(None, [1, 2, 3], LONG), (None, [4], LONG)]):
                    raise KeyError("mine")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        within_patience(run)
    assert len(children) == 1
    assert not alive(children[0])


def test_a_child_that_does_not_end_by_itself_is_killed(children: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stop = local.LocalRanks.stop
    monkeypatch.setattr(local.LocalRanks, "stop", lambda self, grace=0.0: stop(self, 0.2))
    with processes(load_tokenizer=False) as llm:
        assert tokens(llm, [[1, 2, 3]])
        os.kill(children[0], signal.SIGSTOP)
    assert not alive(children[0])


def assert_names_the_dead(death: RankDied, pid: int) -> None:
    assert (death.rank, death.host, death.pid) == (1, socket.gethostname(), pid)
    assert str(death).startswith(f"rank 1 (host {socket.gethostname()}, pid {pid}): ")
    assert death.cause == "ended with signal 9"
    assert not death.user_error


def test_a_child_killed_while_generating_is_named(children: list[int]) -> None:
    def run() -> None:
        with processes(load_tokenizer=False) as llm:
            for count, _ in enumerate(llm.stream([(None, [1, 2, 3], LONG), (None, [4, 5], LONG)])):
                if count == 20:
                    os.kill(children[0], signal.SIGKILL)

    with pytest.raises(RankDied) as caught:
        within_patience(run)
    assert_names_the_dead(caught.value, children[0])
    assert not alive(children[0])


def test_a_child_killed_in_the_middle_of_a_step_is_named(children: list[int]) -> None:
    """Stopped first, so that rank 0 is certainly waiting in a collective when it dies."""
    entered = threading.Event()

    def run() -> None:
        with processes(load_tokenizer=False) as llm:
            assert tokens(llm, [[1, 2, 3]])
            reduce = llm.ranks.worker.model.embed.comm.all_reduce
            os.kill(children[0], signal.SIGSTOP)

            def entering(x: Any) -> Any:
                entered.set()
                return reduce(x)

            llm.ranks.worker.model.embed.comm.all_reduce = entering  # type: ignore[method-assign]
            llm.generate([[1, 2, 3]], GREEDY)

    def kill() -> None:
        assert entered.wait(PATIENCE)
        os.kill(children[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RankDied) as caught:
        within_patience(run)
    killer.join()
    assert_names_the_dead(caught.value, children[0])
    assert not alive(children[0])


def test_a_child_killed_while_idle_is_named_by_the_next_call(children: list[int]) -> None:
    with processes(load_tokenizer=False) as llm:
        assert tokens(llm, [[1, 2, 3]])
        os.kill(children[0], signal.SIGKILL)
        with pytest.raises(RankDied) as caught:
            within_patience(lambda: llm.generate([[1, 2, 3]], GREEDY))
        assert_names_the_dead(caught.value, children[0])
    assert not alive(children[0])


FAILING = """
import sys
from qtp.worker.worker import Worker

class Failing(Worker):
    def execute(self, plan):
        if plan.step == 3:
            raise {error}
        return super().execute(plan)

import qtp.worker.follow
qtp.worker.follow.Worker = Failing
from qtp.worker.__main__ import main
sys.exit(main())
"""


def fail_in_children(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Children run `code` with the same argument instead of the module of a rank."""
    start = local.start

    def replaced(size: int, argv: Sequence[str], timeout: float) -> Any:
        return start(size, [argv[0], "-c", code, argv[-1]], timeout)

    monkeypatch.setattr(local, "start", replaced)


def test_a_childs_own_exception_is_told_with_its_cause(children: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_children(monkeypatch, FAILING.format(error="ZeroDivisionError('out of luck')"))

    def run() -> None:
        with processes(load_tokenizer=False) as llm:
            llm.generate([[1, 2, 3]], GREEDY)

    with pytest.raises(RankDied) as caught:
        within_patience(run)
    death = caught.value
    assert (death.rank, death.pid, death.cause) == (1, children[0], "ZeroDivisionError: out of luck")
    assert "in execute" in death.details
    assert death.details.rstrip().endswith("ZeroDivisionError: out of luck")
    assert not death.user_error
    assert not alive(children[0])


def test_a_users_mistake_that_only_a_child_sees_is_a_value_error(children: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_children(monkeypatch, FAILING.format(error="ValueError('model.safetensors: ends in the middle of a tensor')"))

    def run() -> None:
        with processes(load_tokenizer=False) as llm:
            llm.generate([[1, 2, 3]], GREEDY)

    with pytest.raises(ValueError, match=r"^rank 1: model\.safetensors: ends in the middle of a tensor$"):
        within_patience(run)
    assert not alive(children[0])


def test_a_child_that_ends_before_it_joins_is_named(children: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_children(monkeypatch, "import sys; sys.exit(7)")
    with pytest.raises(RankDied, match=rf"^rank 1 \(host {socket.gethostname()}, pid \d+\): ended with exit code 7$") as caught:
        within_patience(processes)
    assert caught.value.pid == children[0]
    assert not alive(children[0])


@pytest.mark.parametrize("step", [1, 4])
def test_a_failing_thread_is_named_with_its_cause(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Worker):
        def execute(self, plan: StepPlan) -> StepResult:
            if self.comm.rank == 2 and plan.step == step:
                raise ZeroDivisionError("out of luck")
            return super().execute(plan)

    monkeypatch.setattr("qtp.worker.follow.Worker", Failing)

    def run() -> None:
        with make("dense", 3, num_kv_blocks=8, block_size=8) as llm:
            llm.generate([[1, 2, 3]], GREEDY)

    with pytest.raises(RankDied) as caught:
        within_patience(run)
    assert (caught.value.rank, caught.value.host, caught.value.cause) == (2, "thread", "ZeroDivisionError: out of luck")
    assert "out of luck" in caught.value.details


def test_ranks_have_cores_of_their_own_and_give_them_back(children: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """As far as there are enough; rank 0's process is afterwards as free as it was."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    caplog.set_level(logging.INFO, "qtp")
    with processes(load_tokenizer=False):
        cores = [os.sched_getaffinity(0), os.sched_getaffinity(children[0])]
        if len(allowed) > 1:
            assert cores[0]
            assert not cores[0] & cores[1]
            assert cores[0] | cores[1] <= allowed
            for rank, mine in enumerate(cores):
                told = [line for line in caplog.messages if line.startswith(f"rank {rank}: read")]
                assert f"on core{'s' * (len(mine) > 1)} {min(mine)}" in told[0]
    assert os.sched_getaffinity(0) == allowed
    assert torch.get_num_threads() == threads
    with processes(load_tokenizer=False, bind_cpu=False, threads=3):
        assert [os.sched_getaffinity(pid) for pid in (0, children[1])] == [allowed, allowed]
        assert torch.get_num_threads() == 3
        assert "3 threads, not pinned" in caplog.text


def test_without_native_code_ranks_talk_over_gloo_and_one_line_says_so(
    children: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make("dense", num_kv_blocks=20) as single:
        expected = tokens(single, [[1, 2, 3]])
    with processes(load_tokenizer=False) as llm:
        assert llm.config.communicator == "shm"
    assert "gloo" not in caplog.text
    monkeypatch.setattr(built.SHM, "module", None)
    with processes(load_tokenizer=False) as llm:
        assert llm.config.communicator == "gloo"
        assert tokens(llm, [[1, 2, 3]]) == expected
    (line,) = [line for line in caplog.messages if "gloo, which is slower" in line]
    assert "the native code was not built" in line
    assert "install a C++ compiler" in line
    caplog.clear()
    with processes(load_tokenizer=False, communicator="gloo"):
        assert "slower" not in caplog.text
    with pytest.raises(ValueError, match="communicator 'shm': the native code was not built"):
        processes(load_tokenizer=False, communicator="shm")


def test_two_at_once_do_not_disturb_each_other(children: list[int]) -> None:
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8]]
    expected = {}
    for kind in ("dense", "moe"):
        with make(kind, num_kv_blocks=20) as single:
            expected[kind] = tokens(single, prompts)
    assert expected["dense"] != expected["moe"]
    with processes("dense", load_tokenizer=False) as dense:
        with processes("moe", load_tokenizer=False) as moe:
            assert len(set(children)) == 2
            streams = [llm.stream([(None, ids, GREEDY) for ids in prompts]) for llm in (dense, moe)]
            last: list[dict[int, tuple[int, ...]]] = [{}, {}]
            for pair in zip(*streams, strict=True):  # one output of each in turn
                for place, output in enumerate(pair):
                    last[place][output.request_id] = output.outputs[0].token_ids
            assert [last[0][i] for i in sorted(last[0])] == expected["dense"]
            assert [last[1][i] for i in sorted(last[1])] == expected["moe"]
        assert not alive(children[1])
        assert alive(children[0])
        assert tokens(dense, prompts) == expected["dense"], "the one that is left goes on"
    assert not alive(children[0])


def test_two_at_once_in_two_threads(children: list[int]) -> None:
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8]]
    results: dict[str, list[tuple[int, ...]]] = {}

    def run(kind: str) -> None:
        with processes(kind, load_tokenizer=False) as llm:
            results[kind] = tokens(llm, prompts)

    threads = [threading.Thread(target=run, args=(kind,)) for kind in ("dense", "moe")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    for kind in ("dense", "moe"):
        with make(kind, num_kv_blocks=20) as single:
            assert results[kind] == tokens(single, prompts)
    assert len(children) == 2
    assert not any(map(alive, children))

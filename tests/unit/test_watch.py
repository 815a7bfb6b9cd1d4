"""Who is found to hang, who is not, and who of several speaks."""

import subprocess
import sys
import threading
import time

import pytest

from launch.watch import RankDied, Sign, StallDetector, last_words, run_while, speaks

TICK = 0.5
TIMEOUT = 4.0


def signs(*told: tuple[float, int]) -> list[Sign]:
    """(silent, entered) of ranks 0, 1, ..."""
    return [Sign(rank, f"host{rank}", 100 + rank, silent, entered) for rank, (silent, entered) in enumerate(told)]


def first_verdict(ticks: list[tuple[int | None, list[Sign]]]) -> tuple[int, RankDied] | None:
    detector = StallDetector(TIMEOUT, TICK)
    for number, (step, seen) in enumerate(ticks):
        death = detector.look(step, seen)
        if death is not None:
            return number, death
    return None


def test_a_silent_rank_hangs_even_between_steps() -> None:
    ticks: list[tuple[int | None, list[Sign]]] = [(None, signs((0, 5), (0, 5), (i * TICK, 5))) for i in range(20)]
    found = first_verdict(ticks)
    assert found is not None
    number, death = found
    assert number == TIMEOUT / TICK
    assert str(death) == "rank 2 (host host2, pid 102): hangs: it gave no sign of life for 4 s (--stall-timeout)"
    assert death.hangs
    assert not death.user_error


def test_in_a_step_the_rank_that_is_behind_hangs() -> None:
    found = first_verdict([(7, signs((0, 31), (0.5, 29), (0, 31)))] * 20)
    assert found is not None
    number, death = found
    assert number == TIMEOUT / TICK
    assert (death.rank, death.cause) == (
        1,
        "hangs: no progress in step 7 for 4 s (--stall-timeout), 2 collectives behind the others",
    )


def test_rank_0_may_be_the_one() -> None:
    found = first_verdict([(7, signs((0, 30), (0, 31)))] * 20)
    assert found is not None
    assert found[1].rank == 0


def test_a_rank_that_is_silent_for_long_is_rather_the_cause_than_one_that_is_behind() -> None:
    found = first_verdict([(7, signs((0, 5), (0, 4), (min(i * TICK, 3.9), 5))) for i in range(20)])
    assert found is not None
    assert found[1].rank == 2
    assert "no sign of life" in found[1].cause


def test_all_in_one_collective_is_said_so() -> None:
    found = first_verdict([(7, signs((0, 5), (0, 5)))] * 20)
    assert found is not None
    assert found[1].cause.endswith("inside the same collective as all others")


@pytest.mark.parametrize(
    "ticks",
    [
        [(None, signs((0, 5), (0, 5)))] * 100,
        [(7, signs((0, 5 + i // 7), (0, 5))) for i in range(100)],
        [(7, signs((0, 5), (0, 5 + i // 7))) for i in range(100)],
        [(i // 7, signs((0, 5), (0, 5))) for i in range(100)],
        [(7 if i % 8 else None, signs((0, 5), (0, 5))) for i in range(100)],
        [(None, signs((0, 5), (3.9, 5)))] * 100,
    ],
    ids=["idle for long", "rank 0 moves", "rank 1 moves", "steps move", "short steps of a lone collective", "slow to answer"],
)
def test_slow_is_not_hung(ticks: list[tuple[int | None, list[Sign]]]) -> None:
    assert first_verdict(ticks) is None


def test_last_words_are_the_traceback_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    last_words(RankDied(3, "h", 7, "out of luck", details="Traceback:\n  here\n\n"))
    assert capsys.readouterr().err == "Traceback:\n  here\nerror: rank 3 (host h, pid 7): out of luck\n"


def test_one_of_many_speaks() -> None:
    """Of all processes of a host that notice the same, one; of another run, another one; and its place ends with it."""
    code = "import sys, time; from launch.watch import speaks; p = speaks(sys.argv[1])\n"
    code += "print(p is not None, flush=True); time.sleep(60)"
    children = [
        subprocess.Popen([sys.executable, "-c", code, secret], stdout=subprocess.PIPE, text=True)
        for secret in ("one", "one", "one", "two")
    ]
    try:
        told = []
        for child in children:
            assert child.stdout is not None
            told.append(child.stdout.readline().strip())
        assert sorted(told[:3]) == ["False", "False", "True"]
        assert told[3] == "True"
    finally:
        for child in children:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
    assert speaks("one") is not None


def test_a_check_ends_the_wait_for_a_call() -> None:
    """The call is left behind; what it does is of no interest any more."""
    over = threading.Event()

    def check() -> None:
        raise RankDied(1, "h", 2, "gone")

    before = time.monotonic()
    with pytest.raises(RankDied, match="gone"):
        run_while(lambda: over.wait(30.0), check)
    assert time.monotonic() - before < 5.0
    over.set()


def test_a_calls_own_error_comes_after_a_death() -> None:
    def fail() -> None:
        raise OSError("connection reset")

    with pytest.raises(OSError, match="connection reset"):
        run_while(fail, lambda: None)
    assert run_while(lambda: 7, lambda: None) == 7

"""The parts of the Ray launcher that need no Ray: what an actor keeps, who sees which devices, what the sweeper finds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import ray_cluster
from launch.ray_keeper import Keeper
from launch.ray_sweep import writers


def ended(keeper: Keeper) -> tuple[str, int]:
    """All that the child prints, and how it ended."""
    output, deadline = [], time.monotonic() + 30
    while time.monotonic() < deadline:
        news = keeper.news(5.0)
        output.append(news["output"])
        assert len(output[-1]) < 2 << 20
        if news["code"] is not None:
            return "".join(output), news["code"]
    raise AssertionError("it did not end")


def test_a_keeper_passes_on_output_and_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("DROPPED", "1")
    code = "import os, sys; print(os.environ['KEPT'], os.environ['NEW'], 'DROPPED' in os.environ, os.getcwd())\n"
    code += "sys.stdout.flush(); sys.stderr.buffer.write(b'\\xff no newline'); sys.exit(9)"
    keeper = Keeper()
    started = keeper.start([sys.executable, "-c", code], {"NEW": "2", "DROPPED": ""}, str(tmp_path))
    assert started["pid"] > 0
    assert ended(keeper) == (f"1 2 False {tmp_path}\n\\xff no newline", 9)
    assert keeper.news(0.0) == {"output": "", "code": 9}


def test_a_keeper_of_a_flood_keeps_little_and_loses_nothing(tmp_path: Path) -> None:
    keeper = Keeper()
    keeper.start([sys.executable, "-c", "for i in range(400_000): print(i)"], {}, str(tmp_path / "is not there"))
    output, code = ended(keeper)
    assert (output, code) == ("".join(f"{i}\n" for i in range(400_000)), 0)


def test_a_keeper_kills_even_a_stopped_child_and_its_input_ends_with_it(tmp_path: Path) -> None:
    keeper = Keeper()
    keeper.kill()  # nothing there yet
    pid = keeper.start([sys.executable, "-c", "import sys; sys.stdin.read()"], {}, str(tmp_path))["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert keeper.news(0.1) == {"output": "", "code": None}
    keeper.kill()
    assert ended(keeper) == ("", -signal.SIGKILL)


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert Keeper().start(["/no/program"], {}, str(tmp_path)) == {"error": "No such file or directory: /no/program"}


ORDER = ray_cluster._Order([0, 3, 1, 2], ["b", "b", "a", "a"])
PLACES = [{"devices": {"GPU": ids, "NPU": []}} for ids in (["2"], ["0"], ["5"], ["4"])]


def test_ranks_are_numbered_within_their_nodes() -> None:
    assert ORDER.local_ranks == [0, 1, 0, 1]
    assert ORDER.local_sizes == [2, 2, 2, 2]


def test_rank_0_uses_the_first_device_it_sees_and_the_others_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told = ray_cluster._devices(PLACES, ORDER, {"CPU": 1.0, "GPU": 1.0})
    assert [t["CUDA_VISIBLE_DEVICES"] for t in told] == ["0,2", "0,2", "5,4", "5,4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 0")
    told = ray_cluster._devices(PLACES, ORDER, {"GPU": 1.0})
    assert [t["CUDA_VISIBLE_DEVICES"] for t in told] == ["2,0", "2,0", "5,4", "5,4"]
    assert ray_cluster._devices(PLACES, ORDER, {"CPU": 1.0}) == [{}, {}, {}, {}]
    for seen, used in (("1,0", "1"), ("", "none")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        with pytest.raises(
            ValueError, match=rf"GPU 2, 0, and rank 0, .* would use {used}; set CUDA_VISIBLE_DEVICES=2,0 for this"
        ):
            ray_cluster._devices(PLACES, ORDER, {"GPU": 1.0})


def test_the_sweeper_finds_who_writes_into_its_folder_and_nobody_else(tmp_path: Path) -> None:
    folder, beside = tmp_path / "a", tmp_path / "a-b"
    folder.mkdir()
    beside.mkdir()
    for path in (folder / "log", beside / "log"):
        path.write_text("text")
    code = "import sys; f = open(sys.argv[1], sys.argv[2]); print(flush=True); sys.stdin.read()"
    children = []
    for path, mode in ((folder / "log", "a"), (folder / "log", "r"), (beside / "log", "a")):
        argv = [sys.executable, "-c", code, str(path), mode]
        children.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"\n"
        with (folder / "log").open("a"):
            assert list(writers(str(folder))) == [children[0].pid]
        (folder / "log").unlink()
        assert list(writers(str(folder))) == [children[0].pid]
    finally:
        for child in children:
            child.communicate()

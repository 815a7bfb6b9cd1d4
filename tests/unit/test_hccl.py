"""The adapter to HCCL over a stand-in for torch_npu, whose hardware is not here: what it calls and with what, and the results."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

STANDIN = Path(__file__).with_name("hccl_standin.py")
sys.path.insert(0, str(STANDIN.parents[1] / "conformance"))
CASES = import_module("communicator_cases").CASES


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hccl")
    done = subprocess.run([sys.executable, STANDIN, folder], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_without_torch_npu_one_line_says_so(told: dict[str, Any]) -> None:
    assert told["missing"] == (
        "ValueError: communicator 'hccl' needs torch_npu (No module named 'torch_npu'); "
        "install the one for this torch or choose gloo"
    )
    assert told["cpu"] == "ValueError: communicator 'hccl' works on npu, not on device cpu"


def test_the_process_group_is_built_as_torch_npu_builds_it(told: dict[str, Any]) -> None:
    for rank, found in enumerate(told["script"]):
        assert (found["rank"], found["size"], found["device"]) == (rank, 2, f"npu:{rank}")
        assert found["options"] == [False, True], "normal priority, the timeout of the rendezvous"


def test_each_operation_is_one_call_on_contiguous_tensors(told: dict[str, Any]) -> None:
    """Half precision travels as float32 where it is added, and as it is where it is only moved."""
    for found in told["script"]:
        assert found["calls"] == [
            "allreduce float32[3]",
            "allreduce float32[2, 2]",
            "allreduce int32[4]",
            "allgather int64[2, 1]",
            "allgather int8[2]",
            "_reduce_scatter_base float32[2] float32[4]",
            "_reduce_scatter_base float32[2, 2] float32[4, 2]",
            "broadcast from 1 uint8[2]",
            "alltoall_base [] [] int64[2, 1] int64[2, 1]",
            "barrier",
            "allreduce float64[2]",
            "allreduce uint8[2]",
            "allreduce bool[2]",
        ]


def test_results_of_two_ranks(told: dict[str, Any]) -> None:
    for rank, found in enumerate(told["script"]):
        assert found["sum"] == [4.5] * 3
        assert found["half sum"] == [[768.0] * 2] * 2
        assert found["strided sum"] == [3, 9, 15, 21]
        assert found["gather"] == [[1, 1, 2, 2]]
        assert found["uneven"] == [1, 2, 2]
        assert found["scatter"] == [[3.0, 6.0], [9.0, 12.0]][rank]
        assert found["half scatter"] == [[[3.0] * 2, [6.0] * 2], [[9.0] * 2, [12.0] * 2]][rank]
        assert found["broadcast"] == [2, 2]
        assert found["exchange"] == [[[11], [21]], [[12], [22]]][rank]


def test_what_hccl_does_not_add_is_refused(told: dict[str, Any]) -> None:
    for found in told["script"]:
        assert found["refused"] == ["ValueError: communicator 'hccl' does not carry tensors of this dtype"] * 3


def test_groups_within_the_group_and_their_end(told: dict[str, Any]) -> None:
    assert [found["split"] for found in told["script"]] == [[[21], None], [[21], [0, 1]]]
    for found in told["script"]:
        assert found["apart"] is True
        assert found["aborted"] == "abort_hccl_comm the communicator was aborted"


@pytest.mark.parametrize("case", [name for name in CASES if name != "checked_tells_who_disagrees"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_conformance(size: int, case: str, told: dict[str, Any]) -> None:
    results = told["conformance"][str(size)][case]
    assert results == ["ok"] * size, "\n".join(results)

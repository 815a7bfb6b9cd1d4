"""The device that the suites of correctness run on: `pytest --device cuda`. conftest sets it before any test is imported.

On cuda the ranks of a loopback communicator share the first card, and so do processes over gloo. What is compared with stays on
the CPU.
"""

from dataclasses import dataclass

import torch

HOST = torch.device("cpu")


@dataclass(kw_only=True)
class Chosen:
    """name: as EngineConfig has it; device: of a communicator; kernels: what `auto` chooses there, and after it torch's."""

    name: str = "cpu"
    device: torch.device = HOST
    kernels: tuple[str, str] = ("native", "torch")


CHOSEN = Chosen()


def choose(name: str) -> None:
    """To be called once, before the tests are imported."""
    if name == "cuda":
        CHOSEN.name, CHOSEN.device, CHOSEN.kernels = "cuda", torch.device("cuda", 0), ("triton", "torch")


def between_processes(tp: int) -> str:
    """What `auto` has `tp` processes of this host talk over."""
    if CHOSEN.name == "cpu":
        return "shm"
    return "gloo" if tp > torch.cuda.device_count() else "nccl"


# What has no meaning on a card, by file or by test, and why. All else runs: what does not ask for a device is the same there.
NATIVE = "compiled kernels run on CPUs"
LEAVES = "deterministic needs the compiled kernels, which run on CPUs"
COMMANDS = "leaves the device to auto and expects what that chooses without a card"
THREADS = "threads that talk through the host cannot be in a graph; processes can, in test_parity_processes"
STAND_IN = "watches the stand-in for graphs"
LEFT_OUT = {
    **{
        f"tests/processes/test_{name}.py": COMMANDS
        for name in (
            *("bad_input", "launchers", "life_and_death", "llm_processes", "load_bytes", "parts", "plan", "quantized_processes"),
            *("ray", "run_pa", "several_hosts", "signals"),
        )
    },
    "tests/conformance/test_cuda_ipc.py": "takes the steps of a kernel one by one, in Triton's interpreter",
    "tests/golden/test_quantize_demo.py": COMMANDS,
    "tests/loopback/test_streams.py": COMMANDS,
    "tests/loopback/test_deterministic.py": LEAVES,
    "tests/loopback/test_parity.py::test_so_do_sums_by_leaves": LEAVES,
    "tests/loopback/test_quantized.py::test_deterministic_sums": LEAVES,
    "tests/loopback/test_row_bias.py": NATIVE,
    **{
        f"tests/loopback/test_graphs.py::test_{name}": THREADS
        for name in (
            *("a_sum_that_fails_within_a_graph_ends_the_step", "graphs_hold_what_ranks_can_sum_within_one"),
            *("one_rank_that_waits_for_the_device_is_enough", "ranks_choose_together"),
        )
    },
    "tests/loopback/test_graphs.py::test_no_graph_outlives_the_communicator": STAND_IN,
    "tests/loopback/test_graphs.py::test_other_ranks_free_theirs_too": STAND_IN,
    "tests/loopback/test_graphs.py::test_first_steps_meet_the_kernels_and_leave_nothing": STAND_IN,
    "tests/processes/test_deterministic_processes.py": LEAVES,
    "tests/unit/test_int8_attention.py": NATIVE,
    "tests/unit/test_native_attention.py": NATIVE,
    "tests/unit/test_native_build.py": NATIVE,
    "tests/unit/test_native_kernels.py": NATIVE,
    "tests/unit/test_quantized_kernels.py": NATIVE,
    "tests/unit/test_sparse_kernels.py": NATIVE,
    "tests/unit/test_triton_memory.py": "watches Triton's interpreter, which runs on CPUs",
}

# What runs on the card; the rest of the tests does the same with either choice.
ON_DEVICE = (
    "tests/loopback/test_batching.py",
    "tests/loopback/test_graphs.py",
    "tests/loopback/test_logprobs.py",
    "tests/loopback/test_parity.py",
    "tests/loopback/test_quantized.py",
    "tests/loopback/test_reduces.py",
    "tests/loopback/test_refused_shapes.py",
    "tests/loopback/test_sampling.py",
    "tests/loopback/test_triton.py",
    "tests/loopback/test_wire_replay.py",
    "tests/processes/test_parity_processes.py",
    *(f"tests/unit/test_triton_{name}.py" for name in ("attention", "experts", "linear", "parts", "quantized", "vocabulary")),
)


def on_device(tests: tuple[str, ...]) -> bool:
    """Whether all these tests, by node id, run on the card."""
    return {test.partition("::")[0] for test in tests} <= set(ON_DEVICE) and not any(map(left_out, tests))


def left_out(test: str) -> str | None:
    """Why the test of that node id does not run on a card; None if it does."""
    name = test.partition("[")[0]
    return LEFT_OUT.get(name) or LEFT_OUT.get(name.partition("::")[0])

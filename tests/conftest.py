"""Shared by all tests: one thread a rank, since the ranks of a test share the machine's cores, and the device they run on."""

import os

import device_helper
import pytest
import torch

from qtp import llm

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="what the suites of correctness run on")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # see triton_helper; transformers imports triton too
        if llm._has_nvidia_driver():
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that auto chooses the CPU, here and in processes that tests start
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device; leave the option out")
    device_helper.choose(device)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        return
    out = [item for item in items if device_helper.left_out(item.nodeid) is not None]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if device_helper.left_out(item.nodeid) is None]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--device") != "cpu":
        for name, reason in device_helper.LEFT_OUT.items():
            terminalreporter.write_line(f"not with --device {config.getoption('--device')}: {name}: {reason}")

"""Proves what is chosen on a card and refused there, who gets which card, and that gloo takes the tensors of a card through host
memory: with stand-ins, for there need be no card."""

import importlib.util
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_helper import LEFT_OUT, ON_DEVICE, left_out
from torch import Tensor

from collectives import CollectiveError, Rendezvous, create
from collectives.communicator import Communicator
from collectives.loopback import loopback
from collectives.staged import Staged
from qtp import resolve as resolve_module
from qtp.config import EngineConfig, ModelConfig
from qtp.llm import cuda_communicator
from qtp.resolve import describe, resolve
from qtp.worker import joining

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig.load(ROOT / "qtp/demo/dense")
BLOCK_BYTES = 128 * 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * 2


def settle(cuda: bool = True, **choices: Any) -> EngineConfig:
    return resolve(EngineConfig(model="m", **choices), MODEL, 1, cuda=cuda)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization 0.0 must be above 0 and at most 1"),
        ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization 1.01 must be above 0 and at most 1"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization nan must be above 0"),
        ({"kv_cache_gib": 0.0}, "kv_cache_gib 0.0 must be a number above 0"),
        ({"kernels": "cuda"}, "kernels 'cuda' is unknown; choose auto, native, triton or torch"),
    ],
)
def test_engine_config_refuses(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="m", **words)


def test_a_card_leaves_its_blocks_to_what_is_measured() -> None:
    config = settle(device="cuda")
    assert (config.device, config.num_kv_blocks) == ("cuda", None)
    assert "KV blocks of 128 tokens from gpu_memory_utilization 0.9, context 2048" in describe(config, MODEL)[0]
    assert settle(device="cuda", num_kv_blocks=5).num_kv_blocks == 5
    assert settle(device="cuda", kv_cache_gib=3.5 * BLOCK_BYTES / 2**30).num_kv_blocks == 3
    assert settle(device="npu").num_kv_blocks is None
    assert settle(device="cpu").num_kv_blocks == 64 * 16
    assert settle(device="cpu", kv_cache_gib=3.5 * BLOCK_BYTES / 2**30).num_kv_blocks == 3


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settle(device="cuda").kernels == "triton"
    assert settle(device="cuda", kernels="torch").kernels == "torch"
    assert settle(device="cuda", kernels="triton").kernels == "triton"
    assert settle(device="npu").kernels == "torch"
    for device in ("cpu", "npu"):
        with pytest.raises(ValueError, match=f"kernels 'triton' run on cuda, not on device {device}; choose auto"):
            settle(device=device, kernels="triton")
    with pytest.raises(ValueError, match="kernels 'native': they run on cpu, not on device cuda; or choose torch"):
        settle(device="cuda", kernels="native")
    with pytest.raises(ValueError, match="deterministic needs the native kernels: they run on cpu"):
        settle(device="cuda", deterministic=True)
    monkeypatch.setattr(resolve_module, "find_spec", lambda name: None if name == "triton" else importlib.util.find_spec(name))
    assert settle(device="cuda").kernels == "torch"
    with pytest.raises(ValueError, match="kernels 'triton': the package triton is not installed; pip install triton; or choose"):
        settle(device="cuda", kernels="triton")


def test_communicators() -> None:
    assert settle(device="cuda", tp=2).communicator == "nccl"
    assert settle(device="cuda").communicator == "solo"
    for name in ("gloo", "loopback", "nccl", "cuda_ipc"):
        assert settle(device="cuda", tp=2, communicator=name).communicator == name
    for name in ("shm", "mpi", "hierarchical", "hierarchical+mpi"):
        with pytest.raises(ValueError, match=r"communicator '.*' works on cpu, not on device cuda; choose auto, or gloo"):
            settle(device="cuda", tp=2, communicator=name)
    for device in ("cpu", "npu"):
        with pytest.raises(ValueError, match=f"communicator 'cuda_ipc' works on cuda, not on device {device}; choose auto"):
            settle(device=device, tp=2, communicator="cuda_ipc")
    config = EngineConfig(model="m", tp=2)
    assert resolve(config, MODEL, 1, cuda=True, cuda_communicator="gloo").communicator == "gloo"


@pytest.mark.parametrize(
    ("choices", "rendezvous", "cards", "name"),
    [
        ({"tp": 2}, {}, 2, "nccl"),
        ({"tp": 3}, {}, 2, "gloo"),
        ({"tp": 3, "launcher": "ray"}, {}, 1, "nccl"),
        ({}, {"size": 4, "local_size": 4}, 4, "nccl"),
        ({}, {"size": 4, "local_size": 4}, 3, "gloo"),
        ({}, {"size": 4, "local_size": 2}, 2, "nccl"),
    ],
)
def test_more_ranks_than_cards_talk_over_gloo(choices: dict[str, Any], rendezvous: dict[str, int], cards: int, name: str) -> None:
    assert cuda_communicator(EngineConfig(model="m", **choices), Rendezvous(**rendezvous), cards) == name


class Module:
    def __init__(self, count: int) -> None:
        self.count, self.current = count, torch.device("cpu")

    def device_count(self) -> int:
        return self.count

    def set_device(self, device: torch.device) -> None:
        self.current = device


def test_ranks_share_cards_in_turn_unless_their_communicator_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module(2)
    monkeypatch.setattr(torch, "get_device_module", lambda name: module)
    found = []
    for rank in range(5):
        config = EngineConfig(model="m", device="cuda", communicator="gloo")
        rendezvous = Rendezvous(rank=rank, size=5, local_rank=rank, local_size=5)
        found.append(joining.use_device(config, rendezvous))
        assert module.current == found[-1]
    assert [device.index for device in found] == [0, 1, 0, 1, 0]
    config = EngineConfig(model="m", device="cuda", communicator="nccl")
    rendezvous = Rendezvous(rank=1, size=4, local_rank=1, local_size=2)
    assert joining.use_device(config, rendezvous) == torch.device("cuda", 1)
    line = (
        "3 ranks on this host need as many cuda devices for communicator 'nccl', and it has 2; start fewer, let them share with "
        "--communicator gloo, or use --device cpu"
    )
    with pytest.raises(ValueError, match=line):
        joining.use_device(config, Rendezvous(rank=1, size=3, local_rank=1, local_size=3))
    module.count = 1  # as where each is shown its own: nccl finds out
    assert joining.use_device(config, Rendezvous(rank=1, size=3, local_rank=1, local_size=3)) == torch.device("cuda", 0)


class Noting(Communicator):
    """One rank, whose operations overwrite what they get, and note whose memory it was."""

    def __init__(self) -> None:
        self.rank, self.size, self.device = 0, 1, torch.device("cpu")
        self.seen: list[Tensor] = []

    def _take(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x.mul_(2)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._take(x)

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Any = None) -> Tensor:
        return self._take(x)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        return self._take(x)

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return self._take(x)

    def all_to_all(self, parts: Any) -> list[Tensor]:
        return [self._take(part) for part in parts]

    def barrier(self) -> None: ...

    def split(self, ranks: Any) -> Communicator:
        return Noting()

    def abort(self) -> None: ...

    def close(self) -> None: ...


def test_staged_works_on_copies_and_gives_back_what_the_device_holds() -> None:
    inner = Noting()
    comm = Staged(inner, torch.device("cpu"))
    x = torch.arange(3.0)
    assert comm.all_reduce(x) is x
    assert comm.broadcast(x) is x
    assert x.tolist() == [0.0, 4.0, 8.0], "in place"
    found = [comm.all_gather(x), comm.reduce_scatter(x), *comm.all_to_all([x])]
    assert [y.tolist() for y in found] == [[0.0, 8.0, 16.0]] * 3
    assert x.tolist() == [0.0, 4.0, 8.0], "what is not in place leaves its input"
    assert len(inner.seen) == 5
    assert all(y.device.type == "cpu" and y.data_ptr() != x.data_ptr() for y in inner.seen)


def test_staged_results_are_on_the_device() -> None:
    """meta stands for a device: nothing can be read from it, so inputs are of the host."""
    comm = Staged(Noting(), torch.device("meta"))
    x = torch.ones(2)
    found = [comm.all_gather(x), comm.reduce_scatter(x), *comm.all_to_all([x])]
    child = comm.split([0])
    assert isinstance(child, Staged)
    assert [y.device.type for y in (*found, child.all_gather(x))] == ["meta"] * 4
    assert (child.device.type, child.rank, child.size) == ("meta", 0, 1)


def test_gloo_on_a_card_goes_through_host_memory() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    rendezvous = Rendezvous(port=listener.getsockname()[1], listener=listener.detach(), timeout=10.0)
    comm = create("gloo", rendezvous, torch.device("cuda", 3))
    assert isinstance(comm, Staged)
    assert (comm.device, comm.inner.device) == (torch.device("cuda", 3), torch.device("cpu"))
    comm.barrier()
    comm.close()
    with pytest.raises(CollectiveError, match="closed"):
        comm.barrier()
    with pytest.raises(ValueError, match="communicator 'hierarchical' works on cpu, not on device cuda; choose gloo"):
        create("hierarchical", Rendezvous(), torch.device("cuda"))


def test_loopback_has_the_device_that_it_is_given() -> None:
    assert [comm.device for comm in loopback(2, torch.device("cuda", 0))] == [torch.device("cuda", 0)] * 2


@pytest.mark.parametrize("name", [*LEFT_OUT, *ON_DEVICE])
def test_what_runs_on_a_card_or_does_not_exists(name: str) -> None:
    file, _, function = name.partition("::")
    assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8")
    assert name not in ON_DEVICE or left_out(name) is None


def test_tests_are_left_out_by_file_and_by_name() -> None:
    assert left_out("tests/loopback/test_parity.py::test_so_do_sums_by_leaves[7-1-tied-1]") is not None
    assert left_out("tests/loopback/test_parity.py::test_so_do_the_kernels_in_torch[7-1-tied-1]") is None
    assert left_out("tests/loopback/test_row_bias.py::test_row_linear[5-1]") == "compiled kernels run on CPUs"


def test_conftest_leaves_them_out_and_says_so() -> None:
    spec = importlib.util.spec_from_file_location("their_conftest", ROOT / "tests/conftest.py")
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    names = ["tests/loopback/test_row_bias.py::test_row_linear[5-1]", "tests/loopback/test_sampling.py::test_seeds[dense]"]
    for device, kept in (("cpu", names), ("cuda", names[1:])):
        gone: list[Any] = []
        lines: list[str] = []
        hook = SimpleNamespace(pytest_deselected=lambda items, gone=gone: gone.extend(items))
        config = SimpleNamespace(getoption=lambda name, device=device: device, hook=hook)
        items = [SimpleNamespace(nodeid=name) for name in names]
        conftest.pytest_collection_modifyitems(config, items)
        conftest.pytest_terminal_summary(SimpleNamespace(write_line=lines.append), config)
        assert [item.nodeid for item in items] == kept
        assert [item.nodeid for item in gone] == [name for name in names if name not in kept]
        told = "not with --device cuda: tests/loopback/test_row_bias.py: compiled kernels run on CPUs"
        assert (told in lines) == (device == "cuda")

"""Whole models with kernels in Triton: the numbers of torch's own operations, from workers in threads. On the CPU Triton's
interpreter runs them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models_helper import make_checkpoint, random_ids
from quantized_helper import compressed, error, make
from torch import Tensor
from triton_helper import DEVICE, few_programs

from collectives.communicator import Communicator
from collectives.loopback import loopback
from qtp.attention.triton_backend import TritonAttention
from qtp.batch import make_batch
from qtp.config import EngineConfig
from qtp.kernels.triton_kernels import TritonKernels
from qtp.llm import prepare
from qtp.worker.worker import Worker

VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
MOE: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "mlp_only_layers": [0],
}
QUANTIZED: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 42}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
Checkpoint = Callable[[str], Path]
Made = Callable[[str], tuple[Path, list[int], Tensor]]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The checkpoint of a name, made once."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            if name == "dense":
                make_checkpoint(folders[name], "qwen2", seed=1, tie_word_embeddings=True, **SIZES, **SLIDING)
            else:
                make_checkpoint(folders[name], "qwen2_moe", seed=1, tie_word_embeddings=False, **SIZES, **MOE)
        return folders[name]

    return get


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`quantized_helper.make`, each made once."""
    found: dict[str, tuple[Path, list[int], Tensor]] = {}

    def get(name: str) -> tuple[Path, list[int], Tensor]:
        if name not in found:
            family, case = name.split("/")
            found[name] = make(family, case, tmp_path_factory.mktemp(case), **QUANTIZED)
        return found[name]

    return get


@torch.inference_mode()
def answers(folder: Path, kernels: str, tp: int, ids: list[int], chunks: list[int], dtype: str = "float32") -> tuple[Tensor, Any]:
    """Of one sequence that goes through in chunks, the logits [T, V] and of each rank's vocabulary the best columns [T, 1]."""
    settings = {"communicator": "loopback", "block_size": 4, "num_kv_blocks": 9, "dtype": dtype, "device": DEVICE.type}
    config, model = prepare(EngineConfig(model=str(folder), tp=tp, kernels="torch", **settings))
    config, table = replace(config, kernels=kernels), (7, 0, 3, 8, 5)

    def run(comm: Communicator) -> tuple[Tensor, Tensor]:
        worker, hidden, at = Worker(config, model, comm), [], 0
        assert isinstance(worker.model.backend, TritonAttention) == (kernels == "triton")
        for count in chunks:
            batch = make_batch([(tuple(ids[at : at + count]), at, table)], config.block_size, comm.device)
            hidden.append(worker.model.hidden(batch))
            at += count
        hidden_TD = torch.cat(hidden)
        logits = worker.model.logits(hidden_TD)
        return logits.cpu(), worker.model.best(hidden_TD, 1, logits.shape[1])[1].cpu()

    with ThreadPoolExecutor(tp) as threads:
        found = list(threads.map(run, loopback(tp, DEVICE)))
    return torch.cat([logits for logits, _ in found], dim=1), [best for _, best in found]


@pytest.mark.parametrize(("name", "tp"), [("dense", 1), ("dense", 2), ("dense", 3), ("moe", 1), ("moe", 2)])
def test_prefill_in_chunks_then_decode(name: str, tp: int, made: Checkpoint) -> None:
    ids, chunks = random_ids(9, VOCAB, tp), [5, 1, 2, 1]
    logits, best = answers(made(name), "triton", tp, ids, chunks)
    right, right_best = answers(made(name), "torch", tp, ids, chunks)
    assert right.std() > 0.5
    torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(x, y) for x, y in zip(best, right_best, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves(dtype: str, made: Checkpoint) -> None:
    """As near to float32 as torch's operations are."""
    ids, chunks = random_ids(7, VOCAB, 5), [4, 1, 2]
    right = answers(made("dense"), "torch", 1, ids, chunks)[0]
    ours, theirs = (answers(made("dense"), kernels, 1, ids, chunks, dtype)[0] - right for kernels in ("triton", "torch"))
    assert ours.norm() <= 1.5 * theirs.norm()


ON_RANKS = [("qwen2/w8a8", 1), ("qwen2/w8a8", 2), ("qwen2/kv", 1), *((f"qwen2_moe/{name}", 2) for name in ("dynamic", "fp8"))]
ONE_BY_ONE = [("qwen2_moe/w8a16-64", 1), ("qwen2_moe/fp8-mixed", 1)]  # experts, by the kernels of dense layers


@pytest.mark.parametrize(("name", "tp"), ON_RANKS + ONE_BY_ONE)
def test_quantized(name: str, tp: int, quantized: Made) -> None:
    """The documented arithmetic, in float64."""
    folder, ids, logits = quantized(name)
    assert error(answers(folder, "triton", tp, ids[:4], [3, 1])[0], logits[:4]) < 1e-4


def test_compressed_experts(quantized: Made) -> None:
    folder, ids, logits = quantized("qwen2_moe/w8a8s")
    small = compressed(folder, folder.with_name("small"), 2)
    assert error(answers(small, "triton", 2, ids[:4], [3, 1])[0], logits[:4]) < 1e-4


def test_the_name_that_is_shown() -> None:
    assert TritonKernels(DEVICE).name == "triton"

"""Proves over two real processes what tests/loopback/test_quantized.py proves over threads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_helper import open_llm, run, run_workers
from quantized_helper import error, make

NAMES = ("w8a8-mixed", "w8a8s", "dynamic", "w8a16-64", "kv-w8a8", "fa3-w8a16")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe"])
def test_the_documented_arithmetic(family: str, name: str, tmp_path: Path) -> None:
    folder, ids, logits = make(family, name, tmp_path)
    with open_llm(folder, 2, communicator="auto", max_num_batched_tokens=64) as llm:
        assert llm.config.communicator == "shm"
        logprobs, _ = run(llm, ids, ids[:4], 2)
    assert error(logprobs, logits) < 1e-4


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe"])
def test_what_two_ranks_compressed(family: str, tmp_path: Path) -> None:
    folder, ids, logits = make(family, "w8a8s", tmp_path)
    small, split = tmp_path / "w8a8sc", tmp_path / "w8a8s"
    command = [
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "qtp.sparse_compressor",
        "--model_path",
        str(folder),
    ]
    command += ["--save_directory", str(small), "--save_split_w8a8s_dir", str(split), "--multiprocess_num", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for made in (small, split):
        with open_llm(made, 2, communicator="auto", max_num_batched_tokens=64) as llm:
            logprobs, _ = run(llm, ids, ids[:4], 2)
        assert error(logprobs, logits) < 1e-4


def test_w8a8_gives_the_bits_of_one_rank(tmp_path: Path) -> None:
    folder, ids, _ = make("qwen2", "w8a8", tmp_path)
    expected = run_workers(folder, 1, ids, dtype="bfloat16").argsort(dim=1, descending=True, stable=True)
    with open_llm(folder, 2, communicator="auto", dtype="bfloat16", max_num_batched_tokens=64) as llm:
        logprobs, _ = run(llm, ids, ids[:4], 2)
    assert torch.equal(logprobs.argsort(dim=1, descending=True, stable=True), expected)

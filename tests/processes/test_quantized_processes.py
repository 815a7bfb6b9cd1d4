"""Proves over two real processes and shared memory what tests/loopback/test_quantized.py proves over threads: each case of it."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from models_helper import open_llm, run, run_workers
from quantized_helper import CASES, compressed, error, make

TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]


def on_two_ranks(*words: str) -> None:
    done = subprocess.run([*TORCHRUN, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_documented_arithmetic(tmp_path: Path) -> None:
    made = {}
    for family in ("qwen2", "qwen2_moe"):
        for name in CASES:
            made[family, name] = make(family, name, tmp_path / f"{family}-{name}")
        folder, ids, logits = made[family, "w8a8s"]
        made[family, "w8a8sc"] = compressed(folder, tmp_path / f"{family}-w8a8sc", 2), ids, logits
    (tmp_path / "asked.json").write_text(json.dumps([(str(folder), ids) for folder, ids, _ in made.values()]), encoding="utf-8")
    on_two_ranks(str(Path(__file__).with_name("quantized_ranks.py")), str(tmp_path / "asked.json"), str(tmp_path))
    for number, (case, (folder, ids, logits)) in enumerate(made.items()):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert error(found, logits) < 1e-4, case
        if case == ("qwen2", "w8a8"):
            assert torch.equal(torch.log_softmax(found, dim=-1), run_workers(folder, 1, ids)), "the bits of one rank"


def test_an_engine_of_two_ranks(tmp_path: Path) -> None:
    folder, ids, logits = make("qwen2_moe", "w8a8-mixed", tmp_path)
    with open_llm(folder, 2, communicator="auto", max_num_batched_tokens=64) as llm:
        assert llm.config.communicator == "shm"
        logprobs, _ = run(llm, ids, ids[:4], 2)
    assert error(logprobs, logits) < 1e-4


def test_what_two_ranks_compressed(tmp_path: Path) -> None:
    folder, ids, logits = make("qwen2_moe", "w8a8s", tmp_path)
    small, split = tmp_path / "w8a8sc", tmp_path / "w8a8s"
    given = ["--model_path", str(folder), "--save_directory", str(small), "--save_split_w8a8s_dir", str(split)]
    on_two_ranks("-m", "qtp.sparse_compressor", *given, "--multiprocess_num", "2")
    for made in (small, split):
        with open_llm(made, 2, communicator="auto", max_num_batched_tokens=64) as llm:
            logprobs, _ = run(llm, ids, ids[:4], 2)
        assert error(logprobs, logits) < 1e-4

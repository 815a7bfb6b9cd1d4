"""A rank reads only its slices: bytes read and peak memory of a fresh process, as the operating system counts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Qwen2-0.5B shape cut to one layer: 302 MB, most of it the tied embedding."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    command = [sys.executable, ROOT / "scripts/make_checkpoint.py", "--like", "qwen2-0.5b", "--layers", "1", "--out", folder]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


@pytest.mark.parametrize(("tp", "rank"), [(1, 0), (3, 1), (8, 7)])
def test_a_rank_reads_its_shard_and_little_more(checkpoint: Path, tp: int, rank: int) -> None:
    command = [sys.executable, ROOT / "scripts/bench/load.py", "--model", checkpoint, "--tp", str(tp), "--rank", str(rank)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    report = json.loads(done.stdout)
    whole = (checkpoint / "model.safetensors").stat().st_size
    assert 0.9 * whole / tp < report["shard_bytes"] < 1.2 * whole / tp + MIB
    assert report["read_bytes"] <= 1.1 * report["shard_bytes"]
    assert report["peak_bytes"] <= report["shard_bytes"] + 64 * MIB

"""A float8 checkpoint in llm-compressor's words is read as the same tensors in ours, as it is and after a reshard."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors_helper import FP8_DYNAMIC
from models_helper import random_ids, run_workers
from quantized_helper import TOKENS, float_checkpoint, quantized_checkpoint
from safetensors.torch import load_file, save_file

from qtp.reshard.__main__ import main as reshard


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe"])
def test_the_same_bits_from_either(family: str, tmp_path: Path) -> None:
    """theirs: scales in bfloat16, no description, lm_head and routers told as ignored."""
    source, ids = float_checkpoint(tmp_path / "float", family, 7), random_ids(TOKENS, 131, 1)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    quantized_checkpoint(source, ours, "W8A8_FP8", seed=1, ids=ids, choose=lambda name: "FLOAT" if "lm_head" in name else "")
    file = ours / "quant_model_weight_w8a8_fp8.safetensors"
    halves = {name: x.bfloat16() if name.endswith("weight_scale") else x for name, x in load_file(file).items()}
    save_file({name: x.float() if name.endswith("weight_scale") else x for name, x in halves.items()}, file)
    theirs.mkdir()
    save_file(halves, theirs / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"quantization_config": FP8_DYNAMIC}
    (theirs / "config.json").write_text(json.dumps(config), encoding="utf-8")
    expected = run_workers(ours, 2, ids)
    assert torch.equal(run_workers(theirs, 2, ids), expected)
    assert reshard(["--model", str(theirs), "--save_directory", str(tmp_path / "cut"), "--tp", "2"]) == 0
    assert torch.equal(run_workers(tmp_path / "cut", 2, ids), expected)

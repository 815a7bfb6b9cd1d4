"""Quantized checkpoints of every type from any cut to any other and back, bit for bit; W8A8SC too, whose parts are compressed."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from models_helper import run_workers
from quantized_helper import compressed, error, float_checkpoint, make, quantized_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtp.reshard.__main__ import main
from tests.reshard_helper import same

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
WORLDS = range(1, 9)
KINDS = {
    "w8a8": ("W8A8", {"old": True}),
    "w8a8s": ("W8A8S", {}),
    "dynamic": ("W8A8_DYNAMIC", {}),
    "fp8": ("W8A8_FP8", {}),
    "w8a16": ("W8A16", {}),
    "w8a16-64": ("W8A16", {"group_size": 64}),
    "kv": ("FLOAT", {"kv": "C8"}),
    "fa3-anti": ("W8A8", {"kv": "FAQuant", "anti": True}),
}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def moved(source: Path, target: Path, *words: str) -> Path:
    assert main(["--model", str(source), "--save_directory", str(target), *words]) == 0
    return target


def check_whole(folder: Path, source: Path) -> None:
    (found,), (expected,) = (list(f.glob("*.safetensors")) for f in (folder, source))
    assert found.name == expected.name
    assert same(load_file(found), load_file(expected))
    for file in source.glob("*.json"):
        assert json.loads((folder / file.name).read_text()) == json.loads(file.read_text()), file.name


def parts_of(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(next(part.glob("*.safetensors"))) for part in sorted(folder.glob("part*"))]


def alike(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> bool:
    return all(same(a, b) for a, b in zip(found, expected, strict=True))


def check_all(source: Path, tmp_path: Path, first: Callable[[int], Path], worlds: Sequence[int] = WORLDS) -> None:
    """From each number of ranks to each other: the parts are those that the whole checkpoint is cut into, and these, put
    together, are the checkpoint."""
    direct = {n: first(n) for n in worlds}
    held = {n: parts_of(direct[n]) for n in worlds}
    assert [len(held[n]) for n in worlds] == list(worlds)
    for n, m in product(worlds, worlds):
        again = moved(direct[n], tmp_path / f"{n}-{m}", "--tp", str(m))
        assert alike(parts_of(again), held[m]), (n, m)
        shutil.rmtree(again)
    for n in worlds:
        check_whole(moved(direct[n], tmp_path / f"{n}-whole", "--format", "hf"), source)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe"])
@pytest.mark.parametrize("name", KINDS)
def test_every_cut_to_every_other_and_back(name: str, family: str, tmp_path: Path) -> None:
    kind, how = KINDS[name]
    source = tmp_path / "whole"
    sizes = {"num_hidden_layers": 1, "intermediate_size": 150, "num_experts": 8}
    if family == "qwen2":
        del sizes["num_experts"]
    quantized_checkpoint(float_checkpoint(tmp_path / "float", family, 7, **sizes), source, kind, seed=1, ids=IDS, **how)
    check_all(source, tmp_path, lambda n: moved(source, tmp_path / f"{n}", "--tp", str(n)))


@pytest.mark.parametrize(("family", "worlds"), [("qwen2", WORLDS), ("qwen2_moe", (1, 3, 4, 7))])
def test_so_do_compressed_parts(family: str, worlds: Sequence[int], tmp_path: Path) -> None:
    source = tmp_path / "whole"
    plain = float_checkpoint(tmp_path / "float", family, 7, num_hidden_layers=1)
    quantized_checkpoint(plain, source, "W8A8S", seed=1, ids=IDS)
    check_all(source, tmp_path, lambda n: compressed(source, tmp_path / f"{n}", n), worlds)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "dynamic"])
def test_so_do_experts_cut_by_column(name: str, tmp_path: Path) -> None:
    kind, how = KINDS[name]
    source, sizes = tmp_path / "whole", {"num_hidden_layers": 1, "moe_intermediate_size": 150}
    quantized_checkpoint(float_checkpoint(tmp_path / "float", "qwen2_moe", 7, **sizes), source, kind, seed=1, ids=IDS, **how)
    three = moved(source, tmp_path / "3", "--tp", "3", "--moe_tp", "3")
    eight = moved(three, tmp_path / "8", "--tp", "8", "--moe_tp", "4")
    assert alike(parts_of(eight), parts_of(moved(source, tmp_path / "direct", "--tp", "8", "--moe_tp", "4")))
    check_whole(moved(eight, tmp_path / "back", "--format", "hf"), source)


def test_compressed_parts_that_were_cut_again_run(tmp_path: Path) -> None:
    source, ids, logits = make("qwen2_moe", "w8a8s", tmp_path)
    for a, b in ((3, 2), (8, 1), (1, 7)):
        cut = moved(compressed(source, tmp_path / f"{a}", a), tmp_path / f"{a}-{b}", "--tp", str(b))
        assert not (tmp_path / f"{a}-{b}.w8a8s").exists()
        assert alike(parts_of(cut), parts_of(compressed(source, tmp_path / f"direct-{b}", b)))
        assert error(run_workers(cut, b, ids), logits) < 1e-4
        check_whole(moved(cut, tmp_path / f"{a}-{b}-whole", "--format", "hf", "--verify"), source)


def test_a_stream_that_is_damaged_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, ids, _ = make("qwen2", "w8a8s", tmp_path)
    folder = compressed(source, tmp_path / "1", 1)
    file = folder / "part0-of-1" / "quant_model_weight_w8a8sc.safetensors"
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    name = "model.layers.0.mlp.down_proj.weight"
    first, stop = json.loads(raw[8:start])[name]["data_offsets"]
    raw[start + (first + stop) // 2] ^= 16
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{name}: W8A8SC.*compress the checkpoint again") as caught:
        run_workers(folder, 1, ids)
    assert "\n" not in str(caught.value)
    assert main(["--model", str(folder), "--verify"]) == 2
    assert name in capfd.readouterr().err


def test_a_part_of_another_source_is_refused(tmp_path: Path) -> None:
    """Of the same shapes and outliers: what differs is a single value."""
    plain = float_checkpoint(tmp_path / "float", "qwen2", 7, num_hidden_layers=1)
    cut = []
    for name in "ab":
        quantized_checkpoint(plain, tmp_path / name, "W8A8S", seed=1, ids=IDS)
        if name == "b":
            file = tmp_path / name / "quant_model_weight_w8a8s.safetensors"
            tensors = load_file(file)
            tensors["model.norm.weight"][3] += 1
            save_file(tensors, file)
        cut.append(compressed(tmp_path / name, tmp_path / f"{name}2", 2))
    shutil.copyfile(*(folder / "part1-of-2" / "quant_model_weight_w8a8sc.safetensors" for folder in cut))
    with pytest.raises(ValueError, match=r"part1-of-2.*is not the part that .* names"):
        run_workers(cut[1], 2, IDS)


def test_only_w8a8s_is_compressed(tmp_path: Path) -> None:
    source = float_checkpoint(tmp_path / "float", "qwen2", 7)
    with pytest.raises(ValueError, match=r"is a float checkpoint, and only w8a8s can be compressed"):
        compressed(source, tmp_path / "out", 2)
    quantized_checkpoint(source, tmp_path / "w8a8", "W8A8", seed=1, ids=IDS)
    with pytest.raises(ValueError, match=r"is w8a8, and only w8a8s can be compressed"):
        compressed(tmp_path / "w8a8", tmp_path / "out", 2)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source, _, _ = make("qwen2", "w8a8s", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    torch.set_num_threads(1)
    from qtp.sparse_compressor import command

    for target, words in ((out, "holds something already"), (source, "is the input itself"), (source / "in", "lies inside")):
        with pytest.raises(ValueError, match=words):
            command(["--model_path", str(source), "--save_directory", str(target), "--tp", "2"])
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]

"""Any cut to any other and back, bit for bit; each part holds what its rank is declared to hold; names, dtypes and .bin files."""

import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtp.config import ModelConfig
from qtp.layout.spec import Part, Spec
from qtp.layout.split import Even, Grid, KVHeads, OfRows, QueryHeads, Replicate
from qtp.reshard import reshard as module
from qtp.reshard.__main__ import main
from qtp.weights.checkpoint import open_checkpoint
from qtp.weights.loader import load
from qtp.weights.manifest import MANIFEST
from qtp.weights.mindformers import from_mindformers, to_mindformers
from qtp.weights.names import declare
from qtp.weights.parts import Parts
from qtp.weights.store import Store
from tests.reshard_helper import BESIDE, DENSE, MOE, bits, contents, reshard, same, tensors, write_checkpoint

CONFIGS = {"dense": DENSE, "moe": MOE}
Whole = tuple[Path, dict[str, Tensor], dict[str, Any]]  # folder, tensors, config.json
GRIDS = [(1, 1), (2, 1), (1, 3), (3, 1), (2, 2), (5, 1), (1, 5), (2, 3), (7, 1), (4, 2), (2, 4), (8, 1)]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module", params=CONFIGS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp(request.param) / "whole"
    config = CONFIGS[request.param]
    return folder, write_checkpoint(folder, config), config


def check_parts(folder: Path, expected: dict[str, Tensor], specs: tuple[Spec, ...], grid: Grid) -> None:
    """Each part holds the boxes of its rank and nothing else, by the safetensors library and plain slicing."""
    for rank in range(grid.size):
        found, own = tensors(folder / f"part{rank}-of-{grid.size}"), {}
        for part in (part for spec in specs for part in spec.parts):
            x = expected[part.name][tuple(slice(r.start, r.stop) for r in part.split.box(part.shape, rank, grid))]
            if x.numel():
                own[part.name] = x
        assert same(found, own), rank


def test_every_cut_to_every_other_and_back(whole: Whole, tmp_path: Path) -> None:
    folder, expected, config = whole
    specs = declare(ModelConfig.from_dict(config))
    for n in range(1, 9):
        reshard(folder, tmp_path / f"{n}", "--tp", n)
        check_parts(tmp_path / f"{n}", expected, specs, Grid.of(n))
    for a, b in product(range(1, 9), range(1, 9)):
        cut = reshard(tmp_path / f"{a}", tmp_path / f"{a}-{b}", "--tp", b)
        check_parts(cut, expected, specs, Grid.of(b))  # so all cuts for b ranks are the same, and one of them shows the way back
        if (a + b) % 8:
            continue
        back = reshard(cut, tmp_path / f"{b}-hf", "--format", "hf")
        assert same(tensors(back), expected)
        with safe_open(str(back / "model.safetensors"), "pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("moe_ep", "moe_tp"), GRIDS)
def test_experts_cut_by_number_and_by_columns(moe_ep: int, moe_tp: int, tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path / "whole", MOE)
    flags = ("--tp", moe_ep * moe_tp, "--moe_ep", moe_ep, "--moe-tp", moe_tp)
    first = reshard(tmp_path / "whole", tmp_path / "first", "--tp", 3, "--moe_tp", 3)
    cut = reshard(first, tmp_path / "cut", *flags, "--verify")
    specs, grid = declare(ModelConfig.from_dict(MOE)), Grid.of(moe_ep * moe_tp, moe_ep=moe_ep, moe_tp=moe_tp)
    check_parts(cut, expected, specs, grid)
    assert same(tensors(reshard(cut, tmp_path / "back", "--format", "hf")), expected)


def test_a_rank_loads_the_same_from_its_part_alone(whole: Whole, tmp_path: Path) -> None:
    folder, _, config = whole
    specs, cpu = declare(ModelConfig.from_dict(config)), torch.device("cpu")
    for moe_ep, moe_tp in ((1, 1), (3, 1), (2, 2), (1, 7), (4, 2)):
        grid = Grid.of(moe_ep * moe_tp, moe_ep=moe_ep, moe_tp=moe_tp)
        flags = ("--tp", grid.size, "--moe_ep", moe_ep, "--moe_tp", moe_tp)
        for names in ("hf", "mindformers"):
            cut = reshard(folder, tmp_path / f"{moe_ep}x{moe_tp}-{names}", *flags, "--names", names)
            for rank in range(grid.size):
                with Store(folder) as store, open_checkpoint(cut, "model", grid, rank) as parts:
                    theirs = load(store, specs, rank, grid, torch.float32, cpu)
                    ours = load(parts, specs, rank, grid, torch.float32, cpu)
                    assert list(theirs) == list(ours)
                    assert same(theirs, ours)
                    assert isinstance(parts, Parts)
                    assert parts.bytes_read == store.bytes_read
                    assert [s.bytes_read for s in parts._stores if s.bytes_read] == [parts.bytes_read]
                    assert parts._stores[rank].bytes_read == parts.bytes_read


def test_what_goes_along(whole: Whole, tmp_path: Path) -> None:
    folder, _, _ = whole
    cut = reshard(folder, tmp_path / "cut", "--tp", 3)
    assert {path.name for path in cut.iterdir()} == {*BESIDE, "config.json", MANIFEST, *(f"part{i}-of-3" for i in range(3))}
    for name, text in BESIDE.items():
        assert (cut / name).read_text() == text
    assert (cut / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    back = reshard(cut, tmp_path / "back", "--format", "hf")
    assert {path.name for path in back.iterdir()} == {*BESIDE, "config.json", MANIFEST, "model.safetensors"}


def test_large_results_are_split_as_hugging_face_does(whole: Whole, tmp_path: Path) -> None:
    folder, expected, _ = whole
    for most in ("4KB", "1KiB", "0.0015MB"):
        back = reshard(folder, tmp_path / most, "--format", "hf", "--max_shard_size", most)
        assert same(tensors(back), expected)
        files = sorted(path.name for path in back.glob("*.safetensors"))
        assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        index = json.loads((back / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(len(bits(x)) for x in expected.values())
        limit = {"4KB": 4000, "1KiB": 1024, "0.0015MB": 1500}[most]
        for file in files:
            with safe_open(str(back / file), "pt") as content:
                names = list(content.keys())
            assert {index["weight_map"][name] for name in names} == {file}
            assert len(names) == 1 or sum(len(bits(expected[name])) for name in names) <= limit
        assert Store(back).entries.keys() == expected.keys()


def test_what_the_model_does_not_declare_is_kept_once_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    extra = {inv_freq: torch.randn(3), "lm_head.weight": torch.randn(2, 2), "empty": torch.zeros(0, 3)}
    expected = write_checkpoint(tmp_path / "whole", DENSE, **extra)
    for n, before in ((3, "whole"), (2, "3"), (5, "2")):
        reshard(tmp_path / before, tmp_path / f"{n}", "--tp", n, "--verify")
        (line,) = capfd.readouterr().err.splitlines()
        assert line == "warning: the model does not declare empty and 2 more; kept whole, in part 0 alone"
        assert extra.keys() <= tensors(tmp_path / f"{n}/part0-of-{n}").keys()
        assert not extra.keys() & tensors(tmp_path / f"{n}/part1-of-{n}").keys()
    assert same(tensors(reshard(tmp_path / "5", tmp_path / "back", "--format", "hf")), expected)


def test_mindformers_names() -> None:
    layer = "model.layers.11."
    known = {
        "model.embed_tokens.weight": ("model.tok_embeddings.embedding_weight", None),
        "model.norm.weight": ("model.norm_out.weight", None),
        "lm_head.weight": ("lm_head.weight", None),
        layer + "self_attn.q_proj.bias": (layer + "attention.wq.bias", None),
        layer + "self_attn.o_proj.weight": (layer + "attention.wo.weight", None),
        layer + "mlp.gate_proj.weight": (layer + "feed_forward.w1.weight", None),
        layer + "mlp.down_proj.weight": (layer + "feed_forward.w2.weight", None),
        layer + "mlp.up_proj.weight": (layer + "feed_forward.w3.weight", None),
        layer + "input_layernorm.weight": (layer + "attention_norm.weight", None),
        layer + "post_attention_layernorm.weight": (layer + "ffn_norm.weight", None),
        layer + "mlp.gate.weight": (layer + "feed_forward.routed_experts.router.dense.weight", None),
        layer + "mlp.experts.12.gate_proj.weight": (layer + "feed_forward.routed_experts.ffn.w1.weight", 12),
        layer + "mlp.experts.0.down_proj.weight": (layer + "feed_forward.routed_experts.ffn.w2.weight", 0),
        layer + "mlp.experts.3.up_proj.weight": (layer + "feed_forward.routed_experts.ffn.w3.weight", 3),
        layer + "mlp.shared_expert.up_proj.weight": (layer + "feed_forward.shared_experts.w3.weight", None),
        layer + "mlp.shared_expert_gate.weight": (layer + "feed_forward.shared_experts_gate.weight", None),
        layer + "self_attn.rotary_emb.inv_freq": (layer + "self_attn.rotary_emb.inv_freq", None),
    }
    for name, theirs in known.items():
        assert to_mindformers(name) == theirs
        assert from_mindformers(theirs[0], theirs[1] or 0) == name
    for config in CONFIGS.values():
        names = [part.name for spec in declare(ModelConfig.from_dict(config)) for part in spec.parts]
        assert len({to_mindformers(name) for name in names}) == len(names)
        assert [from_mindformers(n, e or 0) for n, e in map(to_mindformers, names)] == names


def test_mindformers_folders(whole: Whole, tmp_path: Path) -> None:
    folder, expected, config = whole
    theirs = tensors(reshard(folder, tmp_path / "theirs", "--format", "hf", "--names", "mindformers"))
    stacked: dict[str, Any] = {}
    for name, x in expected.items():
        new, expert = to_mindformers(name)
        stacked[new] = x if expert is None else [*stacked.get(new, []), x]
    assert same(theirs, {n: torch.stack(x) if isinstance(x, list) else x for n, x in stacked.items()})
    assert same(tensors(reshard(tmp_path / "theirs", tmp_path / "back", "--format", "hf", "--verify")), expected)
    grids = [(2, 1), (3, 1), (2, 2), (1, 5)] if config is MOE else [(3, 1)]
    for ep, tp in grids:
        flags = ("--tp", ep * tp, "--moe_ep", ep, "--moe_tp", tp)
        cut = reshard(tmp_path / "theirs", tmp_path / f"cut{ep}{tp}", *flags, "--names", "mindformers", "--verify")
        again = reshard(cut, tmp_path / f"again{ep}{tp}", "--tp", 4, "--verify")
        assert same(tensors(reshard(again, tmp_path / f"back{ep}{tp}", "--format", "hf")), expected)


def quantized(config: ModelConfig) -> tuple[Spec, ...]:
    """What a W8A8 checkpoint may hold, cut as it is to be: no dtype is told."""
    query, kv, heads = QueryHeads(0, config.heads), KVHeads(0, config.heads), config.num_heads * config.head_dim
    kv_width, hidden = config.num_kv_heads * config.head_dim, config.hidden_size
    parts = {
        "q.weight": ((heads, hidden), query),
        "q.deq_scale": ((heads,), query),
        "q.quant_bias": ((heads,), query),
        "q.input_scale": ((1,), Replicate()),
        "k.weight_scale": ((kv_width, 1), kv),
        "o.weight": ((hidden, heads), QueryHeads(1, config.heads)),
        "o.quant_bias": ((hidden,), OfRows(QueryHeads(1, config.heads), (hidden, heads), once=True)),
        "down.weight": ((hidden, config.intermediate_size), Even(1, 8)),
        "down.weight_scale": ((hidden, 5), Even(1)),
        "scalar": ((), Replicate()),
    }
    return tuple(Spec(name, (Part(name, shape, split),)) for name, (shape, split) in parts.items())


QUANTIZED = {
    "q.weight": torch.int8,
    "q.deq_scale": torch.int64,
    "q.quant_bias": torch.int32,
    "q.input_scale": torch.float16,
    "k.weight_scale": torch.float32,
    "o.weight": torch.int8,
    "o.quant_bias": torch.int32,
    "down.weight": torch.int8,
    "down.weight_scale": torch.float32,
    "scalar": torch.int64,
}


def test_quantized_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "declare", quantized)
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(DENSE))
    (folder / "quant_model_description_w8a8.json").write_text("{}")
    specs = quantized(ModelConfig.from_dict(DENSE))
    expected = {name: contents((spec,), QUANTIZED[name])[name] for spec in specs for name in [spec.name]}
    save_file(expected, str(folder / "quant_model_weight_w8a8.safetensors"))
    for n in (1, 3, 4, 7):
        cut = reshard(folder, tmp_path / f"{n}", "--tp", n, "--verify")
        assert (cut / f"part0-of-{n}/quant_model_weight_w8a8.safetensors").is_file()
        assert (cut / "quant_model_description_w8a8.json").is_file()
        check_parts(cut, expected, specs, Grid.of(n))
        back = reshard(cut, tmp_path / f"{n}-hf", "--format", "hf")
        assert same(tensors(back), expected)
        assert (back / "quant_model_weight_w8a8.safetensors").is_file()
    split = reshard(folder, tmp_path / "split", "--format", "hf", "--max_shard_size", "1KB")
    assert (split / "quant_model_weight_w8a8.safetensors.index.json").is_file()
    assert same(tensors(split), expected)
    capfd.readouterr()
    argv = ["--model", str(folder), "--save_directory", str(tmp_path / "float"), "--tp", "2", "--dtype", "float32"]
    assert main(argv) == 2
    assert "--dtype converts float checkpoints only" in capfd.readouterr().err
    assert not (tmp_path / "float").exists()


@pytest.mark.parametrize("word", ["float32", "float16", "bfloat16"])
def test_other_floats(word: str, tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path / "whole", MOE)
    cut = reshard(tmp_path / "whole", tmp_path / "cut", "--tp", 3, "--dtype", word, "--verify")
    assert json.loads((cut / "config.json").read_text()) == {**MOE, "torch_dtype": word}
    converted = {name: x.to(getattr(torch, word)) for name, x in expected.items()}
    assert same(tensors(reshard(cut, tmp_path / "back", "--format", "hf")), converted)


def test_a_weight_beyond_the_range_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "whole"
    expected = write_checkpoint(folder, DENSE)
    for file in folder.glob("*.safetensors"):
        save_file({n: 1e6 * expected[n] if "norm" in n else expected[n] for n in load_file(str(file))}, str(file))
    assert main(["--model", str(folder), "--save_directory", str(tmp_path / "cut"), "--tp", "2", "--dtype", "float16"]) == 2
    err = capfd.readouterr().err
    assert "are beyond the range of torch.float16" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "cut/config.json").exists()


@pytest.mark.parametrize("files", [1, 2])
def test_bin_files(files: int, tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole", MOE)
    bins = tmp_path / "bins"
    bins.mkdir()
    (bins / "config.json").write_text((tmp_path / "whole/config.json").read_text())
    tied = {**whole, "tied": whole["model.embed_tokens.weight"], "rows": whole["lm_head.weight"][3:9]}
    if files == 1:
        torch.save(tied, bins / "pytorch_model.bin")
    else:
        weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(tied)}
        for file in set(weight_map.values()):
            torch.save({n: x for n, x in tied.items() if weight_map[n] == file}, bins / file)
        (bins / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    cut = reshard(bins, tmp_path / "cut", "--tp", 3, "--verify")
    assert same(tensors(reshard(cut, tmp_path / "back", "--format", "hf")), tied)
    reshard(bins, tmp_path / "theirs", "--tp", 3, "--names", "mindformers", "--dtype", "float32", "--verify")


class Odd:
    """What a pickle may hold beside tensors."""


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"a": 3}, "a is a int, and only tensors are taken"),
        ({"a": Odd()}, "cannot be read as tensors alone"),
        ([torch.ones(2)], "holds a list"),
        ({"a": torch.ones(2, 3).t()}, "is not a dense row-major tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "is not a dense row-major tensor"),
        (b"nothing", "cannot be read as tensors alone"),
        (None, "cannot be read as tensors alone"),
    ],
    ids=["number", "object", "list", "transposed", "complex", "noise", "truncated"],
)
def test_bin_files_that_are_refused(content: object, named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    file = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save({"a": torch.ones(500)} if content is None else content, file)
        if content is None:
            os.truncate(file, file.stat().st_size - 300)
    capfd.readouterr()
    assert main(["--model", str(tmp_path), "--save_directory", str(tmp_path.with_name("cut")), "--tp", "2"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert named in line
    assert str(file) in line
    assert not tmp_path.with_name("cut").exists()

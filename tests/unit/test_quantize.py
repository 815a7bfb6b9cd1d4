"""The arithmetic of quantization against the documented formulas, what smoothing keeps, the share of outliers, and the flags."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qtp.attention.torch_backend import rotate
from qtp.cli import byte_count
from qtp.quantize import arithmetic
from qtp.quantize.__main__ import command, main
from qtp.quantize.evaluate import sliding
from qtp.quantize.lowbit import low_bit
from qtp.quantize.observe import reach
from qtp.quantize.settings import PRESETS, Settings, settings, with_preset
from qtp.quantize.write import Planned, WeightFiles
from qtp.weights.store import Store


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 3.0), (-3.0, -1.0), (-2.0, 2.0), (0.0, 0.0)])
def test_an_activation_has_the_documented_scale_and_offset(low: float, high: float) -> None:
    x = arithmetic.activation(low, high)
    bottom, top = min(low, 0.0), max(high, 0.0)
    if bottom < top:
        assert x.scale == pytest.approx((top - bottom) / 255)
    assert x.offset == round(-bottom / x.scale) - 128
    values = torch.linspace(low, high, 999)
    assert (x.through(values) - values).abs().max() <= x.scale * 0.5001
    assert x.through(torch.zeros(1)).item() == 0, "zero is kept exactly"


def test_static_arithmetic_gives_the_layer() -> None:
    w, bias, values = random(24, 40), 3 * random(24, seed=2), 2 * random(50, 40, seed=3) + 0.7
    x = arithmetic.activation(values.min().item(), values.max().item())
    assert x.offset != 0
    scales = arithmetic.static_scales(arithmetic.rows_symmetric(w), bias, x)
    q = (w / scales).round().to(torch.int8)
    deq, quant_bias = arithmetic.static(q, scales, bias, x)
    x_q = (values / x.scale + x.offset).round().clamp(-128, 127)
    y = (x_q @ q.float().T + quant_bias) * deq
    exact = values @ w.T + bias
    assert ((y - exact).norm() / exact.norm()).item() < 0.01
    assert torch.equal(arithmetic.scale_bits(deq, "float16").to(torch.int32).view(torch.float32), deq)
    assert arithmetic.scale_bits(deq, "bfloat16").dtype == torch.float32


def test_a_large_bias_still_fits() -> None:
    x = arithmetic.activation(-1e-3, 1e-3)
    scales = arithmetic.static_scales(torch.full((2, 1), 1e-5), torch.tensor([500.0, 0.0]), x)
    _, quant_bias = arithmetic.static(torch.ones(2, 3, dtype=torch.int8), scales, torch.tensor([500.0, 0.0]), x)
    assert (quant_bias[0].double() * scales[0, 0].double() * x.scale).item() == pytest.approx(500, rel=1e-4)
    assert scales[1, 0].item() == pytest.approx(1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0, 64])
def test_groups_of_columns(size: int, symmetric: bool) -> None:
    w = random(8, 150) + 0.4
    w[3] = 0
    q, scales, offsets = arithmetic.groups(w, size, symmetric)
    assert scales.shape == offsets.shape == (8, 3 if size else 1)
    assert symmetric == (not offsets.any())
    read = arithmetic.ungrouped(q, scales, offsets, size)
    step = scales.repeat_interleave(size or 150, 1)[:, :150]
    assert ((read - w).abs() <= 0.5001 * step).all()


def test_a_histogram_finds_the_range_without_the_stray_value() -> None:
    values = torch.cat((random(200_000), torch.tensor([9.0])))
    counts = arithmetic.histogram(values, -6.0, 9.0)
    assert int(counts.sum()) == len(values)
    assert arithmetic.best_range(counts, -6.0, 9.0, 1) == (-6.0, 9.0)
    low, high = arithmetic.best_range(counts, -6.0, 9.0, 2)
    assert -6.0 < low < -3.5
    assert 3.5 < high < 7.0
    even = torch.ones(arithmetic.BINS, dtype=torch.int64)
    assert arithmetic.best_range(even, -6.0, 9.0, 3) == (-6.0, 9.0)


def list_of(w: torch.Tensor, rows: int = 40) -> list[Any]:
    return [partial(torch.Tensor.clone, part) for part in w.split(rows)]


@pytest.mark.parametrize("sigma_factor", [None, 3.0])
@pytest.mark.parametrize("search", [True, False])
def test_the_share_of_outliers(search: bool, sigma_factor: float | None) -> None:
    w = random(96, 200)
    w[::7] *= random(14, 200, seed=5).square()
    importance = random(200, seed=3).square()
    for fraction in (0.0, 0.011, 0.05):
        q, scale = low_bit(list_of(w), importance, fraction, sigma_factor, search=search, protect=True)
        whole, _ = low_bit([lambda: w], importance, fraction, sigma_factor, search=search, protect=True)
        assert torch.equal(q, whole), "outliers are those of all rows, however they are read"
        outside = ((q < -8) | (q > 7)).sum().item()
        assert outside <= fraction * w.numel()
        assert fraction == 0 or outside > 0
        assert q.dtype == torch.int8
        assert scale.shape == (96, 1)
    q, _ = low_bit(list_of(w), importance, 0.011, sigma_factor, search=search, protect=False)
    assert ((q >= -8) & (q <= 7)).all()


def test_protected_outliers_and_the_search_lower_the_error() -> None:
    w = random(64, 512)
    w[:, 7] *= 12

    def error(fraction: float, search: bool) -> float:
        q, scale = low_bit(list_of(w), None, fraction, None, search=search, protect=True)
        return ((w - q * scale).norm() / w.norm()).item()

    assert error(0.011, True) < 0.6 * error(0.0, True)
    assert error(0.0, True) < error(0.0, False)


def test_reach_bounds_a_pair_at_all_positions() -> None:
    x, turns = random(5, 3, 8), torch.tensor([9.0, 2.0, 0.5, 0.01])
    angles = torch.linspace(0, 1, 2001)[:, None] * turns
    turned = torch.stack([rotate(x, a.cos()[None, None], a.sin()[None, None]) for a in angles]).flatten(0, 1).flatten(1)
    low, high = reach(x, turns)
    torch.testing.assert_close(low, turned.amin(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(high, turned.amax(0), atol=1e-4, rtol=0)


def of(*flags: str, **more: Any) -> Settings:
    return settings(with_preset(None, {**dict.fromkeys(flags, True), **more})[0])


def test_types_by_their_bits() -> None:
    assert of().kind == "W8A8"
    assert of(is_dynamic=True).kind == "W8A8_DYNAMIC"
    assert of(is_fp8=True) == Settings(kind="W8A8_FP8")
    assert of(is_fp8=True).word == "w8a8_fp8"
    assert of(a_bit=16) == Settings(kind="W8A16")
    assert of(a_bit=16, is_lowbit=True, open_outlier=False).group_size == 64
    assert of(a_bit=16, group_size=128).group_size == 128
    assert of(w_bit=4, use_sigma=True).sigma_factor == 3.0
    assert of(do_smooth=True).anti_method == "m1"
    assert of("use_kvcache_quant", w_bit=16, a_bit=16).word == "float"
    assert [of(**PRESETS[name]).kind for name in PRESETS] == ["W8A8", "W8A16", "W8A8_FP8", "W8A8S", "W8A8S", "FLOAT"]
    assert not of(a_bit=16).calibrated
    assert of(a_bit=16, anti_method="m3").calibrated


def test_explicit_flags_win_over_a_preset() -> None:
    flags, chosen = with_preset("qwen_w4a8", {"fraction": 0.5})
    assert flags["fraction"] == 0.5
    assert "fraction" not in chosen
    assert chosen["use_sigma"] is True


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--anti_method m2", "--anti_method m2 is not public"),
        ("--anti_method m5", "--anti_method m5 is not public"),
        ("--anti_method m9", "choose m1, m3, m4 or m6"),
        ("--w_bit 16", "--w_bit 16 --a_bit 8 is not supported"),
        ("--w_bit 4 --a_bit 16", "--w_bit 4 --a_bit 16 is not supported"),
        ("--w_bit 16 --a_bit 16", "needs --use_kvcache_quant or --use_fa_quant"),
        ("--use_kvcache_quant --use_fa_quant True", "exclude each other"),
        ("--group_size 64", "--group_size 64 is for W8A16"),
        ("--a_bit 16 --group_size 100", "choose 0, 64, 128, 256"),
        ("--w_sym False", "--w_sym False is for W8A16"),
        ("--is_dynamic --a_bit 16", "--is_dynamic is for"),
        ("--is_fp8 --w_bit 4", "--is_fp8 is for --w_bit 8 --a_bit 8, not for W8A8S"),
        ("--is_fp8 --is_dynamic", "--is_dynamic and --is_fp8 exclude each other"),
        ("--preset qwen_fp8 --group_size 128", "--group_size 128 is for W8A16"),
        ("--preset qwen_fp8 --calib_texts hello", "W8A8_FP8 needs no calibration"),
        ("--disable_level L9", "choose L0 to L5"),
        ("--fraction 2", "--fraction 2.0 must be a share"),
        ("--preset qwen_w9", "--preset 'qwen_w9' is unknown"),
        ("--disable_names model.layers.9.mlp.down", "no such linear layer"),
        ("--a_bit 16 --calib_texts hello", "needs no calibration"),
        ("--calib_file /nowhere.jsonl", "cannot be read"),
        ("--max_shard_size big", "is not a size"),
        ("--evaluate /nowhere.txt", "cannot be read"),
        ("--device_type tpu", "choose cpu, gpu or npu"),
        ("--model /nowhere", "no such folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    argv: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "made"
    given = ["--model", "qtp/demo/dense", "--save_directory", str(target), *argv.split()]
    assert main(given) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert not target.exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        command(["--model", "qtp/demo/dense", "--save_directory", str(tmp_path)])
    with pytest.raises(ValueError, match="is the model itself"):
        command(["--model", "qtp/demo/dense", "--save_directory", "qtp/demo/dense"])


def test_sizes() -> None:
    assert byte_count("5GB") == 5 * 10**9
    assert byte_count("1.5MiB") == 3 * 2**19


def test_windows_count_each_token_once() -> None:
    for length in (2, 7, 16, 17, 100):
        windows = sliding(length, 16)
        assert sum(counted for _, counted in windows) == length - 1
        assert all(0 < counted < len(span) <= 16 for span, counted in windows)
        assert windows[-1][0].stop == length


def test_files_are_cut_and_indexed(tmp_path: Path) -> None:
    tensors = {f"t{i}": random(3, i + 1, seed=i) for i in range(5)}
    files = WeightFiles(tmp_path, "model", [Planned(name, "F32", tuple(x.shape), "FLOAT") for name, x in tensors.items()], 60)
    files.create()
    for name, x in tensors.items():
        files.put(name, x[1:], 1)
        files.put(name, x[:1])
    files.close()
    assert files.written == files.total
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) == 5
    with Store(tmp_path) as store:
        assert len({entry.file for entry in store.entries.values()}) > 1
        for name, x in tensors.items():
            raw = bytearray(x.numel() * 4)
            store.read_into(name, tuple(range(n) for n in x.shape), memoryview(raw))
            assert torch.equal(torch.frombuffer(raw, dtype=torch.float32).view(x.shape), x)

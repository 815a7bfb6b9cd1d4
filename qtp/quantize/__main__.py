"""From a float checkpoint to a quantized one: `python -m qtp.quantize --model A --save_directory B --preset qwen_w8a8`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from qtp.cli import Parser, boolean, byte_count, run
from qtp.quantize.settings import PRESETS, settings, with_preset

_HELP = {
    "w_bit": "4 (with a_bit 8: W8A8S), 8 or 16 (the KV cache alone)",
    "a_bit": "8 (W8A8) or 16 (W8A16)",
    "act_method": "range of activations: 1 min-max, 2 histogram, 3 auto",
}


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="qtp.quantize", description="Quantize a float checkpoint.", allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    p.add_argument("--model", "--model_path", required=True, metavar="DIR", help="a float checkpoint folder, or a hub id")
    p.add_argument("--save_directory", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    p.add_argument(
        "--preset", default=None, metavar="NAME", help=f"flags at once ({', '.join(PRESETS)}); those given besides win"
    )

    what = p.add_argument_group("what is quantized, in the words of msModelSlim")
    for name, choices in (("w_bit", (4, 8, 16)), ("a_bit", (8, 16)), ("act_method", (1, 2, 3))):
        what.add_argument(f"--{name}", type=int, choices=choices, help=_HELP[name])
    what.add_argument("--anti_method", metavar="m1|m3|m4|m6", help="anti-outlier: SmoothQuant, AWQ, iterative, flexible smooth")
    what.add_argument(
        "--disable_names", nargs="*", metavar="NAME", help="linear layers that stay in float; patterns such as '*.o_proj'"
    )
    what.add_argument("--disable_level", metavar="L0...L5", help="how many more stay in float: highest max|act|/std(act)")
    what.add_argument("--fraction", type=float, help="W8A8S: share of values that keep 8 bits")
    what.add_argument("--sigma_factor", type=float, help="W8A8S with use_sigma: an outlier is beyond so many sigma of its row")
    what.add_argument("--group_size", type=int, help="W8A16: input columns that share a scale, 64, 128, 256; 0: a row")
    for name, text in (
        ("use_sigma", "W8A8S: see sigma_factor"),
        ("is_lowbit", "W8A8S: the scale of least error for each row (the default without co_sparse)"),
        ("co_sparse", "W8A8S: scales by the outliers alone"),
        ("do_smooth", "the same as anti_method m1"),
        ("w_sym", "W8A16: symmetric weights (default True)"),
        ("open_outlier", "W8A8S: protect outliers (default True)"),
        ("use_kvcache_quant", "int8 KV cache, C8"),
        ("use_fa_quant", "int8 attention, FA3 (FAQuant)"),
        ("is_dynamic", "W8A8_DYNAMIC: activations are rounded by token"),
        ("is_fp8", "W8A8_FP8: weights and activations in float8 e4m3, these by token"),
        ("quantize_lm_head", "lm_head too, tied or not: W8A16; in W8A8S beside W8A8S"),
    ):
        what.add_argument(f"--{name}", type=boolean, nargs="?", const=True, metavar="True|False", help=text)
    what.add_argument("--down_proj", choices=("all", "none"), help="default: none in W8A8 and W8A8S, all in the others")

    calibration = p.add_argument_group("calibration (not needed for W8A16, W8A8_DYNAMIC and W8A8_FP8 alone)")
    calibration.add_argument("--calib_file", type=Path, default=None, metavar="JSONL", help="a text in each line")
    calibration.add_argument("--calib_texts", nargs="+", default=None, metavar="TEXT", help="default: texts that come with qtp")
    calibration.add_argument("--calib_length", type=int, default=512, metavar="TOKENS", help="of each text, at most")
    calibration.add_argument("--calib_dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    calibration.add_argument("--device_type", default="cpu", help="cpu, gpu (cuda) or npu")

    output = p.add_argument_group("output")
    output.add_argument("--max_shard_size", type=byte_count, default=5 * 10**9, metavar="BYTES", help="of a weight file: 5GB")
    output.add_argument("--evaluate", type=Path, default=None, metavar="TEXTFILE", help="perplexity on it, before and after")
    output.add_argument("--timeout", type=float, default=300.0, help="seconds for joining and for a collective")
    output.add_argument(
        "--trust_remote_code", nargs="?", const=True, default=None, help="accepted; no remote code is ever executed"
    )
    return p


def command(argv: list[str] | None) -> int:
    given = vars(parser().parse_args(argv))
    flags, chosen = with_preset(given["preset"], given)
    asked = settings(flags)
    own: dict[str, Any] = {key: given[key] for key in _OWN}
    from qtp.quantize.command import quantize  # torch, which takes its time, once the flags are known to be right

    return quantize(asked, {key: flags[key] for key in flags if key not in _NOT_SHOWN}, chosen, **own)


_OWN = (
    *("model", "save_directory", "calib_file", "calib_texts", "calib_length", "calib_dtype", "device_type"),
    *("max_shard_size", "evaluate", "timeout"),
)
_NOT_SHOWN = (*_OWN, "trust_remote_code")


def main(argv: list[str] | None = None) -> int:
    return run(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())

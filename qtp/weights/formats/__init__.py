"""One file a format: which tensors of the checkpoint hold a linear layer, how each is cut, and what a rank makes of them."""

from qtp.weights.formats.dense import DenseFormat
from qtp.weights.formats.format import Format, Linear
from qtp.weights.formats.w8a8 import W8A8Format
from qtp.weights.formats.w8a8_dynamic import W8A8DynamicFormat
from qtp.weights.formats.w8a8_fp8 import W8A8FP8Format
from qtp.weights.formats.w8a8sc import W8A8SCFormat
from qtp.weights.formats.w8a16 import W8A16Format

FORMATS: dict[str, Format] = {
    "FLOAT": DenseFormat(),
    "W8A8": W8A8Format(),
    "W8A8S": W8A8Format(),
    "W8A8SC": W8A8SCFormat(),
    "W8A8_DYNAMIC": W8A8DynamicFormat(),
    "W8A8_FP8": W8A8FP8Format(),
    "W8A16": W8A16Format(),
}

__all__ = ["FORMATS", "Format", "Linear"]

"""One linear layer from float to a quantized type, read, rounded and written by pieces of rows. N outputs, K input columns."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import fsum, sqrt

import torch
from torch import Tensor

from qtp.config import ModelConfig
from qtp.quantize import arithmetic
from qtp.quantize.arithmetic import Activation
from qtp.quantize.layers import Linear
from qtp.quantize.lowbit import low_bit
from qtp.quantize.observe import Seen
from qtp.quantize.raw import read
from qtp.quantize.settings import STATIC, Settings
from qtp.quantize.smooth import Change, rounded_input
from qtp.quantize.write import Planned, WeightFiles
from qtp.weights.dtypes import TORCH_DTYPES
from qtp.weights.store import Store

_PIECE = 1 << 18  # elements of what a thread works on at once, which its cache holds


@dataclass(frozen=True, slots=True)
class Made:
    """sums: of the squares of what a weight lost, of the weight, and likewise of its outputs over the captured rows."""

    sums: tuple[float, ...]

    @property
    def weight_error(self) -> float:
        """Relative, root mean square."""
        return sqrt(self.sums[0] / max(self.sums[1], 1e-30))

    @property
    def output_error(self) -> float | None:
        """Likewise; None where no input was seen."""
        return sqrt(self.sums[2] / self.sums[3]) if self.sums[3] else None


def bias_of(store: Store, linear: Linear) -> str | None:
    """The type of a layer's bias, as it is stored."""
    return store.entries[f"{linear.name}.bias"].dtype if linear.biased else None


def tensors_of(linear: Linear, asked: Settings, kind: str, dtype: str, bias: str | None) -> list[Planned]:
    """What a layer of this type is written as. dtype: of the model."""
    (n, k), name = linear.shape, linear.name
    found: list[tuple[str, str, tuple[int, ...]]] = [("weight", "F8_E4M3" if kind == "W8A8_FP8" else "I8", (n, k))]
    if kind in STATIC:
        found += [("input_scale", "F32", (1,)), ("input_offset", "F32", (1,)), ("quant_bias", "I32", (n,))]
        found += [("deq_scale", "I64" if dtype == "float16" else "F32", (n,))]
    else:
        count = -(-k // asked.group_size) if kind == "W8A16" and asked.group_size else 1
        suffixes = ("weight_scale",) if kind == "W8A8_FP8" else ("weight_scale", "weight_offset")
        found += [(suffix, "F32", (n, count)) for suffix in suffixes]
        if bias is not None:
            found += [("bias", bias, (n,))]
    return [Planned(f"{name}.{suffix}", word, shape, kind) for suffix, word, shape in found]


class Maker:
    """forms: the type of each layer by name; dtype: of the model."""

    def __init__(
        self, asked: Settings, forms: Mapping[str, str], config: ModelConfig, store: Store, files: WeightFiles, dtype: str
    ) -> None:
        self._asked, self._forms, self._config, self._store, self._files, self._dtype = asked, forms, config, store, files, dtype
        # Pieces side by side, each on one thread, instead of threads that wait for one another in every operation.
        self._threads = ThreadPoolExecutor(torch.get_num_threads(), "quantize", initializer=torch.set_num_threads, initargs=(1,))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def make(self, linear: Linear, change: Change, seen: Seen | None, x: Activation | None) -> Made:
        """Writes the layer. seen: its input, changed as `change` says; x: how that is rounded, if that is fixed."""
        name, (n, k), kind = linear.name, linear.shape, self._forms[linear.name]
        own = name if linear.layer is not None or not self._config.tie_word_embeddings else "model.embed_tokens"
        bias = change.bias(read(self._store, f"{name}.bias")) if linear.biased else None
        exact = rounded = None
        if seen is not None:
            exact, rounded = seen.rows, rounded_input(kind, seen) if x is None else x.through(seen.rows)
        if x is not None:
            self._files.put(f"{name}.input_scale", torch.tensor([x.scale]))
            self._files.put(f"{name}.input_offset", torch.tensor([x.offset]))
        elif bias is not None:
            self._put_bias(linear, bias)

        step = max(1, _PIECE // k)
        parts = range(0, n, step)

        def weight(first: int) -> Tensor:
            return change.weight(read(self._store, f"{own}.weight", range(first, min(first + step, n))), first)

        coded = None
        if kind == "W8A8S":
            assert x is not None
            coded = low_bit(
                [partial(weight, first) for first in parts],
                None if seen is None else seen.square,
                self._asked.fraction,
                self._asked.sigma_factor,
                search=self._asked.search,
                protect=self._asked.protect,
                run=self._threads.map,
            )

        def piece(first: int) -> list[float]:
            w = weight(first)
            read_as = self._piece(linear, w, None if bias is None else bias[first : first + len(w)], coded, x, first)
            terms = [w - read_as, w]
            if exact is not None and rounded is not None:
                y = exact @ w.T
                terms += [(rounded @ read_as.T).sub_(y), y]
            return [float(torch.dot(term.flatten(), term.flatten())) for term in terms] + [0.0] * (4 - len(terms))

        sums = list(self._threads.map(piece, parts))
        return Made(tuple(fsum(part[i] for part in sums) for i in range(4)))

    def _piece(
        self,
        linear: Linear,
        w: Tensor,
        bias: Tensor | None,
        coded: tuple[Tensor, Tensor] | None,
        x: Activation | None,
        first: int,
    ) -> Tensor:
        """Writes rows from `first` on, and returns them as they will be read, in float32. coded: all rows by `low_bit`."""
        asked, name, kind = self._asked, linear.name, self._forms[linear.name]
        if kind == "W8A16":
            q, scales, offsets = arithmetic.groups(w, asked.group_size, asked.symmetric)
            self._put_rows(name, first, weight=q, weight_scale=scales, weight_offset=offsets)
            return arithmetic.ungrouped(q, scales, offsets, asked.group_size)
        if kind == "W8A8_FP8":
            q, scales = arithmetic.rows_fp8(w)
            self._put_rows(name, first, weight=q, weight_scale=scales)
            return q.float().mul_(scales)
        if coded is None:
            values, scales = w, arithmetic.rows_symmetric(w)
        else:
            codes, scales = (rows[first : first + len(w)] for rows in coded)
            values = codes * scales  # which larger scales, for a bias, keep within their range
        if x is not None:
            scales = arithmetic.static_scales(scales, bias, x)
        q = (values / scales).round_().to(torch.int8)
        if x is None:
            self._put_rows(name, first, weight=q, weight_scale=scales, weight_offset=torch.zeros_like(scales))
        else:
            deq, quant_bias = arithmetic.static(q, scales, bias, x)
            self._put_rows(name, first, weight=q, deq_scale=arithmetic.scale_bits(deq, self._dtype), quant_bias=quant_bias)
        return q.float().mul_(scales)

    def _put_rows(self, name: str, first: int, **tensors: Tensor) -> None:
        for suffix, tensor in tensors.items():
            self._files.put(f"{name}.{suffix}", tensor, first)

    def _put_bias(self, linear: Linear, bias: Tensor) -> None:
        stored = self._store.entries[f"{linear.name}.bias"].dtype
        self._files.put(f"{linear.name}.bias", bias.to(TORCH_DTYPES[stored]))

"""The grouped expert product: one launch for all experts, with nothing that the host must wait for, so that it fits a CUDA graph.

T tokens, K experts chosen for each, P = T K pairs of a token and an expert; D hidden, F columns of an expert.

For few tokens the weights' way from memory is what takes time: every pair reads its expert's by itself, K products are added in
registers. For many, pairs are sorted by expert and go through the matrix units in tiles. Both add in a fixed order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtp.kernels.interface import Expert
from qtp.kernels.triton import expert_kernels
from qtp.kernels.triton.launch import has_fp8, options
from qtp.weights.quantized import W8A8, W8A8FP8, W8A16, W8A8Dynamic, Weight

FEW = 4  # tokens up to which every pair reads its expert's weights by itself
_PAIRS = 32768  # that go through the tiles at a time, which bounds the memory for what lies between the products
_FLOATS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_TYPES = {**_FLOATS, torch.int8: tl.int8, torch.float8_e4m3fn: tl.float8e4nv}
# What a token's largest |x| becomes where it has a scale of its own.
_LEVELS = {"w8a8_dynamic": 127.0, "w8a8_fp8": 448.0}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of the weight and bytes of each that a program holds at a time."""

    rows: int
    bytes: int
    warps: int


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Pairs and rows of the weight of a tile, and bytes of each pair's input that are multiplied at a time."""

    pairs: int
    rows: int
    bytes: int
    warps: int
    stages: int


_GATE_UP, _DOWN = _Rows(8, 1024, 4), _Rows(4, 2048, 4)
_FLOAT32 = _Tiles(16, 32, 128, 4, 2)
_GROUP = 8  # blocks of pairs whose programs run side by side
# By the pairs that an expert has on average: up to how many a row is for.
_TILES = (
    (12.0, _Tiles(16, 64, 256, 4, 4)),
    (64.0, _Tiles(64, 128, 128, 4, 4)),
    (float("inf"), _Tiles(128, 256, 128, 8, 3)),
)
_MANY_FP8 = _Tiles(128, 128, 128, 8, 4)  # in place of the last: sums are held twice


def takes(experts: Mapping[int, Expert]) -> bool:
    """Whether `GroupedExperts` can be made of them: the gate_up of all experts alike in kind and shape, and the down too; in
    floats, W8A8, or W8A8Dynamic, W8A8FP8 (on a device that has float8) or W8A16 without a bias, the latter with one scale for all
    columns."""
    for weights in ([expert.gate_up for expert in experts.values()], [expert.down for expert in experts.values()]):
        alike = {(_kind(weight), tuple(weight.shape), _data(weight).dtype) for weight in weights if _kind(weight)}
        if len(alike) > 1 or not all(_kind(weight) for weight in weights):
            return False
    return True


def _kind(weight: Weight) -> str | None:
    match weight:
        case Tensor():
            kind = "float" if weight.dtype in _FLOATS else None
        case W8A8():
            kind = "w8a8"
        case W8A8Dynamic(bias=None):
            kind = "w8a8_dynamic"
        case W8A8FP8(bias=None) if has_fp8(weight.weight.device):
            kind = "w8a8_fp8"
        case W8A16(bias=None) if weight.scale.shape[1] == 1:
            kind = "w8a16"
        case _:
            return None
    return kind if _data(weight).stride(1) == 1 or weight.shape[1] < 2 else None


def _data(weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    assert isinstance(weight, W8A8 | W8A8Dynamic | W8A8FP8 | W8A16), weight
    return weight.weight


class _Product:
    """The weights [N, C] of one product of all held experts, where they lie: what `expert_kernels` calls a table."""

    def __init__(self, weights: Sequence[Weight], device: torch.device) -> None:
        self.weights = weights  # the table has but their addresses
        self.kind, self.dtype = _kind(weights[0]), _data(weights[0]).dtype
        self.per_pair = self.kind == "w8a8"  # experts differ in the scale of their input
        self.levels = _LEVELS.get(self.kind or "", 0.0)
        self.quantizes = self.per_pair or self.levels > 0
        rows = [_row(weight) for weight in weights]
        self.table = torch.tensor(rows, dtype=torch.int64, device=device)
        size = self.dtype.itemsize
        aligned = all(address % 16 == 0 and stride * size % 16 == 0 for address, stride, _, _ in rows)
        offset = any(isinstance(weight, W8A16) and bool(weight.offset.any()) for weight in weights)
        self.flags = {"KIND": self.kind, "OFFSET": offset, "ALIGNED": aligned, "WEIGHT": _TYPES[self.dtype]}
        inputs = [(w.input_scale, w.input_offset) for w in weights if isinstance(w, W8A8)]
        self.inputs = torch.tensor(inputs, dtype=torch.float32, device=device) if inputs else None


def _row(weight: Weight) -> tuple[int, int, int, int]:
    data, scale, other = _data(weight), None, None
    match weight:
        case W8A8():
            scale, other = weight.deq_scale, weight.quant_bias
        case W8A8Dynamic() | W8A8FP8():
            scale = weight.weight_scale
        case W8A16():
            scale, other = weight.scale, weight.offset
    for vector, dtype in ((scale, torch.float32), (other, torch.int32 if isinstance(weight, W8A8) else torch.float32)):
        assert vector is None or (vector.dtype == dtype and vector.is_contiguous() and vector.device == data.device), weight
    address, more = (0 if v is None else v.data_ptr() for v in (scale, other))
    return data.data_ptr(), data.stride(0), address, more


class GroupedExperts:
    """`Kernels.experts` without leaves, of experts that `takes` says yes to; their tensors are on `device` and stay where they
    are. Each expert's output is rounded to the dtype of x; times its weight, they are added in float32, to `partial` last.

    W8A8Dynamic and W8A8FP8 take the largest |h| of a token for the down product over the columns that this rank holds, as torch's
    do."""

    def __init__(self, experts: Mapping[int, Expert], device: torch.device | str) -> None:
        assert takes(experts), "weights that `takes` says no to"
        ids, device = sorted(experts), torch.device(device)
        self.held = len(ids)
        if not ids:
            return
        self.gate_up = _Product([experts[e].gate_up for e in ids], device)
        self.down = _Product([experts[e].down for e in ids], device)
        (self.hidden, self.columns), self.limit = experts[ids[0]].down.shape, ids[-1] + 1
        assert tuple(experts[ids[0]].gate_up.shape) == (2 * self.columns, self.hidden), "gate_up [2 F, D], down [D, F]"
        self.ids = torch.tensor(ids, dtype=torch.int64, device=device)
        places = {e: place for place, e in enumerate(ids)}
        self.slots = torch.tensor([places.get(e, -1) for e in range(self.limit)], dtype=torch.int32, device=device)

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor, partial: Tensor) -> Tensor:
        tokens, top_k = chosen.shape
        if not self.held or not top_k:
            return partial
        assert x.shape == partial.shape == (tokens, self.hidden), (x.shape, partial.shape, self.hidden)
        assert x.stride(1) == partial.stride(1) == 1 or self.hidden == 1, "rows of x and of partial are contiguous"
        assert all(p.quantizes or p.kind == "w8a16" or p.dtype == x.dtype for p in (self.gate_up, self.down)), x.dtype
        weights, chosen = weights.contiguous(), chosen.contiguous()
        most = max(1, _PAIRS // top_k)
        for start in range(0, tokens, most):
            part = slice(start, start + most)
            add = self._by_rows if tokens <= FEW else self._by_tiles
            add(x[part], weights[part], chosen[part], partial[part])
        return partial

    def _by_rows(self, x: Tensor, weights: Tensor, chosen: Tensor, partial: Tensor) -> None:
        tokens, top_k = chosen.shape
        h, pairs = x.new_empty(tokens * top_k, self.columns), (chosen, self.slots)
        rows, x_scales, share = self._input(self.gate_up, x, top_k, chosen, top_k)
        block_n, block_c = _block(_GATE_UP, self.gate_up, self.hidden)
        expert_kernels.gate_up_rows[(tokens * top_k, triton.cdiv(2 * self.columns, block_n))](
            rows, x_scales, h, *pairs, self.gate_up.table, self.limit, rows.stride(0), self.columns, self.hidden,
            SHARE=share, **self.gate_up.flags, BLOCK_N=block_n, BLOCK_C=block_c, **options(x, _GATE_UP.warps, 1),
        )  # fmt: skip
        rows, h_scales, _ = self._input(self.down, h, 1, chosen, top_k)
        block_n, block_c = _block(_DOWN, self.down, self.columns)
        expert_kernels.down_rows[(tokens, triton.cdiv(self.hidden, block_n))](
            rows, h_scales, weights, *pairs, self.down.table, partial, self.limit, partial.stride(0), self.hidden, self.columns,
            K=top_k, **self.down.flags, DTYPE=_TYPES[x.dtype], BLOCK_N=block_n, BLOCK_C=block_c, **options(x, _DOWN.warps, 1),
        )  # fmt: skip

    def _by_tiles(self, x: Tensor, weights: Tensor, chosen: Tensor, partial: Tensor) -> None:
        tokens, top_k = chosen.shape
        pairs = tokens * top_k
        most, tile = next((most, tile) for most, tile in _TILES if pairs / self.limit <= most)
        if x.dtype == torch.float32:
            most, tile = _TILES[-1][0], _FLOAT32
        blocks = pairs // tile.pairs + self.held
        listed = torch.empty(pairs, dtype=torch.int32, device=x.device)
        cut = torch.empty(blocks, 3, dtype=torch.int32, device=x.device)
        # few sizes, for each is compiled when it is first met: those of the most pairs that go to such tiles
        block_p = 1024 if tile is _TILES[0][1] else 4096
        block_b = triton.next_power_of_2(int(min(most * self.limit, max(_PAIRS, top_k))) // tile.pairs + self.held)
        expert_kernels.sort_pairs[(self.held,)](
            chosen, self.ids, listed, cut, pairs, blocks, self.held, BLOCK_M=tile.pairs, BLOCK_P=block_p, BLOCK_B=block_b,
            **options(x, 4 if block_p < 2048 else 8, 1),
        )  # fmt: skip
        h, y = x.new_empty(pairs, self.columns), x.new_empty(pairs, self.hidden)
        for product, inputs, share, out in ((self.gate_up, x, top_k, h), (self.down, h, 1, y)):
            gated = product is self.gate_up
            rows, scales, share = self._input(product, inputs, share, chosen, top_k)
            own = _MANY_FP8 if product.kind == "w8a8_fp8" and tile.rows > _MANY_FP8.rows else tile
            block_c = own.bytes // rows.dtype.itemsize
            flags = {"SHARE": share, **product.flags, "GATED": gated, "GROUP": _GROUP}
            expert_kernels.tiles[(blocks * triton.cdiv(out.shape[1], own.rows // 2 if gated else own.rows),)](
                rows, scales, out, listed, cut, product.table, blocks, rows.stride(0), out.shape[1], rows.shape[1], **flags,
                BLOCK_M=own.pairs, BLOCK_N=own.rows, BLOCK_C=block_c, **options(x, own.warps, own.stages),
            )  # fmt: skip
        block_d = min(1024, triton.next_power_of_2(self.hidden))
        expert_kernels.combine[(tokens, triton.cdiv(self.hidden, block_d))](
            y, weights, chosen, self.slots, partial, self.limit, partial.stride(0), self.hidden, K=top_k, BLOCK_D=block_d,
            **options(x, 4, 1),
        )  # fmt: skip

    def _input(self, product: _Product, x: Tensor, share: int, chosen: Tensor, top_k: int) -> tuple[Tensor, Tensor | None, int]:
        """What the product multiplies, the scales of its rows, and how many pairs share a row; share: how many share one of x."""
        if not product.quantizes:
            return x, None, share
        by_pair = product.per_pair or share == 1
        rows, columns = chosen.numel() if by_pair else len(x), x.shape[1]
        out = torch.empty(rows, columns, dtype=product.dtype, device=x.device)
        scales = None if product.per_pair else torch.empty(rows, dtype=torch.float32, device=x.device)
        flags: dict[str, Any] = {"PAIRS": by_pair, "SHARE": share if by_pair else 1}
        expert_kernels.quantize[(rows,)](
            x, out, scales, product.inputs, chosen, self.slots, self.limit, x.stride(0), columns, **flags,
            LEVELS=product.levels, BLOCK_C=min(4096, triton.next_power_of_2(columns)), **options(x, 4, 1),
        )  # fmt: skip
        return out, scales, 1 if by_pair else share


def _block(rows: _Rows, product: _Product, columns: int) -> tuple[int, int]:
    return rows.rows, min(rows.bytes // product.dtype.itemsize, triton.next_power_of_2(columns))

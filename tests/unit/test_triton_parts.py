"""Packed weights under Triton's kernels: parts of several types over one input, and those that become one weight."""

from dataclasses import replace

import torch
from test_triton_quantized import TORCH, Case, assert_close, cases, linear

from qtp.kernels import triton_quantized
from qtp.kernels.interface import Norm
from qtp.kernels.triton.norm import rms_norm
from qtp.weights.quantized import Float, Packed


def test_parts_and_norms() -> None:
    """Each part with its own norm: float parts keep the original one."""
    for case in cases(60, 3):
        tokens, _, columns = case.shape()
        floats = Float(case.normal(9, columns).to(case.dtype), case.normal(9).to(case.dtype))
        parts = (case.any(13, columns), floats, case.any(21, columns))
        weights, biases = case.normal(2, columns).to(case.dtype), case.normal(columns).to(case.dtype)
        norm = Norm(weights[0], 1e-6, anti=Norm(weights[1], 1e-6, biases))
        x = case.x(tokens, columns).contiguous()
        got = linear(Packed(parts), norm=norm)(x)
        normed = rms_norm(x, norm.anti)
        expected = [TORCH.linear(p.weight, p.bias, norm=norm)(x) if isinstance(p, Float) else linear(p)(normed) for p in parts]
        assert torch.equal(got, torch.cat(expected, dim=1))
        logits = triton_quantized.QuantizedHead(TORCH, Packed(parts)).logits(x)
        of_floats = x.cpu().double() @ floats.weight.cpu().double().T + floats.bias.cpu().double()
        assert_close(logits[:, 13:22], of_floats, x.cpu().double().abs() @ floats.weight.cpu().double().abs().T, torch.float32)
        assert torch.equal(logits[:, :13], triton_quantized.wide(TORCH, parts[0])(x))


def test_parts_that_quantize_the_input_alike_are_one() -> None:
    case = Case(63)
    first, other = case.w8a8(6, 40), case.w8a8(10, 40)
    alike = replace(other, input_scale=first.input_scale, input_offset=first.input_offset)
    shifted = replace(alike, input_offset=first.input_offset + 1)
    scaled = replace(alike, input_scale=2 * first.input_scale)
    floats = Float(case.normal(4, 40).to(case.dtype), None)
    for parts, rows in (
        ((first, alike), (16,)),
        ((first, alike, shifted, first), (16, 10, 6)),
        ((first, scaled), (6, 10)),
        ((first, floats, alike, alike), (6, 4, 20)),
        ((first, case.dynamic(6, 40), case.dynamic(6, 40)), (6, 6, 6)),
    ):
        whole = triton_quantized.whole(Packed(parts))
        assert tuple(part.shape[0] for part in (whole.parts if isinstance(whole, Packed) else (whole,))) == rows
        x = case.x(3, 40)
        expected = [TORCH.linear(p.weight)(x) if isinstance(p, Float) else linear(p)(x) for p in parts]
        assert torch.equal(linear(Packed(parts))(x), torch.cat(expected, dim=1))
    assert triton_quantized.whole(first) is first
    assert isinstance(triton_quantized.whole(Packed((floats,))), Packed)

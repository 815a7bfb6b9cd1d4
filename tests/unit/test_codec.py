"""The codec of W8A8SC: every matrix comes back, sizes, and streams that are not whole are refused.

`read_plainly` is docs/w8a8sc.md word by word, one value at a time; whatever `check` accepts, it and `decompress` must agree on.
"""

import random
import re
import struct
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtp.kernels.extension import native
from qtp.weights import codec

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import fuzz_codec  # noqa: E402

Stream = tuple[Tensor, Tensor, Tensor]


def matrix(n: int, k: int, share: float, seed: int = 0) -> Tensor:
    """As W8A8S has it: -8 ... 7, and a share of anything."""
    return fuzz_codec.matrix(random.Random(seed), n, k, share)


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 70),
    k=st.one_of(st.integers(0, 400), st.sampled_from([127, 128, 129, 191, 192, 193, 255, 256, 257])),
    share=st.sampled_from([0.0, 0.003, 0.011, 0.05, 0.15, 0.17, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_round_trip(n: int, k: int, share: float, seed: int) -> None:
    weight = matrix(n, k, share, seed)
    stream = codec.compress(weight)
    codec.check(*stream, (n, k))
    assert torch.equal(codec.decompress(*stream), weight)
    assert torch.equal(fuzz_codec.read_plainly(*stream), weight)
    assert stream[0].numel() <= n * k + n + 64 * (-(-n // 16) + 1)
    assert [part.dtype for part in stream] == [torch.int8, torch.int8, torch.int64]


@pytest.mark.parametrize("value", range(-128, 128))
def test_every_value(value: int) -> None:
    weight = torch.full((17, 131), value, dtype=torch.int8)
    assert torch.equal(codec.decompress(*codec.compress(weight)), weight)
    weight = torch.zeros(17, 131, dtype=torch.int8)
    weight[::3, 7::30] = value
    stream = codec.compress(weight)
    assert torch.equal(codec.decompress(*stream), weight)
    assert stream[0].numel() < 17 * 131 * 0.8


@pytest.mark.parametrize(("n", "k"), [(16, 65536), (17, 65537), (3, 140_001)])
def test_wide_matrices(n: int, k: int) -> None:
    """Columns of 2 bytes and of 4, the last columns being outliers."""
    weight = matrix(n, k, 0.011)
    weight[:, -3:] = torch.tensor([127, -128, 8], dtype=torch.int8)
    stream = codec.compress(weight)
    assert torch.equal(codec.decompress(*stream), weight)
    assert stream[0].numel() < 0.57 * n * k


def test_size_of_sparse_weights() -> None:
    """All three tensors, of 1.1 % outliers. 112 columns are a rank's of 896."""
    for n, k, most in ((896, 4864, 0.533), (4864, 896, 0.537), (896, 448, 0.543), (896, 112, 0.578)):
        stream = codec.compress(matrix(n, k, 0.011))
        assert sum(part.numel() * part.element_size() for part in stream) <= most * n * k, k


def test_a_weight_whose_rows_lie_apart() -> None:
    weight = matrix(40, 300, 0.05)[3:37, 5:290]
    assert torch.equal(codec.decompress(*codec.compress(weight)), weight)
    weight = matrix(40, 300, 0.05).T
    assert torch.equal(codec.decompress(*codec.compress(weight)), weight)


def test_only_int8_is_compressed() -> None:
    with pytest.raises(ValueError, match=r"torch.int16 \(2, 3\) cannot be compressed"):
        codec.compress(torch.zeros(2, 3, dtype=torch.int16))


def test_rows_are_cut_on_blocks() -> None:
    weight = matrix(83, 201, 0.02)
    weight[20:30] = 100  # a wide block
    stream = codec.compress(weight)
    for start, stop in ((0, 83), (0, 16), (16, 32), (32, 83), (80, 83), (48, 48), (83, 83)):
        part = codec.cut(*stream, start, stop)
        codec.check(*part, (stop - start, 201))
        assert all(map(torch.equal, part, codec.compress(weight[start:stop])))
    for start, stop in ((8, 16), (0, 81), (32, 16), (0, 99), (-16, 16)):
        with pytest.raises(ValueError, match="cannot be cut out"):
            codec.cut(*stream, start, stop)


def example() -> Stream:
    """40 rows of 131 columns in three blocks, the second wide."""
    weight = matrix(40, 131, 0.03)
    weight[16:32] = 99
    return codec.compress(weight)


def with_entry(index: Tensor, place: int, change: int) -> Tensor:
    entries = list(struct.unpack(f"<{len(index) // 8}q", index.numpy().tobytes()))
    entries[place] += change
    return torch.frombuffer(bytearray(struct.pack(f"<{len(entries)}q", *entries)), dtype=torch.int8)


def with_byte(data: Tensor, place: int, value: int) -> Tensor:
    changed = data.clone()
    changed[place] = value - 256 if value > 127 else value
    return changed


def with_info(info: Tensor, place: int, value: int) -> Tensor:
    changed = info.clone()
    changed[place] = value
    return changed


NARROW, COLUMNS = 16 * 66, 16 * 66 + 16 * 2  # where the counts of the first block begin, and the columns
REFUSED = [
    ("a stream of floats", lambda d, i, f: (d.float(), i, f), r"data is torch.float32 \(\d+,\), not torch.int8"),
    ("a matrix", lambda d, i, f: (d[None], i, f), "data is torch.int8"),
    ("an index of bytes that have no sign", lambda d, i, f: (d, i.view(torch.uint8), f), "index is torch.uint8"),
    ("an info of int32", lambda d, i, f: (d, i, f.int()), "info is torch.int32"),
    ("an info of six", lambda d, i, f: (d, i, torch.cat((f, f[:1]))), "info holds 6 numbers, not 5"),
    ("another codec", lambda d, i, f: (d, i, with_info(f, 0, 1)), "info begins with 0x1, not 0x"),
    ("negative rows", lambda d, i, f: (d, i, with_info(f, 1, -1)), "info says -1 x 131"),
    ("too many columns", lambda d, i, f: (d, i, with_info(f, 2, 1 << 31)), "info says 40 x 2147483648"),
    ("data cut short", lambda d, i, f: (d[:-1], i, f), r"data holds \d+ bytes, not the \d+ that info says"),
    ("more data", lambda d, i, f: (torch.cat((d, d[:1])), i, f), r"data holds \d+ bytes, not the \d+ that info says"),
    ("an index cut short", lambda d, i, f: (d, i[:-8], f), "index holds 24 bytes, not the 32 of 40 rows"),
    ("a longer index", lambda d, i, f: (d, torch.cat((i, i[:1])), f), "index holds 33 bytes, not the 32 of 40 rows"),
    ("a changed byte", lambda d, i, f: (with_byte(d, 5, int(d[5]) ^ 1), i, f), "the checksum does not match"),
    ("a changed column count", lambda d, i, f: (d, i, with_info(f, 2, 132)), "the checksum does not match"),
    ("a changed index", lambda d, i, f: (d, with_entry(i, 1, 64), f), "the checksum does not match"),
]
REFUSED_SEALED = [
    ("data that end in garbage", lambda d, i, f: (with_byte(d, -1, 1), i, f), "data does not end with 64 zeros"),
    ("no end", lambda d, i, f: (d[:9], i, with_info(f, 3, 9)), "data does not end with 64 zeros"),
    ("an odd offset", lambda d, i, f: (d, with_entry(i, 1, 2), f), "index holds an offset that no block can have"),
    ("a wide end", lambda d, i, f: (d, with_entry(i, 3, 1), f), "index holds an offset that no block can have"),
    ("a late begin", lambda d, i, f: (d, with_entry(i, 0, 64), f), "index says that blocks reach from 64 to"),
    ("an early end", lambda d, i, f: (d, with_entry(i, 3, -64), f), "index says that blocks reach from 0 to"),
    ("a far offset", lambda d, i, f: (d, with_entry(i, 1, 1 << 40), f), "index holds an offset outside of data"),
    ("a negative offset", lambda d, i, f: (d, with_entry(i, 1, -(1 << 62)), f), "index holds an offset outside of data"),
    ("a short wide block", lambda d, i, f: (d, with_entry(i, 2, -64), f), "block 1 has another size than its rows"),
    ("a narrow block said to be wide", lambda d, i, f: (d, with_entry(i, 0, 1), f), "block 0 has another size than its rows"),
    ("other rows", lambda d, i, f: (d, i, with_info(f, 1, 39)), "block 2 has another size|bytes between blocks|go with its code"),
    ("a count that lies", lambda d, i, f: (with_byte(d, NARROW, 99), i, f), "block 0 has another size than its outliers"),
    ("a count that is huge", lambda d, i, f: (with_byte(d, NARROW + 1, 255), i, f), "block 0 has another size than its outliers"),
    ("a column that is not there", lambda d, i, f: (with_byte(d, COLUMNS, 131), i, f), "an outlier is in column 131 of 131"),
    ("a far column", lambda d, i, f: (with_byte(d, COLUMNS + 1, 255), i, f), r"an outlier is in column 65\d\d\d of 131"),
    ("garbage between blocks", lambda d, i, f: (with_byte(d, first_end(d) - 1, 1), i, f), "bytes between blocks are not zero"),
    (
        "a code of no column",
        lambda d, i, f: (with_byte(d, 65, int(d[65]) | 16), i, f),
        "the code behind the last column of an odd",
    ),
]


def first_end(data: Tensor) -> int:
    """Where the second block of `example` begins: behind what the counts of the first say."""
    counts = struct.unpack("<16H", data[NARROW : NARROW + 32].numpy().tobytes())
    used = COLUMNS + 3 * sum(counts)
    assert used % 64, "the example leaves a gap"
    return -(-used // 64) * 64


@pytest.mark.parametrize(("change", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(change, words) -> None:
    _refuse(change(*example()), words)


@pytest.mark.parametrize(("change", "words"), [r[1:] for r in REFUSED_SEALED], ids=[r[0] for r in REFUSED_SEALED])
def test_refused_for_what_it_says_though_the_checksum_is_right(change, words) -> None:
    data, index, info = change(*example())
    _refuse((data, index, codec.sealed(data, index, info)), words)


def _refuse(stream: Stream, words: str) -> None:
    for ask in (codec.decompress, lambda *s: codec.check(*s, (40, 131)), lambda *s: codec.check(*s, (39, 131))):
        with pytest.raises(ValueError, match=f"^W8A8SC: .*({words}|but the weight is)") as told:
            ask(*stream)
        assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=words):
        codec.decompress(*stream)


def test_another_shape_is_refused() -> None:
    for shape in ((39, 131), (40, 132), (131, 40)):
        with pytest.raises(ValueError, match=re.escape(f"info says 40 x 131, but the weight is {shape}")):
            codec.check(*example(), shape)


def changed_outlier(data: Tensor, change: int) -> Tensor:
    """The first difference of the first block raised, its sign kept."""
    counts = struct.unpack("<16H", data[NARROW : NARROW + 32].numpy().tobytes())
    place = COLUMNS + 2 * sum(counts)
    return with_byte(data, place, (int(data[place]) + change) % 256)


def test_outliers_go_with_their_codes() -> None:
    """A difference of 0, of the wrong sign, or to beyond int8 is none."""
    weight = torch.zeros(16, 131, dtype=torch.int8)
    weight[3, 7], weight[4, 8] = 20, -20
    data, index, info = codec.compress(weight)
    differences = COLUMNS + 4
    assert data[differences : differences + 2].tolist() == [13, -12]
    for place, value in ((0, 0), (0, -1), (0, 121), (1, 0), (1, 1), (1, -121), (1, -128)):
        changed = with_byte(data, differences + place, value % 256)
        _refuse((changed, index, codec.sealed(changed, index, info)), "an outlier does not go with its code")
    swapped = data.clone()
    swapped[NARROW + 6], swapped[NARROW + 8] = 2, 0
    swapped[COLUMNS], swapped[COLUMNS + 2] = 8, 7
    _refuse((swapped, index, codec.sealed(swapped, index, info)), "not in the order of their columns")


def test_a_narrow_block_is_not_larger_than_a_wide_one() -> None:
    """16 x 4 values: 32 bytes of codes and 32 of counts are as large as a wide block; one outlier more is too large."""
    weight = torch.zeros(16, 4, dtype=torch.int8)
    data, index, info = codec.compress(weight)
    assert len(data) == 128
    weight[0, 0] = 100
    assert torch.equal(codec.decompress(*codec.compress(weight)), weight)
    large = torch.zeros(192, dtype=torch.int8)
    large[:64], large[32], large[66] = data[:64], 1, 92
    large[0] |= 15
    forged = with_info(info, 3, 192)
    moved = with_entry(index, 1, 64)
    _refuse_shape((large, moved, codec.sealed(large, moved, forged)), "block 0 is narrow and larger than if it were wide")


def _refuse_shape(stream: Stream, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        codec.decompress(*stream)


def test_the_example_of_the_document() -> None:
    """docs/w8a8sc.md shows a matrix and its bytes."""
    text = (ROOT / "docs" / "w8a8sc.md").read_text(encoding="utf-8")
    shown = [bytes.fromhex(x) for x in re.findall(r"^    data\[.*?\] +([0-9a-f ]+?)(?:  .*)?$", text, re.MULTILINE)]
    weight = torch.zeros(2, 20, dtype=torch.int8)
    weight[0, :7] = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    weight[1, :7] = torch.tensor([-8, 100, 0, -1, 0, -128, 7])
    weight[1, 19] = -5
    data, index, info = codec.compress(weight)
    assert b"".join(shown) == data.numpy().tobytes()
    (told,) = re.findall(r"^    info +(.+)$", text, re.MULTILINE)
    assert [int(x, 0) for x in told.split(",")] == info.tolist()
    (told,) = re.findall(r"^    index +([0-9a-f ]+)$", text, re.MULTILINE)
    assert bytes.fromhex(told) == index.numpy().tobytes()
    assert info[4] == zlib.crc32(b"".join(part.numpy().tobytes() for part in (info[:4], index, data)))


def test_native_code_refuses_what_leads_out_of_the_stream() -> None:
    """Without `check` before."""
    for name, change, _ in REFUSED_SEALED:
        data, index, info = (part.contiguous() for part in change(*example()))
        n, k = int(info[1]), int(info[2])
        place = (data.data_ptr(), data.numel(), index.data_ptr(), index.numel())
        if name in ("data that end in garbage", "garbage between blocks", "a code of no column", "other rows"):
            continue  # what does not lead anywhere
        with pytest.raises(ValueError, match="W8A8SC: "):
            native.Int8Linear(3, n, k, *place, 1.0, 0.0, *(0,) * 9, 0.0)


def test_fuzz() -> None:
    """A small share of what scripts/fuzz_codec.py does."""
    found: list[str] = []
    fuzz_codec.fuzz(1500, 7, found)
    assert not found


def test_joined_streams_are_those_of_the_whole() -> None:
    """Bit for bit, where rows allow it; what stands behind other rows stays apart."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randint(-12, 12, (71, 200), generator=generator, dtype=torch.int8)
    weight[20:40] = torch.randint(-128, 128, (20, 200), generator=generator, dtype=torch.int8)
    for cuts, expected in (
        ((0, 71), [(0, 71)]),
        ((0, 16, 48, 71), [(0, 71)]),
        ((0, 0, 32, 32, 71), [(0, 71)]),
        ((0, 7, 39, 71), [(0, 7), (7, 71)]),
        ((0, 32, 50, 71), [(0, 50), (50, 71)]),
    ):
        got = codec.joined([codec.compress(weight[a:b]) for a, b in pairwise(cuts)])
        whole = [codec.compress(weight[a:b]) for a, b in expected]
        assert len(got) == len(whole)
        assert all(torch.equal(*parts) for pair in zip(got, whole, strict=True) for parts in zip(*pair, strict=True))

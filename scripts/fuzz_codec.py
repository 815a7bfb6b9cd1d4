"""Mutated streams of W8A8SC to its readers: `python scripts/fuzz_codec.py [--streams 100000] [--seed 1] [--seconds 1800]`.

A stream is mutated with its checksum left as it was, or made right again so that what lies behind the checksum is reached. Either
it is refused with a ValueError in one line; or it is one that a reader written word by word from docs/w8a8sc.md (`read_plainly`)
reads as the same matrix, whose native product is right. Exit code 1 on any finding.
"""

import argparse
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from qtp.kernels.native_quantized import Handle
from qtp.weights.codec import VERSION, check, compress, decompress, sealed
from qtp.weights.quantized import W8A8SC

Stream = tuple[Tensor, Tensor, Tensor]
INTEGER = 2  # what comes out of a Handle
SHARES = (0.0, 0.005, 0.011, 0.05, 0.14, 0.2, 1.0)
NUMBERS = (0, 1, 2, 15, 16, 63, 64, 65, 127, 128, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -1, -64, -(2**63))


def matrix(rng: random.Random, n: int, k: int, share: float) -> Tensor:
    """-8 ... 7, and a share of any int8."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    weight = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    picked = torch.rand(n, k, generator=generator) < share
    weight[picked] = torch.randint(-128, 128, (int(picked.sum()),), generator=generator, dtype=torch.int8)
    return weight


def read_plainly(data: Tensor, index: Tensor, info: Tensor) -> Tensor:
    """The matrix of a stream that is right; one value at a time, by docs/w8a8sc.md."""
    stream, entries = data.numpy().tobytes(), index.numpy().tobytes()
    _, n, k, _, _ = info.tolist()
    item, half_row, weight = 2 if k <= 65536 else 4, (k + 1) // 2, [[0] * k for _ in range(n)]

    def code(row: int, column: int) -> int:
        group = column // 128
        half = 64 if k - 128 * group >= 128 else (k - 128 * group + 1) // 2
        within = column - 128 * group
        byte = stream[row + 64 * group + within % half]
        return byte >> 4 if within >= half else byte & 15

    for first in range(0, n, 16):
        rows = min(16, n - first)
        (entry,) = struct.unpack_from("<q", entries, first // 16 * 8)
        at, wide = entry // 64 * 64, entry % 2
        for row in range(rows):
            for column in range(k):
                value = code(at + row * half_row, column)
                low = code(at + (rows + row) * half_row, column) if wide else 0
                weight[first + row][column] = 16 * value + low - 128 if wide else value - 8
        if wide:
            continue
        at += rows * half_row
        counts = [int.from_bytes(stream[at + i * item : at + i * item + item], "little") for i in range(rows)]
        columns_at = at + rows * item
        differences = struct.unpack_from(f"<{sum(counts)}b", stream, columns_at + sum(counts) * item)
        i = 0
        for row, count in enumerate(counts):
            for _ in range(count):
                column = int.from_bytes(stream[columns_at + i * item : columns_at + i * item + item], "little")
                weight[first + row][column] += differences[i]
                i += 1
    return torch.tensor(weight, dtype=torch.int8).view(n, k)


def valid(rng: random.Random) -> tuple[Tensor, Stream]:
    n = rng.choice((0, 1, 2, 15, 16, 17, 33))
    k = rng.choice((0, 1, 2, 7, 64, 65, 127, 128, 129, rng.randrange(180)))
    weight = matrix(rng, n, k, rng.choice(SHARES))
    if n > 16 and rng.random() < 0.3:
        weight[:16] = 77
    return weight, compress(weight)


def flips(rng: random.Random, stream: bytearray) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if stream:
            stream[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
    return stream


def put(rng: random.Random, stream: bytearray) -> bytearray:
    """A number of note, of 1 to 8 bytes, somewhere."""
    size, at = rng.choice((1, 2, 4, 8)), rng.randrange(len(stream) + 1)
    at = at // size * size if rng.random() < 0.7 else at
    stream[at : at + size] = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
    return stream


def cut_short(rng: random.Random, stream: bytearray) -> bytearray:
    return stream[: rng.choice((rng.randrange(len(stream) + 1), len(stream) // 64 * 64 - 64 * rng.randrange(3), 0))]


def longer(rng: random.Random, stream: bytearray) -> bytearray:
    return stream + rng.choice((bytes(rng.choice((1, 8, 64))), rng.randbytes(rng.choice((1, 8, 64)))))


def moved(rng: random.Random, stream: bytearray) -> bytearray:
    """A piece laid over another place."""
    at, to, size = rng.randrange(len(stream) + 1), rng.randrange(len(stream) + 1), rng.choice((1, 2, 8, 64))
    piece = stream[at : at + size]
    stream[to : to + len(piece)] = piece
    return stream


def shifted(rng: random.Random, stream: bytearray) -> bytearray:
    """Some 64 bytes taken out, or put in."""
    at = rng.randrange(len(stream) + 1) // 64 * 64
    return stream[:at] + stream[at + 64 :] if rng.random() < 0.5 else stream[:at] + bytes(64) + stream[at:]


def unchanged(_: random.Random, stream: bytearray) -> bytearray:
    return stream


WAYS: tuple[Callable[[random.Random, bytearray], bytearray], ...] = (flips, put, cut_short, longer, moved, shifted, unchanged)


def mutated(rng: random.Random, stream: Stream) -> tuple[str, Stream]:
    """What was done, and the stream. Its parts are mutated as bytes, info as five numbers as well."""
    data, index = (bytearray(part.numpy().tobytes()) for part in stream[:2])
    numbers, told = list(stream[2].tolist()), []
    for _ in range(rng.choice((1, 1, 1, 2))):
        way, part = rng.choice(WAYS), rng.choice(("data", "data", "index", "index", "info"))
        told.append(f"{way.__name__} {part}")
        if part == "data":
            data = way(rng, data)
        elif part == "index":
            index = way(rng, index)
        else:
            place = rng.randrange(4)
            numbers[place] = rng.choice((numbers[place] + rng.choice((-64, -16, -1, 1, 16, 64)), rng.choice(NUMBERS)))
    if rng.random() < 0.5:
        numbers[0], numbers[3] = VERSION, len(data)
    parts = [torch.frombuffer(x, dtype=torch.int8) if x else torch.zeros(0, dtype=torch.int8) for x in (data, index)]
    changed = torch.tensor([max(-(2**63), min(x, 2**63 - 1)) for x in numbers], dtype=torch.int64)
    if rng.random() < 0.9:
        told.append("sealed")
        changed = sealed(*parts, changed)
    return ", ".join(told), (parts[0], parts[1], changed)


def product(stream: Stream, weight: Tensor) -> bool | None:
    """Whether the native product is right; None: it was refused."""
    data, index, _ = stream
    n, k = weight.shape
    x = torch.randint(-128, 128, (3, k), generator=torch.Generator().manual_seed(1)).float()
    out = torch.full((3, n), 12345, dtype=torch.int32)
    try:
        handle = Handle(W8A8SC(data, index, torch.tensor([0, n, k]), 1.0, 0.0, torch.zeros(n, dtype=torch.int32), torch.ones(n)))
    except ValueError:
        return None
    handle.run(x, out, INTEGER)
    return torch.equal(out, (x.long() @ weight.long().T).int())


def unchecked(stream: Stream) -> None:
    """To the native code alone, which must refuse it or stay within it: whatever it computes then."""
    n, k = int(stream[2][1]), int(stream[2][2])
    if 0 <= n < 1000 and 0 <= k < 1000:
        product(stream, torch.zeros(n, k, dtype=torch.int8))


def try_one(rng: random.Random, found: list[str]) -> str:
    weight, stream = valid(rng)
    way, changed = mutated(rng, stream)
    same = all(map(torch.equal, stream, changed))
    try:
        unchecked(changed)
        got = decompress(*changed)
        check(*changed, (int(changed[2][1]), int(changed[2][2])))
    except ValueError as error:
        if same or not str(error).startswith("W8A8SC: ") or "\n" in str(error) or len(str(error)) > 200:
            found.append(f"{way}, {tuple(weight.shape)}: refused wrongly or in unclear words: {error}")
        return "refused"
    except BaseException as error:
        found.append(f"{way}, {tuple(weight.shape)}: {type(error).__name__}: {error}")
        return "CRASH"
    if torch.equal(got, weight) and same:
        outcome = "unchanged"
    elif "sealed" not in way:
        found.append(f"{way}, {tuple(weight.shape)}: accepted though the checksum cannot be right")
        return "WRONG"
    else:
        outcome = "another matrix, sealed"
    if not torch.equal(got, read_plainly(*changed)):
        found.append(f"{way}, {tuple(weight.shape)}: not what a plain reader reads")
    if product(changed, got) is not True:
        found.append(f"{way}, {tuple(weight.shape)}: the native product is not right")
    return outcome


def fuzz(count: int, seed: int, found: list[str], seconds: float = 1e9) -> None:
    rng, outcomes, end, slowest = random.Random(seed), Counter[str](), time.monotonic() + seconds, 0.0
    for _ in range(count):
        start = time.monotonic()
        if start > end:
            break
        outcomes[try_one(rng, found)] += 1
        slowest = max(slowest, time.monotonic() - start)
    print(f"{sum(outcomes.values())} streams, the slowest {slowest * 1e3:.0f} ms")
    for outcome, times in sorted(outcomes.items()):
        print(f"  {outcome}: {times}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1800.0, help="stop after these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: list[str] = []
    fuzz(args.streams, args.seed, found, args.seconds)
    for line in found[:20]:
        print(f"FOUND {line}")
    print(f"{len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

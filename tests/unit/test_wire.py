"""The codec: every message comes back equal, and whatever else arrives is a ValueError."""

import importlib.util
import math
import os
import random
import socket
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from types import ModuleType
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtp.wire.channel import SocketLeader
from qtp.wire.codec import MAX_CHARACTERS, MAX_ITEMS, MAX_NUMBER, VERSION, decode, encode
from qtp.wire.messages import (
    Chunk,
    Failure,
    Hello,
    Message,
    NewSequence,
    Ping,
    Pong,
    Ready,
    Sample,
    SamplingSpec,
    StepPlan,
    StepResult,
    Stop,
    TokenLogprobs,
    Welcome,
)

ROOT = Path(__file__).parents[2]

numbers = st.integers(0, MAX_NUMBER)
counts = st.integers(0, 2**63 - 1)
floats = st.floats(allow_nan=False)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
ids = st.lists(numbers, max_size=5).map(tuple)
steps = st.integers(-1, 2**63 - 1)

samplings = st.builds(
    SamplingSpec,
    temperature=floats,
    top_p=floats,
    top_k=steps,
    min_p=floats,
    repetition_penalty=floats,
    presence_penalty=floats,
    frequency_penalty=floats,
    seed=counts,
    min_tokens=counts,
    stop_token_ids=ids,
    logprobs=st.none() | steps,
    prompt_logprobs=st.none() | steps,
)
news = st.builds(NewSequence, seq_id=counts, token_ids=ids, prompt_len=numbers, sampling=samplings)
chunks = st.builds(Chunk, seq_id=counts, start=numbers, count=numbers, sample=st.booleans(), appended=ids, new_blocks=ids)
logprobs = st.builds(TokenLogprobs, token_ids=ids, logprobs=st.lists(floats, max_size=4).map(tuple), ranks=ids)
samples = st.builds(
    Sample,
    seq_id=counts,
    token=st.none() | numbers,
    logprobs=st.none() | logprobs,
    prompt_logprobs=st.lists(logprobs, max_size=3).map(tuple),
)
messages: dict[str, st.SearchStrategy[Message]] = {
    "Hello": st.builds(Hello, rank=numbers, host=texts, pid=numbers, fingerprint=texts, machine=texts),
    "Welcome": st.builds(Welcome, host=texts, pid=numbers, machine=texts),
    "Ready": st.builds(Ready, rank=numbers, bytes_read=counts, weight_bytes=counts, cores=texts),
    "Failure": st.builds(Failure, rank=numbers, cause=texts, details=texts, user_error=st.booleans()),
    "Stop": st.builds(Stop),
    "StepPlan": st.builds(
        StepPlan,
        step=steps,
        dropped=st.lists(counts, max_size=5).map(tuple),
        started=st.lists(news, max_size=3).map(tuple),
        chunks=st.lists(chunks, max_size=3).map(tuple),
    ),
    "StepResult": st.builds(StepResult, step=steps, samples=st.lists(samples, max_size=3).map(tuple)),
    "Ping": st.builds(Ping),
    "Pong": st.builds(Pong, step=steps, entered=counts),
}


@pytest.mark.parametrize("kind", messages)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip(kind: str, data: st.DataObject) -> None:
    message = data.draw(messages[kind])
    frame = encode(message)
    assert isinstance(frame, bytes)
    again = decode(frame)
    assert type(again).__name__ == kind
    assert again == message
    assert repr(again) == repr(message)  # 1 and 1.0 and True are equal; their texts are not


SAMPLING = SamplingSpec(temperature=0.5, seed=7, stop_token_ids=(3, 4), logprobs=2)
NEW = NewSequence(seq_id=1, token_ids=(5, 6, 7), prompt_len=2, sampling=SAMPLING)
CHUNK = Chunk(seq_id=1, start=0, count=3, sample=True, appended=(9,), new_blocks=(0, 4))
LOGPROBS = TokenLogprobs(token_ids=(1, 2), logprobs=(-0.5, -1.5), ranks=(1, 2))
EXAMPLES: list[Message] = [
    Hello(rank=3, host="a-host", pid=77),
    Welcome(host="first", pid=78, machine="here"),
    Ready(rank=2, bytes_read=10**12, weight_bytes=9, cores="2 threads"),
    Failure(rank=1, cause="no such thing", details="line\nline", user_error=True),
    Stop(),
    StepPlan(step=4, dropped=(8, 9), started=(NEW,), chunks=(CHUNK, CHUNK)),
    StepResult(step=4, samples=(Sample(seq_id=1, token=5, logprobs=LOGPROBS, prompt_logprobs=(LOGPROBS,)),)),
    Ping(),
    Pong(step=-1, entered=3),
]


@pytest.mark.parametrize("version", [0, 1, 3, -1, None, "2", 2.0, 2.5, [], True, 2**40, "x" * 1000])
def test_another_version_is_refused(version: Any) -> None:
    _, kind, content = msgpack.unpackb(encode(EXAMPLES[5]))
    with pytest.raises(ValueError, match=r"version .{1,40}, not 2; all ranks must run the same qtp"):
        decode(msgpack.packb([version, kind, content]))


@pytest.mark.parametrize("kind", [-1, 9, 255, None, "0", True, False, 0.0, []])
def test_an_unknown_kind_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="unknown kind"):
        decode(msgpack.packb([VERSION, kind, []]))


def wrong_values(value: Any) -> list[Any]:
    """Values of every other type, which must not pass for `value`."""
    others = [None, True, 7, 0.5, "x", b"x", [], [[]], {}, [None], ["x"], [0.5], [b""]]
    if isinstance(value, bool):
        return [o for o in others if not isinstance(o, bool)]
    if isinstance(value, int):
        return [o for o in others if isinstance(o, bool) or not isinstance(o, int)]
    if isinstance(value, float):
        return [o for o in others if isinstance(o, bool) or not isinstance(o, int | float)]
    if isinstance(value, str):
        return [o for o in others if not isinstance(o, str)]
    return [None, True, 7, 0.5, "x", b"x", {}, [None], ["x"], [[None]]]


def places(value: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    inner = [p for i, v in enumerate(value) for p in places(v, (*path, i))] if isinstance(value, list) else []
    return [path, *inner]


def at(root: Any, path: tuple[int, ...]) -> Any:
    for i in path:
        root = root[i]
    return root


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_wrong_types_are_refused_at_every_place(message: Message) -> None:
    optional = {10, 11}  # logprobs, prompt_logprobs of a SamplingSpec
    for path in places(msgpack.unpackb(encode(message))[2]):
        for wrong in wrong_values(at(msgpack.unpackb(encode(message))[2], path)):
            outer = msgpack.unpackb(encode(message))
            in_sampling = isinstance(message, StepPlan) and path[:3] == (2, 0, 3) and len(path) == 4
            in_sample = isinstance(message, StepResult) and path[:2] == (1, 0) and len(path) == 3
            may_be_none = (in_sampling and path[3] in optional) or (in_sample and path[2] in (1, 2))
            if wrong is None and may_be_none:
                continue
            if may_be_none and in_sampling and at(outer[2], path) is None and isinstance(wrong, int):
                continue
            if path:
                at(outer[2], path[:-1])[path[-1]] = wrong
            else:
                outer[2] = wrong
            with pytest.raises(ValueError, match="malformed control frame"):
                decode(msgpack.packb(outer))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_field_more_or_less_is_refused(message: Message) -> None:
    version, kind, content = msgpack.unpackb(encode(message))
    for fields in ([*content, 1], [*content, None], content[:-1] if content else [[]]):
        with pytest.raises(ValueError, match=r"fields, not"):
            decode(msgpack.packb([version, kind, fields]))
    for frame in ([version, kind], [version, kind, content, 0], [], {}, None, version, "x"):
        with pytest.raises(ValueError, match="malformed control frame"):
            decode(msgpack.packb(frame))


def read_or_refuse(frame: bytes) -> bool:
    """True if `frame` is a message; then it survives a round trip. Anything but a ValueError is an error of the test."""
    try:
        message = decode(frame)
    except ValueError as error:
        if not str(error).startswith("malformed control frame: "):
            raise AssertionError(f"the error does not say what was malformed: {error}") from error
        return False
    assert encode(decode(encode(message))) == encode(message)
    return True


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_truncated_and_extended_frames_are_refused(message: Message) -> None:
    frame = encode(message)
    for end in range(len(frame)):
        assert not read_or_refuse(frame[:end])
    assert not read_or_refuse(frame + b"\0")
    assert not read_or_refuse(frame + frame)


def test_random_bytes_are_refused() -> None:
    rng = random.Random(1)
    starts = [b"", b"\x93", b"\x93\x02", b"\x93\x02\x05", b"\x93\x02\x05\x94", b"\x93\x02\x06\x92"]
    for turn in range(2500):
        read_or_refuse(rng.choice(starts) + rng.randbytes(rng.randint(0, 60)) if turn else b"")


def test_flipped_bits_are_refused_or_another_message() -> None:
    rng, read = random.Random(2), 0
    for _ in range(2500):
        frame = bytearray(encode(rng.choice(EXAMPLES)))
        for _ in range(rng.randint(1, 3)):
            frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        read += read_or_refuse(bytes(frame))
    assert 0 < read < 2500


@pytest.mark.parametrize("depth", [600, 2000, 100_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    assert not read_or_refuse(b"\x93\x02\x05" + b"\x91" * depth + b"\xc0")


@pytest.mark.parametrize(
    "frame", [b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
)
def test_a_claimed_size_allocates_nothing(frame: bytes) -> None:
    assert not read_or_refuse(frame)


def test_nan_and_infinities_travel() -> None:
    result = StepResult(
        step=1, samples=(Sample(seq_id=1, logprobs=TokenLogprobs(token_ids=(1,), logprobs=(math.nan,), ranks=(1,))),)
    )
    again = decode(encode(result))
    assert isinstance(again, StepResult)
    assert again.samples[0].logprobs is not None
    assert math.isnan(again.samples[0].logprobs.logprobs[0])
    spec = SamplingSpec(temperature=math.inf, top_p=-math.inf)
    plan = StepPlan(step=1, started=(NewSequence(seq_id=1, token_ids=(), prompt_len=0, sampling=spec),))
    assert decode(encode(plan)) == plan


OUT_OF_BOUNDS = [
    *(Hello(rank=r, host="", pid=1) for r in (-1, MAX_NUMBER + 1)),
    Hello(rank=1, host="", pid=-1),
    *(Ready(rank=1, bytes_read=a, weight_bytes=b) for a, b in ((-1, 0), (0, -1))),
    StepPlan(step=-2),
    StepPlan(step=1, dropped=(3, -1)),
    *(Pong(step=a, entered=b) for a, b in ((-2, 0), (0, -1))),
    *(StepPlan(step=1, chunks=(replace(CHUNK, **{name: -1}),)) for name in ("seq_id", "start", "count")),
    *(StepPlan(step=1, chunks=(replace(CHUNK, **{name: MAX_NUMBER + 1}),)) for name in ("start", "count")),
    *(
        StepPlan(step=1, chunks=(replace(CHUNK, **{n: ids}),))
        for n in ("appended", "new_blocks")
        for ids in ((1, -1), (2**31, 1))
    ),
    *(StepPlan(step=1, started=(replace(NEW, **{name: -1}),)) for name in ("seq_id", "prompt_len")),
    *(StepPlan(step=1, started=(replace(NEW, token_ids=ids),)) for ids in ((0, -5), (2**31,), (2**64 - 1,))),
    *(
        StepPlan(step=1, started=(replace(NEW, sampling=replace(SAMPLING, **wrong)),))
        for wrong in (
            {"top_k": -2},
            {"seed": -1},
            {"seed": 2**63},
            {"min_tokens": -1},
            {"stop_token_ids": (-1,)},
            {"logprobs": -2},
            {"prompt_logprobs": -2},
        )
    ),
    *(StepResult(step=1, samples=(Sample(seq_id=1, token=token),)) for token in (-1, 2**31)),
    StepResult(step=1, samples=(Sample(seq_id=1, logprobs=replace(LOGPROBS, ranks=(-1,))),)),
]


@pytest.mark.parametrize("message", OUT_OF_BOUNDS, ids=str)
def test_numbers_out_of_bounds_are_refused(message: Message) -> None:
    with pytest.raises(ValueError, match=r"malformed control frame: \w+ -?\d+ is not between"):
        decode(encode(message))


@pytest.mark.parametrize(
    "value", [{}, {1: 2}, b"", b"x", msgpack.ExtType(5, b""), msgpack.ExtType(5, b"xyz"), msgpack.Timestamp(1), [], [1]]
)
def test_maps_bytes_extended_types_and_arrays_are_no_values(value: Any) -> None:
    for content in ([value, 0, 0, ""], [0, 0, 0, value]):
        with pytest.raises(ValueError, match="malformed control frame"):
            decode(msgpack.packb([VERSION, 2, content]))
    assert decode(msgpack.packb([VERSION, 2, [0, 0, 0, ""]])) == Ready(rank=0, bytes_read=0, weight_bytes=0)


@pytest.mark.parametrize("layer", [b"\xdd\x00\x00\x10\x00", b"\xdd\xff\xff\xff\xff", b"\xdc\x10\x00", b"\xde\x10\x00"])
@pytest.mark.parametrize("start", [b"", b"\x93\x02", b"\x93\x02\x05", b"\x93\x02\x05\x94\x01\x90\x90"], ids=len)
def test_a_small_frame_cannot_take_much_memory(start: bytes, layer: bytes) -> None:
    """Arrays in arrays, each of which claims more items than it has. Without limits such a frame takes 26 MB."""
    frame = (start + layer * 700).ljust(4096, b"\xc0")
    tracemalloc.start()
    try:
        assert not read_or_refuse(frame)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_too_many_items_are_refused_before_they_are_read() -> None:
    frame = b"\x93\x02\x05\x94\x01\x90\x90\xdd" + (MAX_ITEMS + 1).to_bytes(4, "big") + b"\xc0" * (MAX_ITEMS + 1)
    with pytest.raises(ValueError, match=f"{MAX_ITEMS + 1} chunks, over the limit of {MAX_ITEMS}"):
        decode(frame)


@pytest.mark.parametrize("letter", ["x", "\u20ac", "\U0001f600", "\udcff"], ids=ascii)
def test_a_text_that_is_too_long_travels_without_its_middle(letter: str) -> None:
    details = "first " + letter * MAX_CHARACTERS + " last"
    again = decode(encode(Failure(rank=1, cause="c", details=details, user_error=False)))
    assert isinstance(again, Failure)
    assert again.details.startswith("first ")
    assert again.details.endswith(" last")
    assert " [...] " in again.details
    fits = Failure(rank=1, cause="c", details="x" * MAX_CHARACTERS, user_error=False)
    assert decode(encode(fits)) == fits


def test_the_unpacker_without_native_code_reads_and_refuses_alike() -> None:
    code = """
import msgpack
from tests.unit.test_wire import EXAMPLES, read_or_refuse
from qtp.wire.codec import decode, encode
assert msgpack.Unpacker.__module__ == "msgpack.fallback"
for message in EXAMPLES:
    frame = encode(message)
    assert decode(frame) == message
    for end in range(len(frame)):
        assert not read_or_refuse(frame[:end])
        assert not read_or_refuse(frame[:end] + bytes([0xdd, 255, 255, 255, 255]) + frame[end:])
        assert not read_or_refuse(frame[:end] + bytes([0x91]) * 3000 + frame[end:])
"""
    environ = {**os.environ, "MSGPACK_PUREPYTHON": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def fuzzer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_wire", ROOT / "scripts/fuzz_wire.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_short_fuzz_finds_nothing() -> None:
    command = [
        sys.executable,
        "scripts/fuzz_wire.py",
        "--frames",
        "20000",
        "--connections",
        "400",
        "--members",
        "30",
        "--seed",
        "5",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 findings" in done.stdout


@pytest.mark.parametrize("fault", ["crash", "unclear", "accepts", "grows"])
def test_the_fuzz_sees_what_it_looks_for(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, kept = fuzzer(), list[mmap]()

    def faulty(frame: bytes) -> Message:
        if fault == "grows":
            kept.append(mmap(-1, 40_000))  # new memory, however much of the process's own is free
            kept[-1].write(b"x" * 40_000)
        try:
            message = decode(frame)
        except ValueError:
            if fault == "crash":
                raise KeyError("x") from None
            if fault == "unclear":
                raise ValueError("x") from None
            if fault == "accepts":
                return Pong(step=-2, entered=0)
            raise
        return replace(message, step=message.step + 1) if fault == "accepts" and isinstance(message, Pong) else message

    found: list[str] = []
    module.fuzz_codec(2000, 3, found)
    assert found == []
    monkeypatch.setattr(module, "decode", faulty)
    module.fuzz_codec(2000, 3, found)
    assert found != []


@pytest.mark.parametrize("fault", ["raises", "answers"])
def test_the_fuzz_sees_what_goes_wrong_at_the_listener(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = fuzzer()
    real = SocketLeader._greet

    def faulty(self: SocketLeader, connection: socket.socket) -> Any:
        peer = real(self, connection)
        if peer is None and fault == "raises":
            raise KeyError("x")
        if peer is None:
            connection.sendall(b"x")
        return peer

    monkeypatch.setattr(SocketLeader, "_greet", faulty)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "argv", ["fuzz_wire", "--frames", "100", "--connections", "60", "--members", "1"])
    assert module.main() == 1
    assert ("KeyError: 'x'" if fault == "raises" else "let in") in capsys.readouterr().out

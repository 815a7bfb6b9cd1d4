"""The codec: every message comes back equal, and whatever else arrives is a ValueError."""

import math
import random
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtp.wire.codec import VERSION, decode, encode
from qtp.wire.messages import (
    Chunk,
    Failure,
    Hello,
    Message,
    NewSequence,
    Ready,
    Sample,
    SamplingSpec,
    StepPlan,
    StepResult,
    Stop,
    TokenLogprobs,
)

integers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
ids = st.lists(integers, max_size=5).map(tuple)
maybe = st.none() | integers

samplings = st.builds(
    SamplingSpec,
    temperature=floats,
    top_p=floats,
    top_k=integers,
    min_p=floats,
    repetition_penalty=floats,
    presence_penalty=floats,
    frequency_penalty=floats,
    seed=integers,
    min_tokens=integers,
    stop_token_ids=ids,
    logprobs=maybe,
    prompt_logprobs=maybe,
)
news = st.builds(NewSequence, seq_id=integers, token_ids=ids, prompt_len=integers, sampling=samplings)
chunks = st.builds(Chunk, seq_id=integers, start=integers, count=integers, sample=st.booleans(), appended=ids, new_blocks=ids)
logprobs = st.builds(TokenLogprobs, token_ids=ids, logprobs=st.lists(floats, max_size=4).map(tuple), ranks=ids)
samples = st.builds(
    Sample,
    seq_id=integers,
    token=maybe,
    logprobs=st.none() | logprobs,
    prompt_logprobs=st.lists(logprobs, max_size=3).map(tuple),
)
messages: dict[str, st.SearchStrategy[Message]] = {
    "Hello": st.builds(Hello, rank=integers, host=texts, pid=integers, token=texts),
    "Ready": st.builds(Ready, rank=integers, bytes_read=integers, weight_bytes=integers),
    "Failure": st.builds(Failure, rank=integers, cause=texts, details=texts, user_error=st.booleans()),
    "Stop": st.builds(Stop),
    "StepPlan": st.builds(
        StepPlan,
        step=integers,
        dropped=ids,
        started=st.lists(news, max_size=3).map(tuple),
        chunks=st.lists(chunks, max_size=3).map(tuple),
    ),
    "StepResult": st.builds(StepResult, step=integers, samples=st.lists(samples, max_size=3).map(tuple)),
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
    Hello(rank=3, host="a-host", pid=77, token="c0ffee"),
    Ready(rank=2, bytes_read=10**12, weight_bytes=9),
    Failure(rank=1, cause="no such thing", details="line\nline", user_error=True),
    Stop(),
    StepPlan(step=4, dropped=(8, 9), started=(NEW,), chunks=(CHUNK, CHUNK)),
    StepResult(step=4, samples=(Sample(seq_id=1, token=5, logprobs=LOGPROBS, prompt_logprobs=(LOGPROBS,)),)),
]


@pytest.mark.parametrize("version", [0, 2, -1, None, "1", 1.5, [1], 2**40])
def test_another_version_is_refused(version: Any) -> None:
    _, kind, content = msgpack.unpackb(encode(EXAMPLES[4]))
    with pytest.raises(ValueError, match=r"version .* not 1; all ranks must run the same qtp"):
        decode(msgpack.packb([version, kind, content]))


@pytest.mark.parametrize("kind", [-1, 6, 255, None, "0", True, False, 0.0, [0]])
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
    starts = [b"", b"\x93", b"\x93\x01", b"\x93\x01\x04", b"\x93\x01\x04\x94", b"\x93\x01\x05\x92"]
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
    assert not read_or_refuse(b"\x93\x01\x04" + b"\x91" * depth + b"\xc0")


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

"""Messages to bytes and back: msgpack arrays [version, kind, [field, field, ...]], checked on arrival. Nothing is unpickled.

A frame that is not of this form raises ValueError, whatever its content. What is read follows the form of the messages, never
what a frame claims of itself: no nesting but theirs, no maps, no binary or extended types, no memory for a claimed length.
"""

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import msgpack

from qtp.wire.messages import Failure, Hello, Message, Ping, Pong, Ready, StepPlan, StepResult, Stop, Welcome

VERSION = 2
MAX_CHARACTERS = 1 << 17  # of a text; a longer one, such as a traceback, travels without its middle
MAX_TEXT = 8 * MAX_CHARACTERS  # bytes: what cannot be encoded takes six a character
MAX_ITEMS = 1 << 20  # sequences in a step, or positions of a chunk that are told logprobs
MAX_NUMBER = 2**31 - 1  # token ids, block numbers, tokens of a sequence, ranks and process ids: int32 in vLLM and in kernels
_MAX_INTEGER = 2**63 - 1
_HALF = MAX_CHARACTERS // 2 - 8

# What the integers of a field may be, wherever it occurs; others are any of 64 bits.
_NUMBER, _COUNT = (0, MAX_NUMBER), (0, _MAX_INTEGER)
_BOUNDS = {
    **dict.fromkeys(("rank", "pid", "token_ids", "prompt_len", "start", "count", "appended", "new_blocks"), _NUMBER),
    **dict.fromkeys(("stop_token_ids", "token", "ranks"), _NUMBER),
    **dict.fromkeys(("seq_id", "dropped", "seed", "min_tokens", "entered", "bytes_read", "weight_bytes"), _COUNT),
    **dict.fromkeys(("step", "top_k", "logprobs", "prompt_logprobs"), (-1, _MAX_INTEGER)),
}
_KINDS: tuple[type[Message], ...] = (Hello, Welcome, Ready, Failure, Stop, StepPlan, StepResult, Ping, Pong)

# Arrays are read by their headers, where one belongs; an array in place of any other value is refused before it is made. The
# Unpacker without native code would refuse the headers too, and makes nothing for a claimed length anyway.
_MAX_ARRAY = 0 if msgpack.Unpacker.__module__.endswith("_cmsgpack") else -1

_Reader = Callable[[Any], Any]  # from an msgpack.Unpacker to the next value
_Writer = Callable[[Any], Any]


def encode(message: Message) -> bytes:
    kind = _KINDS.index(type(message))
    packed: bytes = msgpack.packb([VERSION, kind, _WRITERS[kind](message)], unicode_errors="backslashreplace")
    return packed


def decode(frame: bytes) -> Message:
    """Raises ValueError if `frame` is not a whole, well-formed message of this version."""
    try:
        source = msgpack.Unpacker(
            max_buffer_size=max(1, len(frame)),
            max_str_len=MAX_TEXT,
            max_array_len=_MAX_ARRAY,
            max_map_len=0,
            max_bin_len=0,
            max_ext_len=0,
        )
        source.feed(frame)
        if (parts := _length(source, "a frame")) != 3:
            raise ValueError(f"{parts} parts, not 3")
        version, kind = source.unpack(), source.unpack()
        if type(version) is not int or version != VERSION:
            raise ValueError(f"version {_shown(version)}, not {VERSION}; all ranks must run the same qtp")
        if type(kind) is not int or not 0 <= kind < len(_KINDS):
            raise ValueError(f"unknown kind {_shown(kind)}")
        message: Message = _READERS[kind](source)
        if source.tell() != len(frame):
            raise ValueError(f"{len(frame) - source.tell()} bytes too many")
        return message
    except msgpack.OutOfData:
        raise ValueError("malformed control frame: it ends too early") from None
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ValueError(f"malformed control frame: {str(error) or type(error).__name__}") from None


def _writer(hint: Any) -> _Writer | None:
    """What turns a value of type `hint` into what msgpack takes; None if the value is that already."""
    if isinstance(hint, UnionType):
        (inner,) = [a for a in get_args(hint) if a is not NoneType]
        some = _writer(inner)
        return None if some is None else lambda value: None if value is None else some(value)
    if get_origin(hint) is tuple:
        one = _writer(get_args(hint)[0])
        return None if one is None else lambda value: [one(v) for v in value]
    if hint is str:
        return lambda value: value if len(value) <= MAX_CHARACTERS else f"{value[:_HALF]} [...] {value[-_HALF:]}"
    if hint in (int, float, bool):
        return None
    hints = get_type_hints(hint)
    names = [f.name for f in fields(hint)]
    writers = [(i, writer) for i, name in enumerate(names) if (writer := _writer(hints[name])) is not None]
    if len(names) > 1 and not writers:
        return attrgetter(*names)

    def write(value: Any) -> list[Any]:
        content = [getattr(value, name) for name in names]
        for i, writer in writers:
            content[i] = writer(content[i])
        return content

    return write


def _reader(hint: Any, name: str) -> _Reader:
    """What reads the field `name`, of type `hint`, or raises ValueError."""
    if isinstance(hint, UnionType):
        (inner,) = [a for a in get_args(hint) if a is not NoneType]
        return _optional(inner, name)
    if get_origin(hint) is tuple:
        return _many(get_args(hint)[0], name)
    return _scalar(hint, name) if hint in (int, float, str, bool) else _record(hint)


def _scalar(hint: Any, name: str) -> _Reader:
    check = _check(hint, name)
    low, high = _bounds(name)

    def read_integer(source: Any) -> Any:
        value = source.unpack()
        if type(value) is int and low <= value <= high:  # as `check` says, in half the time
            return value
        return check([value])[0]

    def read(source: Any) -> Any:
        value = source.unpack()
        return value if type(value) is hint else check([value])[0]

    return read_integer if hint is int else read


def _optional(hint: Any, name: str) -> _Reader:
    """What reads None or a value of type `hint`."""
    if hint not in (int, float, str, bool):
        return _record(hint, optional=True)
    check = _check(hint, name)

    def read(source: Any) -> Any:
        value = source.unpack()
        return None if value is None else check([value])[0]

    return read


def _many(hint: Any, name: str) -> _Reader:
    if hint in (int, float):
        check = _check(hint, name)

        def read_numbers(source: Any) -> Any:
            count, unpack = _length(source, name), source.unpack
            return tuple(check([unpack() for _ in range(count)])) if count else ()

        return read_numbers
    one = _reader(hint, name)

    def read(source: Any) -> Any:
        count = _length(source, name)
        if count > MAX_ITEMS:
            raise ValueError(f"{count} {name}, over the limit of {MAX_ITEMS}")
        return tuple([one(source) for _ in range(count)])

    return read


def _record(hint: Any, optional: bool = False) -> _Reader:
    hints = get_type_hints(hint)
    readers = [(f.name, _reader(hints[f.name], f.name)) for f in fields(hint)]

    def read(source: Any) -> Any:
        try:
            count = _length(source, hint.__name__)
        except ValueError:  # what is no array is still unread
            if optional and source.unpack() is None:
                return None
            raise
        if count != len(readers):
            raise ValueError(f"{hint.__name__} has {len(readers)} fields, not {count}")
        return hint(**{name: reader(source) for name, reader in readers})

    return read


def _check(hint: Any, name: str) -> Callable[[list[Any]], list[Any]]:
    """What returns the values of a field if all are of type `hint` and within its bounds, or raises ValueError."""
    types = {float, int} if hint is float else {hint}
    low, high = _bounds(name)

    def check(values: list[Any]) -> list[Any]:
        if not types.issuperset(map(type, values)):
            wrong = next(type(v).__name__ for v in values if type(v) not in types)
            raise ValueError(f"{name}: a {wrong} where {hint.__name__} belongs")
        if hint is float:
            return list(map(float, values))
        if hint is int and values and not (low <= min(values) and max(values) <= high):
            raise ValueError(f"{name} {next(v for v in values if not low <= v <= high)} is not between {low} and {high}")
        return values

    return check


def _bounds(name: str) -> tuple[int, int]:
    return _BOUNDS.get(name, (-_MAX_INTEGER - 1, _MAX_INTEGER))


def _length(source: Any, name: str) -> int:
    """How many items the array has that comes next, as it claims."""
    try:
        count: int = source.read_array_header()
    except ValueError:
        raise ValueError(f"{name}: something else where an array belongs") from None
    return count


def _shown(value: Any) -> str:
    return repr(value)[:40]


_READERS = [_record(kind) for kind in _KINDS]
_WRITERS = [writer for kind in _KINDS if (writer := _writer(kind)) is not None]

"""Messages to bytes and back: msgpack arrays [version, kind, field, field, ...], checked on arrival. Nothing is unpickled.

A frame that is not of this form raises ValueError, whatever its content.
"""

from collections.abc import Callable
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import msgpack

from qtp.wire.messages import Failure, Hello, Message, Ping, Pong, Ready, StepPlan, StepResult, Stop, Welcome

VERSION = 2
_KINDS: tuple[type[Message], ...] = (Hello, Welcome, Ready, Failure, Stop, StepPlan, StepResult, Ping, Pong)


def encode(message: Message) -> bytes:
    packed: bytes = msgpack.packb([VERSION, _KINDS.index(type(message)), _to_list(message)], unicode_errors="backslashreplace")
    return packed


def decode(frame: bytes) -> Message:
    """Raises ValueError if `frame` is not a whole, well-formed message of this version."""
    try:
        version, kind, content = msgpack.unpackb(frame)
        if version != VERSION:
            raise ValueError(f"version {version!r}, not {VERSION}; all ranks must run the same qtp")
        if isinstance(kind, bool) or not isinstance(kind, int) or not 0 <= kind < len(_KINDS):
            raise ValueError(f"unknown kind {kind!r}")
        message: Message = _READERS[kind](content)
        return message
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ValueError(f"malformed control frame: {error}") from None


def _to_list(value: Any) -> Any:
    if isinstance(value, tuple):
        if value and not isinstance(value[0], int | float):
            return [_to_list(v) for v in value]
        return value
    if value is None or isinstance(value, int | float | str):
        return value
    return [_to_list(getattr(value, f.name)) for f in fields(value)]


def _reader(hint: Any) -> Callable[[Any], Any]:
    """A function that turns unpacked msgpack into a value of type `hint`, or raises ValueError."""
    if isinstance(hint, UnionType):
        (inner,) = [a for a in get_args(hint) if a is not NoneType]
        some = _reader(inner)
        return lambda value: None if value is None else some(value)
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        one = _reader(item)
        return lambda value: tuple(one(v) for v in _typed(value, list))
    if hint is float:
        return lambda value: float(_typed(value, float, int))
    if hint in (int, str, bool):
        return lambda value: _typed(value, hint)
    hints = get_type_hints(hint)
    readers = [(f.name, _reader(hints[f.name])) for f in fields(hint)]

    def read(value: Any) -> Any:
        if len(_typed(value, list)) != len(readers):
            raise ValueError(f"{hint.__name__} has {len(readers)} fields, not {len(value)}")
        return hint(**{name: reader(v) for (name, reader), v in zip(readers, value, strict=True)})

    return read


def _typed(value: Any, *types: type) -> Any:
    if type(value) not in types:
        raise ValueError(f"a {type(value).__name__} where {types[0].__name__} belongs")
    return value


_READERS = [_reader(kind) for kind in _KINDS]

"""Dataclasses to and from JSON and msgpack, in one place."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar, cast

import msgspec

from madang.wire.errors import InvalidRequest

T = TypeVar("T")

_json_encoder = msgspec.json.Encoder()


@cache
def _json_decoder(kind: Hashable) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON. Raises InvalidRequest for text that is not Unicode (lone surrogates)."""
    try:
        return _json_encoder.encode(value)
    except (UnicodeEncodeError, ValueError, TypeError) as exc:
        raise InvalidRequest(f"can't be written as JSON: {exc}") from exc


def from_json(kind: type[T], data: bytes | str) -> T:
    """Parse and validate. Raises InvalidRequest that names the field."""
    try:
        value: T = _json_decoder(cast(Hashable, kind)).decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"not a valid {kind.__name__}: {exc}") from exc
    return value


def to_builtins(value: Any) -> Any:
    """Dataclasses as plain dicts and lists, as JSON would hold them."""
    return msgspec.to_builtins(value)


def convert(kind: type[T], value: Any) -> T:
    """Plain dicts and lists into *kind*, validated. Raises InvalidRequest."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"not a valid {kind.__name__}: {exc}") from exc

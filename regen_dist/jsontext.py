"""JSON as this project writes it: RFC 8259, which knows no NaN and no infinity. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any


def json_text(
    value: object,
    *,
    indent: int | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = True,
    separators: tuple[str, str] | None = None,
) -> str:
    """The JSON of plain values, without a newline at the end; a number that is not finite becomes null. The options are
    those of `json.dumps`."""
    try:
        return _dumps(value, indent, sort_keys, ensure_ascii, separators)
    except ValueError:  # rare: only then is the whole value searched
        return _dumps(finite_only(value), indent, sort_keys, ensure_ascii, separators)


def finite_only(value: object) -> Any:
    """The same plain values with None for every number that is not finite; a key that is one becomes a word."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(key): finite_only(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(each) for each in value]
    return value


def _key(key: object) -> object:
    return str(key) if isinstance(key, float) and not isfinite(key) else key


def _dumps(
    value: object, indent: int | None, sort_keys: bool, ensure_ascii: bool, separators: tuple[str, str] | None
) -> str:
    return json.dumps(
        value, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii, separators=separators, allow_nan=False
    )

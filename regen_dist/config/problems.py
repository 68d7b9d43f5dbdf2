"""Says what is wrong with a config.

Each problem comes with its file and line (or "command line"), the key, what was found, what is allowed, and for an
unknown key the nearest known one.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from regen_dist.config.composing import Composed, Unresolved

_SHOWN_CHARACTERS = 60


def describe(
    error: ValidationError, composed: Composed, schema: type[BaseModel], file: str
) -> list[tuple[str, str, str]]:
    """(origin, dotted key, problem) of everything that pydantic found, in its order."""
    found = []
    for each in error.errors():
        if isinstance(each["input"], Unresolved):
            continue
        dotted = ".".join(str(part) for part in each["loc"])
        origin = file if each["type"] == "missing" else composed.origin(dotted) or file
        found.append((origin, dotted or "(the whole config)", _problem(each, schema)))
    return found


def message(title: str, problems: Sequence[tuple[str, str, str]]) -> str:
    """One text with a line for each problem."""
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    return "\n".join([f"{title}: {count}", *(f"  {origin}: {key}: {problem}" for origin, key, problem in problems)])


def known_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections before what is in them; keys of list elements are left out."""
    for name, info in schema.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from known_keys(info.annotation, f"{prefix}{name}.")


def nearest(dotted: str, schema: type[BaseModel]) -> str | None:
    """The known key most like an unknown one: in its own section, or else one of the same name in another."""
    section, _, name = dotted.rpartition(".")
    inside = _section(schema, section.split(".") if section else [])
    here = difflib.get_close_matches(name, inside.model_fields, n=1, cutoff=0.6) if inside else []
    if here:
        return f"{section}.{here[0]}" if section else here[0]
    known = list(known_keys(schema))
    same_name = [key for key in known if key.rpartition(".")[2] == name]
    guesses = same_name or [key for key in difflib.get_close_matches(dotted, known, n=1, cutoff=0.6) if key != section]
    return guesses[0] if guesses else None


def _problem(error: ErrorDetails, schema: type[BaseModel]) -> str:
    dotted = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        guess = nearest(dotted, schema)
        inside = _section(schema, [str(part) for part in error["loc"][:-1]])
        known = ", ".join(inside.model_fields) if inside else "none"
        return f"unknown key; {f'did you mean {guess}?' if guess else 'nothing like it is known.'} Known here: {known}"
    if error["type"] == "missing":
        return "is required and not set"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    allowed = error["msg"].replace("Input should be ", "").replace("Input should have ", "")
    hint = "; quote it to make it one, as in name='\"7\"'" if error["type"] == "string_type" else ""
    return f"found {_shown(error['input'])}; allowed: {allowed}{hint}"


def _shown(value: object) -> str:
    text = repr(value)
    text = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
    return f"{text} ({type(value).__name__})"


def _section(schema: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The class of the section at `path`; None where the path does not lead to one."""
    annotation: Any = schema
    for name in path:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(name)
            annotation = field.annotation if field else None
        else:  # the number of an element of tuple[Section, ...], or a name of dict[str, Section]
            arguments = typing.get_args(annotation)
            named = typing.get_origin(annotation) is dict
            annotation = arguments[-1] if named else arguments[0] if arguments and name.isdigit() else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None

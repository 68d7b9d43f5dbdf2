"""Replacements, in an exported module, for parts that only this package has: pydantic in the config, and the module's
own source. `inlining.py` puts them in the place of the originals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_CHECKED, _MISSING = "_is_check", object()


def Field(default: Any = _MISSING, **constraints: Any) -> Any:
    """Replacement for pydantic's Field: return the default. Constraints were checked when the model was exported."""
    return constraints["default_factory"]() if "default_factory" in constraints else default


def ConfigDict(**settings: Any) -> dict[str, Any]:
    """Return the settings of a section, which is always frozen here."""
    return settings


def model_validator(*, mode: str) -> Callable[[Any], Any]:
    """Mark a check of a whole section."""

    def marked(check: Any) -> Any:
        setattr(check, _CHECKED, mode == "after")
        return check

    return marked


def field_validator(*fields: str) -> Callable[[Any], Any]:
    """Return a check of single fields unchanged: values were checked when the model was exported."""
    return lambda check: check


def model_serializer(*, mode: str) -> Callable[[Any], Any]:
    """Return a section's serialiser unchanged: nothing is written here."""
    return lambda written: written


SerializerFunctionWrapHandler = Any


def AfterValidator(check: Any) -> Any:
    """Placeholder for the check of an annotated type, which type hints omit."""
    return check


class BaseModel:
    """Frozen section of the config: typed fields by name, with nested sections and tuples built from plain JSON."""

    def __init__(self, **values: Any) -> None:
        kinds = {name: kind for name, kind in get_type_hints(type(self)).items() if name != "model_config"}
        if unknown := sorted(values.keys() - kinds.keys()):
            raise ValueError(f"{type(self).__name__} has no {', '.join(unknown)}; known: {', '.join(kinds)}")
        for name, kind in kinds.items():
            value = values.get(name, getattr(type(self), name, _MISSING))
            if value is _MISSING:
                raise ValueError(f"{type(self).__name__} needs {name}")
            self.__dict__[name] = _built(kind, value)
        for cls in type(self).__mro__:
            for check in vars(cls).values():
                if getattr(check, _CHECKED, False):
                    check(self)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen; export the model again with another {name}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.items()))


def _built(kind: Any, value: Any) -> Any:
    """Convert a JSON value to the type of a field."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return value if isinstance(value, kind) else kind(**value)
    origin, kinds = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _built(next(each for each in kinds if each is not type(None)), value)
    if origin is tuple:
        each = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return tuple(_built(one, part) for one, part in zip(each, value, strict=True))
    return value


def own_module() -> tuple[str, str]:
    """Return file name and text of the module that this function is part of."""
    path = Path(__file__)
    return path.name, path.read_text(encoding="utf-8")

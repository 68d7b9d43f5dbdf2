"""Registries: for each choice of the config one table from its values to what they build.

A new value is one file with what it builds, one line in its registry, and its name in the config's Literal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from regen_dist.errors import BackendError

Builder = TypeVar("Builder")
AnyEntry = TypeVar("AnyEntry", bound="Entry[Any]")


def runs_anywhere(*place: Any) -> None:
    """Availability of a value that needs nothing of its machine."""


@dataclass(frozen=True)
class Entry(Generic[Builder]):
    """One value of a choice.

    Args:
        build: makes it, or computes it.
        check: raises BackendError, with the reason and the remedy, where it cannot run; arguments as the registry says.
        state: the kinds of tensors that it adds to a checkpoint for every parameter.
    """

    build: Builder
    check: Callable[..., None] = runs_anywhere
    state: tuple[str, ...] = ()


class Registry(Mapping[str, AnyEntry]):
    """The values of one choice of the config.

    Args:
        key: of the config.
        entries: by value.
    """

    def __init__(self, key: str, entries: Mapping[str, AnyEntry]) -> None:
        self.key, self._entries = key, dict(entries)

    def __getitem__(self, name: str) -> AnyEntry:
        if name not in self._entries:
            raise BackendError(f"{self.key}={name} is not known; set it to one of {', '.join(self._entries)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def available(self, name: str, *place: Any) -> AnyEntry:
        """The entry of a value that can run here.

        Raises:
            BackendError: it cannot, with the reason and the remedy.
        """
        entry = self[name]
        entry.check(*place)
        return entry

    def reason(self, name: str, *place: Any) -> str:
        """Return the reason why a value cannot run here; empty if it can."""
        try:
            self.available(name, *place)
        except BackendError as error:
            return str(error)
        return ""

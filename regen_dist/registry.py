"""Registries: for each choice of the config one table from its values to what they build.

A new value is one file with what it builds, one line in its registry, and its name in the config's Literal. What it
needs of its machine stands in `requirements.py`, which imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from regen_dist.errors import BackendError
from regen_dist.requirements import Site, problems

Builder = TypeVar("Builder")
AnyEntry = TypeVar("AnyEntry", bound="Entry[Any]")


@dataclass(frozen=True)
class Entry(Generic[Builder]):
    """One value of a choice.

    Args:
        build: the builder: makes the value's object, or computes it.
        state: the kinds of tensors that it adds to a checkpoint for every parameter.
    """

    build: Builder
    state: tuple[str, ...] = ()


class Registry(Mapping[str, AnyEntry]):
    """The values of one choice of the config.

    Args:
        key: key of the config.
        entries: an entry for each value.
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

    def available(self, name: str, site: Site) -> AnyEntry:
        """The entry of a value that can run at a site.

        Raises:
            BackendError: it cannot, with the reason and the remedy.
        """
        entry = self[name]
        if reason := self.reason(name, site):
            raise BackendError(reason)
        return entry

    def reason(self, name: str, site: Site) -> str:
        """Return the reason why a value cannot run at a site; empty if it can."""
        return next(problems(self.key, name, site), "")

"""Findings of checks, and the circumstances in which a config is judged."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal, NamedTuple, TypeVar

from regen_dist.config.urls import parse_url
from regen_dist.errors import ConfigError, RegenError

One = TypeVar("One")
Result = TypeVar("Result")
_AT_ONCE = 16
_FIX = re.compile(r"(.*)(?:; (?=[^A-Z])|\. (?=[A-Z]))(.*)", re.DOTALL)  # greedy: the fix follows the last separator


class Finding(NamedTuple):
    """One thing that a check found.

    Attributes:
        level: an error would stop the run at its start; a note is only worth knowing.
        key: dotted config key that the finding is about.
        message: the problem.
        fix: the remedy; empty where the message is sufficient.
        kind: the error that the run ends with.
    """

    level: Literal["error", "note"]
    key: str
    message: str
    fix: str
    kind: type[RegenError] = ConfigError

    @property
    def exit_code(self) -> int:
        """Exit code that the run would end with; 0 for a note."""
        return self.kind.exit_code if self.level == "error" else 0

    @property
    def text(self) -> str:
        """Message and fix as one text."""
        if not self.fix:
            return self.message
        return self.message + (". " if self.fix[0].isupper() else "; ") + self.fix

    def to_json(self) -> dict[str, str]:
        """The four fields that are published."""
        return {"level": self.level, "key": self.key, "message": self.message, "fix": self.fix}


def error(key: str, text: str, kind: type[RegenError] = ConfigError) -> Finding:
    """Return a finding that forbids the run; `text` is "message; fix" or "Message. Fix", `kind` has the exit code."""
    return Finding("error", key, *_split(text), kind)


def note(key: str, text: str) -> Finding:
    """Return a finding that is only worth knowing."""
    return Finding("note", key, *_split(text))


def refuse(found: Iterable[Finding]) -> None:
    """Raise the first error of these findings, if there is one: the end of a run at its start."""
    for each in found:
        if each.level == "error":
            raise each.kind(each.text)


def _split(text: str) -> tuple[str, str]:
    found = _FIX.fullmatch(text)
    return (found[1], found[2]) if found else (text, "")


@dataclass(frozen=True)
class Target:
    """Target machine of the configs, as far as it is known.

    Args:
        world_size: number of ranks.
        has_gpus: true if each rank has a GPU; None assumes the same as on this machine.
        packages: true if the ranks run in this Python, so that its packages count.
        produced: URLs and paths that an earlier job will have made by then.
        fresh: true if the runs may start from scratch where checkpoints are lost.
    """

    world_size: int = 1
    has_gpus: bool | None = None
    packages: bool = True
    produced: Collection[str] = ()
    fresh: bool = False
    down: set[str | None] = field(default_factory=set)  # stores that did not answer: not every run waits for one
    _known: dict[str, Future[Any]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def will_be_there(self, url: str) -> bool:
        """Return whether an earlier job makes this place, or a folder that it lies in."""
        place = parse_url(url).url
        return any(f"{place}/".startswith(f"{parse_url(each).url}/") for each in self.produced)

    def once(self, what: str, url: str, ask: Callable[[str], Result]) -> Result:
        """Ask a question about a URL once for all configs, which share its answer or its exception."""
        with self._lock:
            is_first = f"{what} {url}" not in self._known
            answer: Future[Result] = self._known.setdefault(f"{what} {url}", Future())
        if is_first:
            try:
                answer.set_result(ask(url))
            except Exception as caught:  # noqa: BLE001 - raised again for every caller
                answer.set_exception(caught)
        return answer.result()


def run_concurrently(check: Callable[[One], Result], items: Iterable[One]) -> list[Result]:
    """Apply `check` to each item concurrently and return the results in order; most of the time is spent waiting."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(check, items))

"""Which step waits for which: what is wrong with it, and an order in which steps can run."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

After = Mapping[str, Sequence[str] | None]  # None: the step above


def predecessors(after: After) -> dict[str, tuple[str, ...]]:
    """The steps that each waits for."""
    names = list(after)
    above = dict(zip(names[1:], names, strict=False))
    found = {}
    for name, asked in after.items():
        default = [above[name]] if name in above else []
        found[name] = tuple(dict.fromkeys(default if asked is None else asked))
    return found


def in_order(after: After) -> list[str]:
    """Every step behind those that it waits for; otherwise as they stand in the file.

    Raises:
        CycleError: there is no such order.
    """
    before = predecessors(after)
    TopologicalSorter(before).prepare()
    ordered: list[str] = []
    while len(ordered) < len(before):
        ordered.append(next(each for each in before if each not in ordered and {*before[each]} <= {*ordered}))
    return ordered


def problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted key and text of what is wrong with `steps.*.after` in a file of which nothing has been checked yet."""
    steps = values.get("steps")
    if not isinstance(steps, dict):
        return
    after = {name: _asked(step) for name, step in steps.items()}
    for name, asked in after.items():
        for other in asked or ():
            if other not in after:
                yield f"steps.{name}.after", _unknown(other, [each for each in after if each != name])
    known = {
        name: asked if asked is None else [each for each in asked if each in after] for name, asked in after.items()
    }
    try:
        in_order(known)
    except CycleError as error:
        circle = error.args[1][::-1]
        yield f"steps.{circle[0]}", f"these steps wait for each other: {' -> '.join(circle)}; take one `after` out"


def _asked(step: object) -> list[str] | None:
    """What a step says itself; that it is no list of names is told by the schema."""
    asked = step.get("after") if isinstance(step, dict) else None
    return [each for each in asked if isinstance(each, str)] if isinstance(asked, list) else None


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"there is no step {name!r}; {hint}Allowed: {', '.join(known) or 'none, it is the only one'}"

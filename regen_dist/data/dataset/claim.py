"""Claiming a folder for a dataset: what is asked for is written down first, and a folder that holds anything else is
left alone."""

from __future__ import annotations

import json
from typing import Any

from regen_dist.data.dataset.manifest import to_json
from regen_dist.data.objects.store import Store
from regen_dist.errors import DataError, ObjectMissing

PLAN = "plan.json"  # written first: it marks a folder as ours, and holds what was asked for
_NAMED = 4  # differences told of each part


def claim(store: Store, identity: dict[str, Any], *, by: str = "regen shards", out: str = "--out") -> None:
    """Make sure that the folder is ours: empty, or begun with this same `identity` (JSON; with its "kind" and its
    "schema_version").

    Several processes may claim the same folder at once: one writes the plan, the others find it.

    Args:
        by: the command, as messages call it.
        out: its option that names the folder.

    Raises:
        DataError: it holds something else; nothing was changed.
    """
    theirs = read_plan(store)
    if theirs is None:  # only now is everything listed: a finished dataset may have a million objects
        found = list(store.list())
        if not found and store.put_new(PLAN, to_json(identity)):
            return
        theirs = read_plan(store)  # of another process, which was quicker
        if theirs is None:
            raise DataError(
                f"{store.url}: holds files that no command of `{by}` made ({', '.join(found[:3])}); choose an empty "
                f"{out}. Nothing was changed"
            )
    different = changes(theirs, identity)
    if different:
        raise DataError(
            f"{store.url}: holds a dataset that was asked for otherwise ({'; '.join(different)}). Give the same "
            f"options to finish it, or another {out}; nothing was changed"
        )


def read_plan(store: Store) -> dict[str, Any] | None:
    """The plan that is there; None when there is none, or another program wrote it."""
    try:
        plan = json.loads(store.get(PLAN))
    except (ObjectMissing, ValueError):
        return None
    return plan if isinstance(plan, dict) and "schema_version" in plan else None


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Where an identity that is there differs from the one that is asked for now, in words."""
    found = []
    for part in sorted(old.keys() | new.keys()):
        before, after = old.get(part), new.get(part)
        if isinstance(before, dict) and isinstance(after, dict):
            names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
            found += [
                f"{part}.{name}: {before.get(name, 'absent')} there, {after.get(name, 'absent')} now"
                for name in names[:_NAMED]
            ]
        elif before != after:
            found.append(f"{part}: {before} there, {after} now")
    return found

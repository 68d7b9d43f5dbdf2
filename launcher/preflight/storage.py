"""Whether checkpoints can be written."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from launcher.preflight.findings import Finding, Subject, problem
from launcher.preflight.places import unwritable
from regen_dist.checks.data import READING
from regen_dist.checks.findings import side_by_side
from regen_dist.config import AnyRunConfig
from regen_dist.config.urls import parse_url
from regen_dist.data.objects.store import Limits, Store
from regen_dist.errors import DataError, StoreUnavailable

WRITING = Limits(stall_s=4.0, deadline_s=24.0, connect_s=4.0)  # a third of it for one request


def checkpoints(subject: Subject) -> Iterator[Finding]:
    """Where checkpoints go an object can be written and deleted again. Those that are there are not touched."""
    first: dict[str | None, AnyRunConfig] = {}  # of the runs that share a place
    for config in subject.configs:
        first.setdefault(config.checkpoint.url, config)
    chosen = list(first.values())
    for wrong in side_by_side(lambda config: _unwritable(config.checkpoints), chosen):
        if wrong:
            yield problem(wrong)


def _unwritable(url: str) -> str:
    place = parse_url(url)
    if place.folder is not None:
        why = unwritable(place.folder)
        return f"checkpoints cannot be written to {place.folder}: {why}; set checkpoint.url" if why else ""
    return _probe(url)


def _probe(url: str) -> str:
    """Write an object into a bucket, and delete it; what went wrong, or ""."""
    name = f"preflight-{secrets.token_hex(8)}"
    try:
        Store(url, READING).size(name)  # a store that is down costs less time here
        store = Store(url, WRITING)
        try:
            store.put(name, b"written before a job is submitted, and deleted at once\n")
        except StoreUnavailable:  # it may have come through all the same
            store.delete(name)
            raise
    except DataError as error:
        return f"checkpoints cannot be written: {error}"
    try:
        store.delete(name)
    except DataError as error:
        return f"checkpoints can be written but not deleted, and {store.url}/{name} is left there now: {error}"
    return ""

"""Data and checkpoints: their stores answer, the data is whole on the face of it, checkpoints can be written."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from launcher.preflight.findings import Finding, Subject, problem, side_by_side
from launcher.preflight.places import unwritable
from regen_dist.config import AnyRunConfig
from regen_dist.config.urls import parse_url
from regen_dist.data.objects.store import Limits, Store
from regen_dist.errors import DataError, ObjectMissing, StoreUnavailable

# Somebody waits for the answer: a store that is down is told in seconds.
READING = Limits(stall_s=4.0, deadline_s=8.0, connect_s=4.0)
WRITING = Limits(stall_s=4.0, deadline_s=24.0, connect_s=4.0)  # a third of it for one request
MANIFEST, SCHEMA_VERSION = "manifest.json", 2  # of a dataset, whose own module needs numpy


def data(subject: Subject) -> Iterator[Finding]:
    """Every dataset can be read: its manifest, and the first of its shards."""
    urls: dict[str, str] = {}
    for config in subject.configs:
        urls |= dict.fromkeys(config.data.sources, "data")
        if config.data.validation_url:
            urls.setdefault(config.data.validation_url, "data.validation_url")
    wanted = [url for url in urls if not subject.will_be_there(url)]
    for url, wrong in zip(wanted, side_by_side(_dataset_problem, wanted), strict=True):
        if wrong:
            yield problem(f"{urls[url]}: {wrong}")


def _dataset_problem(url: str) -> str:
    """What is wrong with a dataset; "" where nothing is."""
    try:
        manifest = dataset_manifest(url)
        if not manifest["shards"]:
            return f"{url}: a dataset without shards; build it again"
        first = manifest["shards"][0]
        needed = [(Store(url, READING), first["index"])]
        needed.append((Store(manifest.get("shards_url") or url, READING), first["name"]))
        missing = [f"{store.url}/{name}" for store, name in needed if store.size(name) is None]
    except DataError as error:
        return str(error)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{url}/{MANIFEST}: damaged ({type(error).__name__}: {error}); run the build again"
    if missing:
        return f"{', '.join(missing)}: not there, though the manifest names it; run `regen shards verify {url}`"
    return ""


def dataset_manifest(url: str) -> dict[str, Any]:
    """The manifest of a dataset.

    Raises:
        DataError: the store does not answer, denies access, or has none; or it is of another version.
    """
    store = Store(url, READING)
    if store.folder is not None and not store.folder.is_dir():
        raise DataError(f"there is no folder {store.folder}; build the data, or correct the path")
    try:
        manifest: dict[str, Any] = json.loads(store.get(MANIFEST))
    except ObjectMissing as error:
        if "no bucket" in str(error):
            raise
        raise DataError(
            f"{store.url}: there is no {MANIFEST}, so no finished dataset; build one with `regen shards build SOURCE "
            f"--out {url}`, a cache of latents with `regen preencode`, or correct the URL"
        ) from None
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{store.url}/{MANIFEST}: schema version {manifest.get('schema_version')}, this program reads "
            f"{SCHEMA_VERSION}; build the shards again"
        )
    return manifest


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

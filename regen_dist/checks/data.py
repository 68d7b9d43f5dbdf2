"""Checks that the datasets of a run can be read: their stores answer, and they look complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from regen_dist.checks.findings import Finding, Target, error, side_by_side
from regen_dist.config import AnyRunConfig, T2VConfig
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.errors import ConfigError, DataError, ObjectMissing

# A user is waiting: a store that is down is reported within seconds.
READING = StoreLimits(stall_s=4.0, deadline_s=8.0, connect_s=4.0)
MANIFEST, SCHEMA_VERSION = "manifest.json", 2  # the dataset's own module defines these too, but needs numpy


def data(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that every dataset can be read: its manifest, and the first of its shards."""
    keys = dict.fromkeys(config.data.sources, "data")
    if config.data.validation_url:
        keys.setdefault(config.data.validation_url, "data.validation_url")
    wanted = [url for url in keys if not target.will_be_there(url)]
    found = side_by_side(lambda url: target.once("dataset", url, dataset_problem), wanted)
    for url, wrong in zip(wanted, found, strict=True):
        if wrong:
            yield error(keys[url], f"{keys[url]}: {wrong}", DataError)


def frozen_encoder(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that the autoencoder for whose latents a decoder is trained is there."""
    if isinstance(config, T2VConfig) or not config.model.encoder.frozen:
        return
    encoder = config.model.encoder
    if not target.will_be_there(str(encoder.path)):
        try:
            encoder.autoencoder_config()
        except ConfigError as caught:
            yield error("model.encoder.path", str(caught))


def dataset_problem(url: str) -> str:
    """Describe the problem of a dataset; "" where there is none."""
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
    """Read the manifest of a dataset.

    Raises:
        DataError: the store does not answer or denies access, or the manifest is missing or of another version.
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


def manifest_of(url: str, target: Target) -> dict[str, Any] | None:
    """Return the manifest of a dataset; None where it cannot be read, which `data` reports."""
    try:
        found: object = target.once("manifest", url, dataset_manifest)
    except (DataError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None

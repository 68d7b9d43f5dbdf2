"""Checks that the datasets of a run can be read, are complete, and are of the kind that it trains on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from regen_dist.checks.findings import Finding, Target, error, run_concurrently
from regen_dist.config import AnyRunConfig, EmbedderConfig, T2VConfig
from regen_dist.config.identity import different_latents
from regen_dist.config.run import SPATIAL_COMPRESSION
from regen_dist.config.t2v import SIDE_MULTIPLE
from regen_dist.config.yaml_files import read_yaml
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.errors import CheckpointError, ConfigError, DataError, ObjectMissing

# A user is waiting: a store that is down is reported within seconds.
READING = StoreLimits(stall_s=4.0, deadline_s=8.0, connect_s=4.0)
MANIFEST, SCHEMA_VERSION = "manifest.json", 2  # the dataset's own module defines these too, but needs numpy


def data(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that every dataset can be read: its manifest, and the first of its shards."""
    keys = dict.fromkeys(config.data.sources, "data")
    if config.data.validation_url:
        keys.setdefault(config.data.validation_url, "data.validation_url")
    wanted = [url for url in keys if not target.will_be_there(url)]
    found = run_concurrently(lambda url: target.once("dataset", url, dataset_problem), wanted)
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


# Checks that runs have the kind of data that they train on: videos for an embedder; for text to video, latents of one
# space that fit the model and the embedder.


KIND, _AGAIN = "latents", "run `regen preencode` again"  # as in the dataset's own module, which needs numpy
_OWN_LATENTS = {"cell": SPATIAL_COMPRESSION, "latent_frames": 2}  # facts about our encoders
_CONFIG = "config.yaml"  # in every run folder, and in every exported model


class LatentFacts(Protocol):
    """Facts about the latents of a cache; `text_width` is None where it has no text."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def text_width(self) -> int | None: ...
    @property
    def encoder(self) -> Mapping[str, Any]: ...
    @property
    def preprocessing(self) -> Mapping[str, Any]: ...


class _Space(NamedTuple):
    """Facts about the latents, read from a manifest."""

    fingerprint: str
    num_frames: int
    channels: int
    text_width: int | None
    encoder: Mapping[str, Any]
    preprocessing: Mapping[str, Any]


def latents(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check the kind of the data, the facts of the latents against the config, and the embedder that decodes generated
    videos."""
    urls = dict.fromkeys([*config.data.sources, config.data.validation_url])
    manifests = {url: manifest_of(url, target) for url in urls if url and not target.will_be_there(url)}
    found = {url: manifest for url, manifest in manifests.items() if manifest}
    caches = {url: manifest for url, manifest in found.items() if manifest.get("kind") == KIND}
    if isinstance(config, EmbedderConfig):
        for url in caches:
            text = (
                f"{url} holds latents that `regen preencode` made, not videos; give the dataset of videos, or train a "
                "text-to-video model on it (task: t2v)"
            )
            yield error("data", text, DataError)
        return
    for url in (each for each in found if each not in caches):
        text = f"{url} holds videos, not latents; make a cache of it with `regen preencode`, and give that cache"
        yield error("data", text, DataError)
    spaces: dict[str, _Space] = {}
    for url, manifest in caches.items():
        try:
            spaces[url] = _space(manifest)
        except (KeyError, TypeError, ValueError) as caught:
            reason = f"{type(caught).__name__}: {caught}"
            yield error(
                "data", f"{url}: its manifest does not say what the latents are ({reason}); {_AGAIN}", DataError
            )
    if problem := different_latents({url: space.fingerprint for url, space in spaces.items()}):
        yield error("data", problem, DataError)
    yield from (finding for url, space in spaces.items() for finding in fits(config, url, space))
    yield from embedder(config, spaces, target)


def _space(manifest: Mapping[str, Any]) -> _Space:
    options = manifest["options"]
    text_width = int(options["text"]["width"]) if options["text"] else None
    channels, encoder = int(options["channels"]), dict(options.get("encoder") or {})
    preprocessing = dict(options.get("preprocessing") or {})
    return _Space(str(options["fingerprint"]), int(options["num_frames"]), channels, text_width, encoder, preprocessing)


def fits(config: T2VConfig, url: str, space: LatentFacts) -> Iterator[Finding]:
    """Check that the model's inputs match the cache."""
    model = config.model
    cell, frames = (int(space.encoder.get(name, own)) for name, own in _OWN_LATENTS.items())
    if (cell, frames) != tuple(_OWN_LATENTS.values()):
        text = (
            f"the latents in {url} have cells of {cell} pixels and {frames} latent frames a clip; text to video takes "
            "cells of 8 pixels and 2 latent frames, as this project's encoders make: run `regen preencode` with such "
            "an embedder, into a new cache"
        )
        yield error("data", text, DataError)
    sizes = space.preprocessing.get("buckets", ())
    if odd := [f"{height}x{width}" for height, width in sizes if height % SIDE_MULTIPLE or width % SIDE_MULTIPLE]:
        text = (
            f"{url} has latents of videos of {', '.join(odd)} pixels; text to video takes sides that are multiples of "
            f"{SIDE_MULTIPLE}: run `regen preencode` with such buckets, into a new cache"
        )
        yield error("data", text, DataError)
    if model.latent_channels != space.channels:
        yield error(
            "model.latent_channels",
            f"model.latent_channels is {model.latent_channels}, the latents in {url} have {space.channels} channels; "
            f"set model.latent_channels={space.channels}",
            DataError,
        )
    if space.text_width is None:
        text = f"{url} holds no text embeddings; run `regen preencode` with a text encoder, into a new cache"
        yield error("data", text, DataError)
    elif model.text_width != space.text_width:
        yield error(
            "model.text_width",
            f"model.text_width is {model.text_width}, the text embeddings in {url} have a width of {space.text_width}; "
            f"set model.text_width={space.text_width}",
            DataError,
        )


def embedder(config: T2VConfig, spaces: Mapping[str, LatentFacts], target: Target) -> Iterator[Finding]:
    """Check that the embedder that decodes generated videos at validations exists and matches the caches."""
    path = config.generation.embedder
    if path is None or target.will_be_there(path):
        return
    found = _latents_of(Path(path))
    if found is None:
        yield error(
            "generation.embedder",
            f"generation.embedder: {path} is neither a run nor an exported model (no {_CONFIG} of an embedder in "
            "it); correct the path, or set generation.embedder=null to generate nothing while training",
        )
        return
    for url, space in spaces.items():
        if found != (space.num_frames, space.channels):
            yield error(
                "generation.embedder",
                f"generation.embedder: {path} has clips of {found[0]} frames and {found[1]} channels, the latents "
                f"in {url} are of {space.num_frames} frames and {space.channels} channels; give the embedder that made "
                "them",
                CheckpointError,
            )


def other_latents(config: T2VConfig, facts: Mapping[str, Any]) -> Iterator[str]:
    """Describe the caches of a config that are of another embedder or text encoder than a model's latent space, given
    by its `facts`. Caches that cannot be read are left out."""
    for url in config.data.sources:
        options = (manifest_of(url, Target()) or {}).get("options") or {}
        for name, what in (("encoder", "latents"), ("text", "text embeddings")):
            then, here = (str((each.get(name) or {}).get("fingerprint", "")) for each in (facts, options))
            if then and here and then != here:
                yield (
                    f"the {what} in {url} are of another encoder (fingerprint {here[:16]}…) than those that the "
                    f"weights were trained on ({then[:16]}…), and mean something else to them"
                )


def _latents_of(folder: Path) -> tuple[int, int] | None:
    """Frames of a clip and channels, from the config of a run or of an export; None where there is neither."""
    try:
        model: Any = read_yaml(folder / _CONFIG)[0]["model"]
        return int(model["temporal_compression"]) + 1, int(model["latent"]["channels"])
    except (ConfigError, KeyError, TypeError, ValueError):
        return None

"""Checks that runs have the kind of data that they train on: videos for an embedder; for text to video, latents of one
space that fit the model and the embedder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from regen_dist.checks.data import manifest_of
from regen_dist.checks.findings import Finding, Target, error
from regen_dist.config import AnyRunConfig, RunConfig, T2VConfig
from regen_dist.config.identity import different_latents
from regen_dist.config.yaml_files import read_yaml
from regen_dist.errors import CheckpointError, ConfigError, DataError

KIND, _AGAIN = "latents", "run `regen preencode` again"  # as in the dataset's own module, which needs numpy
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


class _Space(NamedTuple):
    """Facts about the latents, read from a manifest."""

    fingerprint: str
    num_frames: int
    channels: int
    text_width: int | None


def latents(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check the kind of the data, the facts of the latents against the config, and the embedder that decodes generated
    videos."""
    manifests = {url: manifest_of(url, target) for url in dict.fromkeys(_urls(config)) if not target.will_be_there(url)}
    found = {url: manifest for url, manifest in manifests.items() if manifest}
    caches = {url: manifest for url, manifest in found.items() if manifest.get("kind") == KIND}
    if isinstance(config, RunConfig):
        yield from map(_no_videos, caches)
        return
    yield from (_no_latents(url) for url in found if url not in caches)
    spaces: dict[str, _Space] = {}
    for url, manifest in caches.items():
        try:
            spaces[url] = _space(manifest)
        except (KeyError, TypeError, ValueError) as caught:
            told = f"{type(caught).__name__}: {caught}"
            yield error("data", f"{url}: its manifest does not say what the latents are ({told}); {_AGAIN}", DataError)
    if problem := different_latents({url: space.fingerprint for url, space in spaces.items()}):
        yield error("data", problem, DataError)
    yield from (finding for url, space in spaces.items() for finding in fits(config, url, space))
    yield from embedder(config, spaces, target)


def _urls(config: AnyRunConfig) -> list[str]:
    validation = config.data.validation_url
    return [*config.data.sources, *([validation] if validation else [])]


def _no_videos(url: str) -> Finding:
    return error(
        "data",
        f"{url} holds latents that `regen preencode` made, not videos; give the dataset of videos, or train a "
        "text-to-video model on it (task: t2v)",
        DataError,
    )


def _no_latents(url: str) -> Finding:
    text = f"{url} holds videos, not latents; make a cache of it with `regen preencode`, and give that cache"
    return error("data", text, DataError)


def _space(manifest: Mapping[str, Any]) -> _Space:
    options = manifest["options"]
    text_width = int(options["text"]["width"]) if options["text"] else None
    return _Space(str(options["fingerprint"]), int(options["num_frames"]), int(options["channels"]), text_width)


def fits(config: T2VConfig, url: str, space: LatentFacts) -> Iterator[Finding]:
    """Check that the model's inputs match the cache."""
    model = config.model
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


def _latents_of(folder: Path) -> tuple[int, int] | None:
    """Frames of a clip and channels, from the config of a run or of an export; None where there is neither."""
    try:
        model: Any = read_yaml(folder / _CONFIG)[0]["model"]
        return int(model["temporal_compression"]) + 1, int(model["latent"]["channels"])
    except (ConfigError, KeyError, TypeError, ValueError):
        return None

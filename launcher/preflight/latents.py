"""Whether runs have the kind of data that they train on: videos for an embedder, latents of one space for text to
video, whose model and whose embedder fit them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from launcher.preflight.findings import Finding, Subject, by_run, problem, side_by_side
from launcher.preflight.storage import dataset_manifest
from regen_dist.config import AnyRunConfig, RunConfig, T2VConfig
from regen_dist.config.yamlfile import read_yaml
from regen_dist.errors import ConfigError, DataError

_KIND, _AGAIN = "latents", "run `regen preencode` again"  # as the dataset's own module says, which needs numpy
_CONFIG = "config.yaml"  # in every run folder, and in every exported model


class _Space(NamedTuple):
    """What the latents of a cache are; `text_width` is None where it has no text."""

    fingerprint: str
    num_frames: int
    channels: int
    text_width: int | None


def latents(subject: Subject) -> Iterator[Finding]:
    """Kind of the data, the latents' own facts against the config, and the embedder that shows what is generated."""
    wanted = dict.fromkeys(url for config in subject.configs for url in _urls(config) if not subject.will_be_there(url))
    manifests = dict(zip(wanted, side_by_side(_manifest, wanted), strict=True))
    yield from by_run(subject.configs, lambda config: _of(config, manifests, subject))


def _urls(config: AnyRunConfig) -> list[str]:
    validation = config.data.validation_url
    return [*config.data.sources, *([validation] if validation else [])]


def _manifest(url: str) -> dict[str, Any] | None:
    """None where there is none that can be read, which another check tells."""
    try:
        found: object = dataset_manifest(url)
    except (DataError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _of(config: AnyRunConfig, manifests: Mapping[str, Any], subject: Subject) -> Iterator[Finding]:
    found = {url: manifests[url] for url in _urls(config) if manifests.get(url)}
    caches = {url: manifest for url, manifest in found.items() if manifest.get("kind") == _KIND}
    if isinstance(config, RunConfig):
        yield from map(_no_videos, caches)
        return
    yield from (_no_latents(url) for url in found if url not in caches)
    spaces: dict[str, _Space] = {}
    for url, manifest in caches.items():
        try:
            spaces[url] = _space(manifest)
        except (KeyError, TypeError, ValueError) as error:
            told = f"{type(error).__name__}: {error}"
            yield problem(f"{url}: its manifest does not say what the latents are ({told}); {_AGAIN}")
    yield from _one_space(spaces)
    yield from (finding for url, space in spaces.items() for finding in _fits(config, url, space))
    yield from _embedder(config, spaces, subject)


def _no_videos(url: str) -> Finding:
    return problem(
        f"{url} holds latents that `regen preencode` made, not videos; give the dataset of videos, or train a "
        "text-to-video model on it (task: t2v)"
    )


def _no_latents(url: str) -> Finding:
    return problem(f"{url} holds videos, not latents; make a cache of it with `regen preencode`, and give that cache")


def _space(manifest: Mapping[str, Any]) -> _Space:
    options = manifest["options"]
    text_width = int(options["text"]["width"]) if options["text"] else None
    return _Space(str(options["fingerprint"]), int(options["num_frames"]), int(options["channels"]), text_width)


def _one_space(spaces: Mapping[str, _Space]) -> Iterator[Finding]:
    """All caches of a run were made by one encoder in one way."""
    prints: dict[str, str] = {}
    for url, space in spaces.items():
        prints.setdefault(space.fingerprint, url)
    if len(prints) > 1:
        named = ", ".join(f"{url} ({fingerprint[:12]})" for fingerprint, url in prints.items())
        yield problem(
            f"these caches were not made alike, as their fingerprints tell: {named}; their latents do not mean the "
            "same: make them with one config of `regen preencode`, or leave one out"
        )


def _fits(config: T2VConfig, url: str, space: _Space) -> Iterator[Finding]:
    """What the model takes is what the cache has."""
    model = config.model
    if model.latent_channels != space.channels:
        yield problem(
            f"model.latent_channels is {model.latent_channels}, the latents in {url} have {space.channels} channels; "
            f"set model.latent_channels={space.channels}"
        )
    if space.text_width is None:
        yield problem(f"{url} holds no text embeddings; run `regen preencode` with a text encoder, into a new cache")
    elif model.text_width != space.text_width:
        yield problem(
            f"model.text_width is {model.text_width}, the text embeddings in {url} have a width of {space.text_width}; "
            f"set model.text_width={space.text_width}"
        )


def _embedder(config: T2VConfig, spaces: Mapping[str, _Space], subject: Subject) -> Iterator[Finding]:
    """The embedder that decodes what is generated at validations is there, and of the caches' kind."""
    embedder = config.generation.embedder
    if embedder is None or subject.will_be_there(embedder):
        return
    found = _latents_of(Path(embedder))
    if found is None:
        yield problem(
            f"generation.embedder: {embedder} is neither a run nor an exported model (no {_CONFIG} of an embedder in "
            "it); correct the path, or set generation.embedder=null to generate nothing while training"
        )
        return
    for url, space in spaces.items():
        if found != (space.num_frames, space.channels):
            yield problem(
                f"generation.embedder: {embedder} has clips of {found[0]} frames and {found[1]} channels, the latents "
                f"in {url} are of {space.num_frames} frames and {space.channels} channels; give the embedder that made "
                "them"
            )


def _latents_of(folder: Path) -> tuple[int, int] | None:
    """Frames of a clip and channels, by the config of a run or of an exported model; None where neither is there."""
    try:
        model: Any = read_yaml(folder / _CONFIG)[0]["model"]
        return int(model["temporal_compression"]) + 1, int(model["latent"]["channels"])
    except (ConfigError, KeyError, TypeError, ValueError):
        return None

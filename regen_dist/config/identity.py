"""What decides which samples a step sees: a run goes on only while it stays the same. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from regen_dist.config.schema import DataConfig
from regen_dist.config.t2v import LatentDataConfig


def order_identity(
    config: DataConfig, fingerprints: Sequence[str], *, num_frames: int, batch_global: int, seed: int
) -> dict[str, str]:
    """While this is the same, a step alone says which clips it sees. Told in the words of the config.

    Args:
        config: of the data.
        fingerprints: of its datasets, in the order of `config.sources`.
        num_frames: frames of a clip (k + 1).
        batch_global: samples of one optimizer step.
        seed: of the order.
    """
    facts = {
        "dataset fingerprint": fingerprints,
        "data.mixture weights": config.weights,
        "data sizes": config.sizes,
        "frames of a clip": num_frames,
        "data.image_fraction": config.image_fraction,
        "data.short_side": config.short_side,
        "data.stride": config.stride,
        "data.flip": config.flip,
        "train.batch_global": batch_global,
        "train.seed": seed,
    }
    return _told(facts)


def latent_identity(
    config: LatentDataConfig, fingerprints: Sequence[str], *, batch_global: int, seed: int
) -> dict[str, str]:
    """The same for rows of cached latents: while this is the same, a step alone says which rows and texts it sees.

    Args:
        config: of the data.
        fingerprints: of its caches, in the order of `config.sources`.
        batch_global: samples of one optimizer step.
        seed: of the order.
    """
    facts = {
        "dataset fingerprint": fingerprints,
        "data.mixture weights": config.weights,
        "data.clips": config.clips,
        "data.image_fraction": config.image_fraction,
        "data.text_dropout": config.text_dropout,
        "train.batch_global": batch_global,
        "train.seed": seed,
    }
    return _told(facts)


def order_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two identities, in words; empty when nothing does."""
    names = [*now, *(name for name in before if name not in now)]
    return [
        f"{name} was {before.get(name, 'not told')}, is {now.get(name, 'not told')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _told(facts: Mapping[str, object]) -> dict[str, str]:
    return {name: str(_plain(value)) for name, value in facts.items()}


def _plain(value: object) -> object:
    """Tuples as lists, so that what was saved as JSON compares equal."""
    return [_plain(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value

"""Latent caches of random numbers, quickly made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regen_dist.data.format.index import SampleFacts
from regen_dist.data.format.latents import LATENT_EXTENSION, NULL_TEXT, pack_latents, pack_null_text
from regen_dist.data.format.manifest import write_manifest
from regen_dist.data.format.writing import NewSample, ShardLimits, ShardWriter, index_name
from regen_dist.data.storage.store import Store
from regen_dist.inference.latent_space import LatentSpread, LatentStatistics
from regen_dist.models.encoder import Latents

_COLOURS = ("red", "green", "blue", "yellow")
_STEM = "latents-000000"


def write_cache(
    folder: Path,
    *,
    videos: int = 8,
    clips: int | Sequence[int] = 1,
    size: tuple[int, int] | Sequence[tuple[int, int]] = (32, 32),
    k: int = 4,
    channels: int = 8,
    text_width: int | None = 16,
    seed: int = 0,
    fingerprint: str = "test",
) -> Path:
    """A cache of `videos` entries in shards of four.

    Args:
        folder: where to.
        clips: of each video, 0 for an image; several are taken in turns.
        size: height and width in pixels; several are taken in turns.
        k: temporal compression.
        text_width: None for a cache without text.
        seed: of the latents and texts.
        fingerprint: of the latent space.
    """
    store, generator = Store(folder), torch.Generator().manual_seed(seed)
    counts = list(islice(cycle([clips] if isinstance(clips, int) else clips), videos))
    sizes = list(islice(cycle([size] if isinstance(size[0], int) else size), videos))
    spreads: dict[str, LatentSpread] = {}
    with ShardWriter(store, _STEM, ShardLimits(samples=4)) as writer:
        for number, (n, (height, width)) in enumerate(zip(counts, sizes, strict=True)):  # type: ignore[misc]
            content, motion = _latents(generator, n, channels, height // 8, width // 8)
            _count(spreads, content, motion)
            text = None if text_width is None else _normal(generator, 2 + number % 3, text_width)
            described = SampleFacts(
                max(1, n * (k + 1)), height, width, 8.0, f"video-{number}.mp4", f"a {_COLOURS[number % 4]} square"
            )
            data = pack_latents(content, motion, text, {"frames_left_out": "0"})
            writer.add(NewSample(f"seed{seed}-{number:06d}", data, described, LATENT_EXTENSION))
    if text_width is not None:
        store.put(NULL_TEXT, pack_null_text(_normal(generator, 1, text_width)))
    options = _options(spreads, k, channels, text_width, fingerprint)
    write_manifest(store, [index_name(_STEM, number) for number in range(writer.shards)], "latents", options)
    return folder


def _options(
    spreads: dict[str, LatentSpread], k: int, channels: int, text_width: int | None, fingerprint: str
) -> dict[str, Any]:
    statistics = LatentStatistics(spreads.get("clips"), spreads.get("images"), {"dataset": "random numbers"})
    return {
        "fingerprint": fingerprint,
        "encoder": {"kind": "random", "temporal_compression": k},
        "preprocessing": {"stride": 1},
        "text": None if text_width is None else {"encoder": "random", "fingerprint": "random", "width": text_width},
        "num_frames": k + 1,
        "channels": channels,
        "fps": 8.0,
        "statistics": json.loads(statistics.to_text()),
        "null_text": None if text_width is None else NULL_TEXT,
    }


def _latents(generator: torch.Generator, n: int, channels: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Each channel has a mean and a spread of its own."""
    scale = torch.linspace(0.5, 1.5, channels)[:, None, None]
    content, motion = _normal(generator, max(1, n), channels, h, w), _normal(generator, n, channels, h, w)
    return (content * scale + 0.25).bfloat16(), (motion * scale / 2 - 0.25).bfloat16()


def _count(spreads: dict[str, LatentSpread], content: Tensor, motion: Tensor) -> None:
    """Clips, and the first of each as an image."""
    found = {"images": LatentSpread.of(Latents(content[:1], motion[:0]), images=True)}
    if len(motion):
        found["clips"] = LatentSpread.of(Latents(content, motion))
    for name, spread in found.items():
        spreads[name] = spreads[name] + spread if name in spreads else spread


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)

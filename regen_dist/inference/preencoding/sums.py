"""What is counted over the entries of a cache: statistics of its latents, and frames that are in no clip.

Each shard has its own sums, which are added in the order of the shards, so that the numbers are the same, bit for bit,
however many tasks shared the work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from regen_dist.data.dataset.manifest import to_json
from regen_dist.data.objects.store import Store
from regen_dist.errors import DataError
from regen_dist.inference.statistics import LatentSpread
from regen_dist.models.encoder import Latents

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Sums:
    """Of some entries. `images` is of what training takes as images: the first content latent of every entry."""

    clips: LatentSpread | None = None
    images: LatentSpread | None = None
    frames_left_out: int = 0

    @classmethod
    def of(cls, latents: Latents, left_out: int) -> Sums:
        """Of one entry, as it is stored: latents [n, C, h, w], the motion of an image [0, C, h, w]."""
        first = Latents(latents.content[:1], latents.motion[:0])
        clips = LatentSpread.of(latents) if len(latents.motion) else None
        return cls(clips, LatentSpread.of(first, images=True), left_out)

    def __add__(self, other: Sums) -> Sums:
        left_out = self.frames_left_out + other.frames_left_out
        return Sums(_added(self.clips, other.clips), _added(self.images, other.images), left_out)

    def to_bytes(self) -> bytes:
        """JSON; equal numbers give equal bytes."""
        spreads = {"clips": self.clips, "images": self.images}
        found: dict[str, Any] = {name: spread and spread.to_json() for name, spread in spreads.items()}
        return to_json({"format": _FORMAT, "frames_left_out": self.frames_left_out, **found})


def sums_name(stem: str) -> str:
    """Name of the sums of a shard."""
    return f"{stem}.statistics.json"


def read_sums(store: Store, stem: str, data: bytes) -> Sums:
    """What `Sums.to_bytes` gave.

    Raises:
        DataError: it is damaged.
    """
    try:
        found = json.loads(data)
        if found["format"] != _FORMAT:
            raise ValueError(f"it has format {found['format']}, this version reads {_FORMAT}")
        clips, images = (found[name] and LatentSpread.from_json(found[name]) for name in ("clips", "images"))
        return Sums(clips, images, int(found["frames_left_out"]))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{store.url}/{sums_name(stem)}: damaged ({type(error).__name__}: {error}); remove it, and run the same "
            "again"
        ) from error


def _added(one: LatentSpread | None, other: LatentSpread | None) -> LatentSpread | None:
    if one is None or other is None:
        return one or other
    return one + other

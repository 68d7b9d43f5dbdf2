"""What a build was asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from regen_dist.data.dataset.index import SCHEMA_VERSION
from regen_dist.data.dataset.manifest import Kind
from regen_dist.data.dataset.writing import Limits
from regen_dist.data.making.sources import Sources
from regen_dist.data.video.conversion import LeftOut
from regen_dist.data.video.scenes import CUT, FROZEN
from regen_dist.data.video.transcode import PRESET, X264_PARAMS, EncodeOptions
from regen_dist.errors import DataError

KIND: Kind = "build"
LARGEST_SIDE = 4320  # of a sample, the shorter one: 8K video


@dataclass(frozen=True)
class BuildOptions:
    """Options of `regen shards build`: all that decides about the dataset's bytes beside its sources.

    Times in seconds, sides in pixels. `keep` stores whole files as they are. `scenes` cuts at scene changes and
    measures motion; without it `min_motion` has no say.
    `hdr` ("tone-map" or "leave-out") is of sources of high dynamic range or wide primaries, `interlaced` ("deinterlace"
    or "leave-out") of those with fields. `shard_mb` (10^6 bytes) and `samples_per_shard` close a shard,
    `part_gb` (10^9 bytes of sources) is what is planned and made at a time. None: no limit.
    """

    segment_seconds: float = 4.0
    short_side: int | None = 128
    crf: int = 18
    keep: bool = False
    scenes: bool = True
    scene_threshold: float = CUT
    min_motion: float = FROZEN
    min_frames: int = 33
    min_side: int | None = None
    max_aspect: float | None = None
    hdr: str = "tone-map"
    interlaced: str = "deinterlace"
    start_seconds: float = 0.0
    max_seconds: float | None = None
    shard_mb: float = 256.0
    samples_per_shard: int | None = None
    part_gb: float = 4.0

    def __post_init__(self) -> None:
        names = ("segment_seconds", "samples_per_shard", "min_frames", "scene_threshold", "min_side", "max_seconds")
        values = {name: getattr(self, name) for name in (*names, "shard_mb", "part_gb")}
        given = {name: value for name, value in values.items() if value is not None}
        wrong = [f"{_flag(name)} {value}: must be above 0" for name, value in given.items() if value <= 0]
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        wrong += [f"{_flag(name)} {value}: must be finite" for name, value in numbers.items() if not isfinite(value)]
        if self.short_side is not None and self.short_side < 16:
            wrong.append(f"--short-side {self.short_side}: must be at least 16")
        if not 0 <= self.crf <= 51:
            wrong.append(f"--crf {self.crf}: must be 0 (best) to 51")
        if self.max_aspect is not None and self.max_aspect < 1:
            wrong.append(f"--max-aspect {self.max_aspect}: long side over short side, must be at least 1")
        wrong += [f"{_flag(n)} must not be negative" for n in ("start_seconds", "min_motion") if getattr(self, n) < 0]
        if self.short_side is not None and self.short_side > LARGEST_SIDE:
            wrong.append(f"--short-side {self.short_side}: must be at most {LARGEST_SIDE}")
        try:
            _ = self.sources_left_out
        except DataError as error:
            wrong.append(str(error))
        if wrong:
            raise DataError("; ".join(wrong))

    @property
    def sources_left_out(self) -> LeftOut:
        """Which sources are not converted but left out."""
        return LeftOut.of(self.hdr, self.interlaced)

    @property
    def encode(self) -> EncodeOptions:
        """The part that encoding needs."""
        return EncodeOptions(self.short_side, self.crf, self.keep)

    @property
    def limits(self) -> Limits:
        """When a shard is closed."""
        return Limits(round(self.shard_mb * 1e6), self.samples_per_shard)

    def recorded(self) -> dict[str, Any]:
        """For plan.json and the manifest: these options, and the encoder's that are fixed."""
        encoder = {"codec": "libx264", "preset": PRESET, "x264_params": X264_PARAMS}
        return asdict(self) | ({} if self.keep else encoder)


def identity(sources: Sources, options: BuildOptions) -> dict[str, Any]:
    """By what a later build knows its own folder."""
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "options": options.recorded(),
        "sources": sources.identity(),
    }


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

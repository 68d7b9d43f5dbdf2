"""The arms of the comparison: what was made of the same captions, each read by the same detector.

Real videos say what the detector itself misses, reconstructions what the embedder costs, generated videos what the
generator costs. Captions that were exchanged give the chance level.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from regen_dist.data.making.shapes import Attributes
from regen_dist.evaluation.miniature.clips import ShapeClip
from regen_dist.evaluation.miniature.scores import Confusion, Share, confusions, derangement, score
from regen_dist.evaluation.shape_reading import Reading, read

REAL, RECONSTRUCTED, WRONG_CAPTIONS = "real", "reconstructed", "wrong captions"
_QUALITY = 80  # of WebP


@dataclass(frozen=True)
class Video:
    """A video that was read."""

    name: str
    caption: str
    wanted: Attributes
    reading: Reading

    def to_json(self) -> dict[str, Any]:
        """Its line in scores.json."""
        return {"name": self.name, "caption": self.caption, "read": self.reading._asdict()}


@dataclass
class Arm:
    """Videos of one kind. `facts` say how they were made, `previews` hold data URIs by caption."""

    name: str
    facts: Mapping[str, Any]
    videos: list[Video] = field(default_factory=list)
    previews: dict[str, str] = field(default_factory=dict)

    def add(self, clip: ShapeClip, shown: Collection[str]) -> None:
        """Read a video; keep what it looks like if its caption is one of those that are shown."""
        self.videos.append(Video(clip.name, clip.caption, clip.wanted, read(clip.frames)))
        if clip.caption in shown and clip.caption not in self.previews:
            self.previews[clip.caption] = animation(clip)

    @property
    def scores(self) -> dict[str, Share]:
        """Share that is right, by measure."""
        return score(self._readings, [video.wanted for video in self.videos])

    @property
    def confusions(self) -> dict[str, Confusion]:
        """What was taken for what, by attribute."""
        return confusions(self._readings, [video.wanted for video in self.videos])

    def reading_of(self, caption: str) -> Reading | None:
        """Of the video that is shown for a caption."""
        return next((video.reading for video in self.videos if video.caption == caption), None)

    def to_json(self) -> dict[str, Any]:
        """Its part of scores.json."""
        return {
            "facts": dict(self.facts),
            "scores": {name: share.to_json() for name, share in self.scores.items()},
            "confusions": self.confusions,
            "videos": [video.to_json() for video in self.videos],
        }

    @property
    def _readings(self) -> list[Reading]:
        return [video.reading for video in self.videos]


def read_arm(
    name: str,
    clips: Iterable[ShapeClip],
    facts: Mapping[str, Any],
    shown: Collection[str] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> Arm:
    """Read all videos of an arm.

    Args:
        name: what it is called on the page.
        clips: its videos.
        facts: how they were made.
        shown: captions whose videos are kept for the page.
        progress: called with the number of videos that are read.
    """
    arm = Arm(name, facts)
    for number, clip in enumerate(clips, 1):
        arm.add(clip, shown)
        progress(number)
    return arm


def with_wrong_captions(arm: Arm) -> Arm | None:
    """The same readings against captions that belong to other videos: what one gets right by chance. None where there
    are fewer than two videos."""
    if len(arm.videos) < 2:
        return None
    order = derangement(len(arm.videos))
    videos = [
        Video(video.name, arm.videos[other].caption, arm.videos[other].wanted, video.reading)
        for video, other in zip(arm.videos, order, strict=True)
    ]
    return Arm(WRONG_CAPTIONS, {"videos": arm.name, "captions": "exchanged among them, none keeps its own"}, videos)


def animation(clip: ShapeClip) -> str:
    """A video as an animated WebP in a data URI: it plays in every browser, from a page alone."""
    first, *others = [Image.fromarray(frame) for frame in clip.frames]
    buffer = io.BytesIO()
    milliseconds = max(1, round(1000 / clip.fps))
    first.save(
        buffer, "WEBP", save_all=True, append_images=others, duration=milliseconds, loop=0, quality=_QUALITY, method=4
    )
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"

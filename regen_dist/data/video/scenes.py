"""Shot detection and motion of a video, by PySceneDetect's ContentDetector.

Its measure of change between two frames is the mean difference of hue, saturation and brightness (0 to 255), taken
here from pictures of at most 128 pixels a side. What the defaults rest on, measured on 36 shots of Big Buck Bunny's
first minutes, cyclists in a film, and a video call:

- a shot's mean change is 0.1 to 9, half of the shots lie between 0.9 and 3.8; hard cuts are 35 to 72, the largest
  other change is 26;
- a still picture, encoded with crf 18 to 32, has a mean of 0.003 to 0.23, which overlaps: encoders refresh the
  picture at every keyframe, a pulse of up to 5. Its 90 % quantile, which such rare pulses do not reach, is 0.005 to
  0.16, that of the shots 0.16 and 0.23 (an animal that only breathes; one far away), then 0.8 and more. A picture that
  creeps by one pixel in eight frames has 0.57. Hence `is_frozen` looks at that quantile.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from regen_dist.data.video.conversion import RESIZE

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Float32s = npt.NDArray[np.float32]

CUT = 27.0  # change from which on it is another shot: PySceneDetect's own default
MIN_SCENE_FRAMES = 15
FROZEN = 0.15  # 90 % of the changes of a shot in which nothing moves are below this
_QUANTILE = 0.9
_LONG_SIDE = 128
_RATE = 1.0  # the detector is asked about frames, never about seconds, so any rate serves


class Analysis(NamedTuple):
    """`cuts`: numbers of the frames that begin another shot, increasing, never 0. `change` float32 [num_frames]: how
    much each frame differs from the one before it, 0 for the first."""

    cuts: tuple[int, ...]
    change: Float32s


def analyse(
    frames: Iterable[VideoFrame], *, threshold: float = CUT, min_scene_frames: int = MIN_SCENE_FRAMES
) -> Analysis:
    """Cuts and changes of consecutive frames, in one pass.

    Keeps two small pictures and four bytes a frame, however long the video is.

    Args:
        threshold: the least change that is a cut.
        min_scene_frames: cuts nearer than this to one another (or to the start) are merged by the detector;
            `missed_cut` finds what it left out.

    Raises:
        DataError: a frame cannot be decoded.
    """
    module, manager = _scenedetect()
    detector = module.ContentDetector(threshold=threshold, min_scene_len=min_scene_frames)
    detector.stats_manager = scores = manager()
    cuts: set[int] = set()
    time = module.FrameTimecode(0, fps=_RATE)
    for number, picture in enumerate(_small(frames)):
        time = module.FrameTimecode(number, fps=_RATE)
        cuts.update(cut.frame_num for cut in detector.process_frame(time, picture))
        scores.fill(number + 1)
    cuts.update(cut.frame_num for cut in detector.post_process(time))
    return Analysis(tuple(sorted(cuts)), np.array(scores.change, dtype=np.float32))


def shots(cuts: Sequence[int], first: int, stop: int) -> list[tuple[int, int]]:
    """Frames [first, stop) parted at the cuts inside: (start, stop) of each, in order."""
    edges = [first, *(cut for cut in cuts if first < cut < stop), stop]
    return [(start, end) for start, end in pairwise(edges) if start < end]


def motion(change: Float32s, start: int, stop: int) -> float:
    """Mean change over frames [start, stop), without the step into the first; 0 for a single frame."""
    inside = change[start + 1 : stop]
    return float(inside.mean(dtype=np.float64)) if len(inside) else 0.0


def is_frozen(change: Float32s, start: int, stop: int, level: float = FROZEN) -> bool:
    """Return true if (nearly) nothing moves in frames [start, stop): nine of ten changes are below `level`.

    Not the mean, which an encoder's keyframes raise. Cartoons whose pictures stand for two or three frames move.
    """
    inside = change[start + 1 : stop]
    return not len(inside) or bool(np.quantile(inside, _QUANTILE) < level)


def missed_cut(change: Float32s, start: int, stop: int, threshold: float = CUT) -> bool:
    """Return true if frames [start, stop) hold a change that is as large as a cut: one that the detector merged with a
    neighbour nearer than its shortest scene, or left out at the start or the end."""
    return bool((change[start + 1 : stop] >= threshold).any())


def _small(frames: Iterable[VideoFrame]) -> Iterator[npt.NDArray[np.uint8]]:
    """Blue, green, red [height, width, 3] at the size that the first frame's longer side asks for."""
    from av.video.reformatter import VideoReformatter

    reformatter, size = VideoReformatter(), None
    for frame in frames:
        if size is None:
            scale = min(1.0, _LONG_SIDE / max(frame.width, frame.height))
            size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        small = reformatter.reformat(frame, *size, "bgr24", interpolation=RESIZE, threads=1)
        yield np.asarray(small.to_ndarray(), dtype=np.uint8)


@functools.cache
def _scenedetect() -> tuple[Any, Any]:
    """PySceneDetect, and a keeper of its scores that holds one number a frame. Imported late: it takes a second."""
    import cv2
    import scenedetect

    cv2.setNumThreads(1)  # the cores are shared out by process

    class Scores(scenedetect.StatsManager):  # type: ignore[misc]  # the package has no types
        """Instead of a table of dictionaries with five metrics a frame."""

        def __init__(self) -> None:
            super().__init__()
            self.change = array("f")

        def set_metrics(self, timecode: Any, metrics: dict[str, float]) -> None:
            self.change.append(metrics[scenedetect.ContentDetector.FRAME_SCORE_KEY])

        def fill(self, frames: int) -> None:
            """The first frame has no score."""
            while len(self.change) < frames:
                self.change.append(0.0)

    return scenedetect, Scores

"""Which of a file's video streams is its video: the choice of ffmpeg's command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from av.stream import Disposition

from regen_dist.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_DEFAULT_PIXELS = 5_000_000  # ffmpeg counts the mark "default" as so many pixels


def choose_video(container: InputContainer) -> VideoStream:
    """The stream with the most pixels, where one that is marked as default counts for five million more; the first of
    equals. Attached pictures (cover art, thumbnails) are no video.

    Raises:
        DataError: there is no such stream, or no decoder for any.
    """
    streams = container.streams.video
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    videos = [stream for stream in streams if not stream.disposition & pictures]
    if not videos:
        what = f", only {len(streams)} attached pictures (cover art)" if streams else ""
        raise DataError(f"it has no video stream{what}")
    decodable = [stream for stream in videos if stream.codec_context is not None]  # so PyAV says it, against its types
    if not decodable:
        raise DataError("there is no decoder for its video")
    return max(decodable, key=_score)  # the first of equals


def _score(stream: VideoStream) -> int:
    pixels = stream.codec_context.width * stream.codec_context.height
    return pixels + _DEFAULT_PIXELS * bool(stream.disposition & Disposition.default)

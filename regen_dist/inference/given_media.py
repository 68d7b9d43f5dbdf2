"""Image that generated videos begin with, or video that they continue: read, fitted to their size, encoded.

An image or a video of another size is scaled, keeping its proportions, until it covers the generated size; what lies
outside is cut off equally on both sides.

Legend: n clips in a row, L = k + 1 frames of a clip, C channels, h x w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from regen_dist.data.storage.local import file_sha256
from regen_dist.data.video.conversion import fit_geometry, picture_to_rgb
from regen_dist.diffusion.samplers import GivenFrames
from regen_dist.errors import DataError
from regen_dist.inference.codec import Codec
from regen_dist.inference.frames import Frame, SourceVideo, num_frames_at
from regen_dist.inference.latent_space import LatentScale
from regen_dist.models.encoder import Latents
from regen_dist.pixels import to_video

_TEXTS = {".txt", ".json"}  # beside media: captions and settings
_PART = 16  # frames passed on at a time


@dataclass(frozen=True, eq=False)
class GivenImage:
    """A picture, uint8 [H, W, 3], that becomes the first frame."""

    path: Path
    frame: Frame
    clips = 0  # clips that are given as a whole

    def encoded(self, codec: Codec) -> Latents:
        """Content latent of the image, [1, C, h, w], and no motion."""
        found = codec.encode(to_video([self.frame])[None])
        return Latents(found.content, found.content[:0])

    def before(self, fps: float) -> Iterator[list[Frame]]:
        """Frames before the generated ones: none."""
        return iter(())

    def facts(self) -> dict[str, Any]:
        return {"kind": "image", "sha256": self._digest}

    @cached_property
    def _digest(self) -> str:
        return file_sha256(self.path)


@dataclass(frozen=True, eq=False)
class GivenVideo:
    """A video whose last `clips` clips of `length` frames, at `fps` frames a second, are given. They end with the
    video's last frame."""

    source: SourceVideo
    size: tuple[int, int]
    clips: int
    length: int
    fps: float

    @property
    def path(self) -> Path:
        return self.source.path

    def encoded(self, codec: Codec) -> Latents:
        """Content and motion latents of the clips, [clips, C, h, w] each."""
        frames = [frame for part in self._frames(self.fps, self.clips * self.length) for frame in part]
        clips = to_video(frames).unflatten(1, (self.clips, self.length)).movedim(1, 0)  # [clips, 3, L, H, W]
        parts = [codec.encode(clip[None]) for clip in clips]
        return Latents(torch.cat([part.content for part in parts]), torch.cat([part.motion for part in parts]))

    def before(self, fps: float) -> Iterator[list[Frame]]:
        """Frames of the whole video at another rate, ending with its last frame."""
        return self._frames(fps, num_frames_at(self.source.timestamps, fps))

    def facts(self) -> dict[str, Any]:
        return {"kind": "video", "sha256": self._digest, "clips": self.clips}

    @cached_property
    def _digest(self) -> str:
        return file_sha256(self.path)

    def _frames(self, fps: float, count: int) -> Iterator[list[Frame]]:
        """The last `count` frames at a rate: for each time the nearest frame."""
        numbers = _nearest(self.source, fps, count)
        part: list[Frame] = []
        for number, frame in enumerate(self.source.frames()):
            times = int(np.count_nonzero(numbers == number))
            part += [fitted(frame, self.size)] * times if times else []
            if len(part) >= _PART:
                yield part
                part = []
        if part:
            yield part


GivenMedia = GivenImage | GivenVideo


def read_image(path: Path, size: tuple[int, int]) -> GivenImage:
    """Read an image file (`picture_to_rgb`), fitted to (height, width).

    Raises:
        DataError: the file is missing, or is not a readable image.
    """
    from PIL import Image

    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise DataError(f"no image at {path}: {found}; give a PNG or JPEG file, or a folder of them")
    try:
        with Image.open(path) as image:
            return GivenImage(path, fitted(picture_to_rgb(image), size))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} is not an image that can be read ({error}); give a PNG, JPEG or WebP file. A video is continued "
            "with --continue"
        ) from error


def read_images(folder: Path, size: tuple[int, int]) -> dict[int, GivenImage]:
    """Read the images in a folder that are named by prompt number ("00000.png"); each as by `read_image`.

    Raises:
        DataError: there are no such images, or one cannot be read.
    """
    return {number: read_image(path, size) for number, path in _numbered(folder, "image", "00000.png").items()}


def read_video(path: Path, size: tuple[int, int], *, most_clips: int, length: int, fps: float) -> GivenVideo:
    """Read the end of a video file, fitted to (height, width).

    Args:
        path: the file.
        size: (height, width) of the frames.
        most_clips: upper bound on the clips that are given; fewer where the video is shorter.
        length, fps: frames of a clip, and frames a second.

    Raises:
        DataError: there is no such file, it is not a video that can be read, or it is shorter than a clip.
    """
    source = SourceVideo(path)
    count = num_frames_at(source.timestamps, fps)
    if count < length:
        raise DataError(
            f"{path} has {count} frame{'s' * (count != 1)} at the {fps:g} a second that the model was trained on; "
            f"continuing takes a clip of {length} at least. Give a longer video, or an image with --image"
        )
    return GivenVideo(source, size, min(most_clips, count // length), length, fps)


def read_videos(
    folder: Path, size: tuple[int, int], *, most_clips: int, length: int, fps: float
) -> dict[int, GivenVideo]:
    """Read the videos in a folder that are named by prompt number ("00000.mp4"); each as by `read_video`. All give as
    many clips as the shortest, because rows are sampled together.

    Raises:
        DataError: there are no such videos, or one cannot be read.
    """
    found = {
        number: read_video(path, size, most_clips=most_clips, length=length, fps=fps)
        for number, path in _numbered(folder, "video", "00000.mp4").items()
    }
    fewest = min(video.clips for video in found.values())
    return {number: replace(video, clips=fewest) for number, video in found.items()}


def _numbered(folder: Path, kind: str, example: str) -> dict[int, Path]:
    """Files of a folder by the prompt number that is their name; DataError where there are none."""
    named = [path for path in sorted(folder.iterdir()) if path.stem.isdecimal() and path.is_file()]
    found: dict[int, Path] = {}
    for path in named:
        if path.suffix.lower() in _TEXTS:
            continue
        if (other := found.setdefault(int(path.stem), path)) is not path:
            raise DataError(f"{folder} has two files for prompt {int(path.stem)}: {other.name}, {path.name}; keep one")
    if not found:
        article = "an image" if kind == "image" else "a video"
        raise DataError(f"{folder} holds no {kind} named by a prompt's number, as {example}; or give {article} file")
    return found


def clips_given(media: GivenMedia | Mapping[int, GivenMedia] | None) -> int:
    """Number of whole clips that are given to a prompt: the same for all."""
    one = _any(media)
    return 0 if one is None else one.clips


def _any(media: GivenMedia | Mapping[int, GivenMedia] | None) -> GivenMedia | None:
    return next(iter(media.values()), None) if isinstance(media, Mapping) else media


def given_row(media: GivenMedia, codec: Codec, scale: LatentScale, clips: int) -> GivenFrames:
    """Return the known latent frames of one row of `clips` clips, normalised as in training."""
    known = media.encoded(codec)
    content, motion = (torch.zeros(1, clips, *known.content.shape[1:], device=codec.device) for _ in range(2))
    content[0, : len(known.content)], motion[0, : len(known.motion)] = known.content, known.motion
    frames = scale.normalise(content, motion).frames
    count = len(known.content) + len(known.motion)
    return GivenFrames(frames, (torch.arange(2 * clips, device=codec.device) < count)[None])


def fitted(frame: Frame, size: tuple[int, int]) -> Frame:
    """Scale a picture until it covers (height, width), and crop its centre."""
    from PIL import Image

    if frame.shape[:2] == size:
        return frame
    scale = max(size[0] / frame.shape[0], size[1] / frame.shape[1])
    short_side = max(1, round(scale * min(frame.shape[:2])))
    place = fit_geometry(frame.shape[0], frame.shape[1], size, short_side)
    scaled = np.asarray(Image.fromarray(frame).resize((place.width, place.height), Image.Resampling.LANCZOS))
    return np.ascontiguousarray(scaled[place.top : place.top + size[0], place.left : place.left + size[1]])


def _nearest(source: SourceVideo, fps: float, count: int) -> npt.NDArray[np.int64]:
    """Numbers of the frames nearest to `count` times that end with the last frame's time."""
    stamps = source.timestamps
    times = stamps[-1] - np.arange(count - 1, -1, -1) / fps
    after = np.clip(np.searchsorted(stamps, times), 1, max(1, len(stamps) - 1))
    if len(stamps) == 1:
        return np.zeros(count, dtype=np.int64)
    is_nearer = np.abs(stamps[after - 1] - times) <= np.abs(stamps[after] - times)
    numbers: npt.NDArray[np.int64] = np.where(is_nearer, after - 1, after)
    return numbers


def notes(
    media: GivenMedia | Mapping[int, GivenMedia] | None,
    given_content: float,
    given_clips: float,
    clips: int,
    longest: int,
) -> list[str]:
    """Notes on requests that the model was not trained for.

    Args:
        media: the given image or video.
        given_content, given_clips: shares of given content and of given clips in training.
        clips: clips in a sampled row; 0 for images.
        longest: clips in the longest row of training.
    """
    found, one = [], _any(media)
    if isinstance(one, GivenImage) and not given_content:
        found.append("this model was not trained with given images (diffusion.given_content is 0)")
    if isinstance(one, GivenVideo) and not given_clips:
        found.append("this model was not trained to continue clips (diffusion.given_clips is 0)")
    if clips > longest:
        found.append(f"rows of {clips} clips are sampled, the model was trained on {longest} at most")
    return found

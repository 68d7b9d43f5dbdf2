"""Encoding of clips of one size in batches; the videos are returned in the order of the input.

Legend: n clips of a video, T frames, H x W pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Full, Queue
from threading import Event
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from regen_dist import __version__
from regen_dist.config.preencode import PreencodeConfig
from regen_dist.config.t2v import SIDE_MULTIPLE
from regen_dist.data.format.catalogue import Dataset, open_dataset
from regen_dist.data.format.index import SCHEMA_VERSION, Sample, read_index
from regen_dist.data.format.manifest import Kind, described, only_videos, read_all
from regen_dist.data.loading.clip_loader import clip_geometry
from regen_dist.data.loading.datasets import best_size
from regen_dist.data.loading.fetch import FetchResult
from regen_dist.data.order.order import Bucket
from regen_dist.data.storage.connection import limits_of
from regen_dist.data.video.conversion import Geometry, UInt8s, frame_to_planes
from regen_dist.data.video.reader import VideoReader
from regen_dist.data.video.timing import clip_frames
from regen_dist.errors import DataError
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.jsontext import json_text
from regen_dist.models.encoder import Latents
from regen_dist.models.text import TextEncoder
from regen_dist.pixels import to_float

# Identity of a cache: everything that decides its latents and text embeddings, and a fingerprint of it.

KIND: Kind = "latents"
ENCODING_VERSION = 1  # raise it when the same config, weights and videos would give other bytes
_SPACE = ("encoder", "preprocessing", "text", "code")  # the parts that the fingerprint covers


def cache_identity(
    config: PreencodeConfig, dataset: Dataset, encoder: FrozenEncoder, text: TextEncoder | None
) -> dict[str, Any]:
    """Identity that a cache's folder is claimed with: the parts of the fingerprint, and the encoded videos."""
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "source": source_identity(dataset),
        "encoder": {"fingerprint": encoder.fingerprint},
        "preprocessing": _preprocessing(config, encoder),
        "text": None if text is None else _text(text),
        "code": {"version": __version__, "encoding_version": ENCODING_VERSION},
    }


def source_identity(dataset: Dataset) -> dict[str, Any]:
    """Facts about a dataset of videos that a cache depends on: bytes and order of the samples, their captions, the
    other columns of the indices, and the shard of each sample, because entries are made and numbered shard by shard."""
    manifest = dataset.manifest
    return {
        "fingerprint": manifest.fingerprint,
        **described(dataset.store, manifest).model_dump(),
        "shards": manifest.boundaries(),
        "samples": manifest.totals.samples,
    }


def fingerprint_of(identity: dict[str, Any]) -> str:
    """Return 32 hex digits of SHA-256 over everything that decides the latents, except the videos: caches of several
    datasets that were made in the same way can be mixed."""
    parts = json_text({name: identity[name] for name in _SPACE}, sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _preprocessing(config: PreencodeConfig, encoder: FrozenEncoder) -> dict[str, Any]:
    return {
        "buckets": [list(size) for size in config.buckets],
        "stride": config.stride,
        "max_clips": config.max_clips,
        "num_frames": encoder.num_frames,
        "batch_clips": config.batch_clips,
    }


def _text(text: TextEncoder) -> dict[str, Any]:
    """Facts about the text encoder without its name, which may be a path."""
    facts = text.facts()
    return {name: facts[name] for name in ("fingerprint", "width", "max_tokens")}


# Cutting of videos into clips: the choice of frames, and of a crop.
#
# Clips follow each other from the first frame on, without overlap; the remainder at the end is left out. A video
# that is shorter than a clip becomes an image, its first frame.

Int64s = npt.NDArray[np.int64]


class ClipCut(NamedTuple):
    """A video's clips: `clips` of `length` frames, `stride` frames of the video apart; 0 of length 1 for an image.
    `left_out` counts the frames, `stride` apart, at the end that are in no clip."""

    clips: int
    length: int
    stride: int
    geometry: Geometry
    left_out: int

    @property
    def parts(self) -> int:
        """Number of content latents: that of the clips, or 1 for an image."""
        return max(1, self.clips)

    @property
    def frames(self) -> int:
        return self.parts * self.length

    @property
    def is_image(self) -> bool:
        """True for an image, which has no motion latent."""
        return self.clips == 0


NO_CUT = ClipCut(0, 1, 1, Geometry(0, 0, 0, 0, (0, 0)), 0)  # the cut of a video without clips


def cut_video(sample: Sample, config: PreencodeConfig, num_frames: int) -> ClipCut:
    """Cut a video into clips.

    Raises:
        DataError: the video is too small for any latent.
    """
    clips = int(count_clips(np.array([sample.frames], np.int64), config, num_frames)[0])
    length = num_frames if clips else 1
    size = _size(sample, config)
    geometry = clip_geometry(sample.height, sample.width, Bucket(*size, length), "fit" if config.buckets else None)
    taken = -(-sample.frames // config.stride)
    return ClipCut(clips, length, config.stride, geometry, taken - max(1, clips) * length)


def count_clips(frames: Int64s, config: PreencodeConfig, num_frames: int) -> Int64s:
    """Number of whole clips in videos with these frame counts [n]; 0 for videos that become images."""
    clips: Int64s = -(-frames // config.stride) // num_frames
    return clips if config.max_clips is None else np.minimum(clips, config.max_clips)


def _size(sample: Sample, config: PreencodeConfig) -> tuple[int, int]:
    """Crop that suits a video best; without buckets, the largest one that fits the latent grid."""
    if config.buckets:
        height, width = np.array([sample.height], np.int32), np.array([sample.width], np.int32)
        return config.buckets[int(best_size(height, width, config.buckets)[0])]
    rows, columns = (side // SIDE_MULTIPLE * SIDE_MULTIPLE for side in (sample.height, sample.width))
    if not rows or not columns:
        raise DataError(
            f"{sample.height}x{sample.width} is too small: without buckets both sides must be at least {SIDE_MULTIPLE}"
        )
    return rows, columns


_BATCHES_HELD = 4  # batches of pixels held over all sizes; without buckets there may be as many sizes as videos


@dataclass
class Pending:
    """A video whose latents may be incomplete: [1, C, h, w] in bf16 by clip number; `problem` is the reason why it will
    have none."""

    sample: Sample
    cut: ClipCut
    done: dict[int, Latents] = field(default_factory=dict)
    problem: str | None = None

    @property
    def is_complete(self) -> bool:
        """True once no latent is missing."""
        return self.problem is not None or len(self.done) == self.cut.parts

    def latents(self) -> Latents:
        """Content latents [n, C, h, w] and motion latents of the same shape, [0, C, h, w] for an image."""
        parts = [self.done[number] for number in range(self.cut.parts)]
        content, motion = (torch.cat(latents) for latents in zip(*parts, strict=True))
        return Latents(content, motion[:0] if self.cut.is_image else motion)


def encode_pixels(encoder: FrozenEncoder, clips: list[UInt8s]) -> Latents:
    """Encode clips uint8 [3, T, H, W] of one size to latents in their stored form: bf16, on the CPU.

    Convolutions use deterministic kernels.
    """
    video = torch.from_numpy(np.stack(clips)).to(encoder.device)  # B 3 T H W
    tf32 = torch.backends.cudnn.allow_tf32
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32):
        latents = encoder.encode(to_float(video))
    return Latents(*(part.to("cpu", torch.bfloat16) for part in latents))


class Batches:
    """Batches of clips. The content of a batch depends only on the preceding clips, in order.

    Args:
        encoder: the encoder of the clips.
        size: clips of a batch.
        videos: videos that the clips belong to, in the order in which they are returned.
    """

    def __init__(self, encoder: FrozenEncoder, size: int, videos: Sequence[Pending]) -> None:
        self._encoder, self._size, self._videos = encoder, size, deque(videos)
        self._waiting: dict[tuple[int, ...], list[tuple[Pending, int, UInt8s]]] = {}

    def add(self, video: Pending, number: int, clip: UInt8s) -> None:
        """Add a clip of a video, uint8 [3, T, H, W]; encode when a batch is full, or when too much is held."""
        key = clip.shape
        self._waiting.setdefault(key, []).append((video, number, clip))
        if len(self._waiting[key]) == self._size:
            self._encode(key)
        elif sum(map(len, self._waiting.values())) >= _BATCHES_HELD * self._size:
            self._encode(max(self._waiting, key=lambda each: len(self._waiting[each])))

    def finish(self) -> None:
        for key in list(self._waiting):
            self._encode(key)

    def complete(self) -> Iterator[Pending]:
        """Take the complete videos at the front, up to the first incomplete one."""
        while self._videos and self._videos[0].is_complete:
            yield self._videos.popleft()

    def _encode(self, key: tuple[int, ...]) -> None:
        batch = self._waiting.pop(key)
        latents = encode_pixels(self._encoder, [clip for _, _, clip in batch])
        for place, (video, number, _) in enumerate(batch):
            video.done[number] = Latents(*(part[place : place + 1] for part in latents))


# Clips of many videos, decoded ahead by several threads, in order and with bounded memory.

_MOST_THREADS = 16
_CLIPS_AHEAD = 2  # clips decoded ahead of each video
_LOOK_S = 0.1  # interval at which a thread waiting for room checks whether to end

Item = TypeVar("Item")


class DecodeJob(NamedTuple, Generic[Item]):
    """A video to decode, with its item: its file, its number of frames in the index, and its clips."""

    item: Item
    found: FetchResult
    frames: int
    cut: ClipCut


Message = UInt8s | BaseException | None  # a clip; an error; the end


class Decoders:
    """Decoding threads, one a core by default (the decoder releases the GIL). A context manager: its end stops them,
    even in the middle of a video."""

    def __init__(self, count: int | None = None) -> None:
        self._count, self._stop = count or min(_MOST_THREADS, len(os.sched_getaffinity(0))), Event()
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="decode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def run(self, jobs: Iterable[DecodeJob[Item]]) -> Generator[tuple[Item, Iterator[UInt8s]]]:
        """Yield each video in order with an iterator of its clips, uint8 [3, T, H, W], to use before the next video.

        The iterator raises DataError where the video cannot be read or decoded.
        """
        waiting: deque[tuple[Item, Queue[Message]]] = deque()
        for job in jobs:
            # The first waiting video is always being decoded: threads take videos in order, and all before it are done.
            waiting.append((job.item, self._start(job)))
            if len(waiting) > self._count:
                yield _taken(waiting.popleft())
        while waiting:
            yield _taken(waiting.popleft())

    def _start(self, job: DecodeJob[Item]) -> Queue[Message]:
        clips: Queue[Message] = Queue(_CLIPS_AHEAD)
        self._threads.submit(self._decode, job, clips)
        return clips

    def _decode(self, job: DecodeJob[Item], out: Queue[Message]) -> None:
        end: BaseException | None = None
        try:
            for clip in decode_clips(job.found, job.frames, job.cut):
                self._put(out, clip)
                if self._stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised in the consumer, which would wait forever
            end = error
        self._put(out, end)

    def _put(self, out: Queue[Message], message: Message) -> None:
        while not self._stop.is_set():
            try:
                out.put(message, timeout=_LOOK_S)
            except Full:
                continue
            return


def decode_clips(found: FetchResult, frames: int, cut: ClipCut) -> Iterator[UInt8s]:
    """Decode the clips of a video, uint8 [3, T, H, W] each, in one pass; `frames` is what its index says.

    Raises:
        DataError: the video cannot be read or decoded, or its frames do not match the index.
    """
    if found.problem is not None:
        raise DataError(found.problem)
    with VideoReader(found.data) as reader:
        if len(reader.table.pts) != frames:
            raise DataError(f"it has {len(reader.table.pts)} frames, the index says {frames}; build its shard again")
        numbers = clip_frames(reader.table, 0, cut.stride, cut.frames)
        yield from _clips(reader, numbers, cut)


def _clips(reader: VideoReader, numbers: list[int], cut: ClipCut) -> Iterator[UInt8s]:
    """Cut the frames with these numbers, which may repeat, into clips."""
    from av.video.reformatter import VideoReformatter

    rows, columns = cut.geometry.crop
    top, left = cut.geometry.top, cut.geometry.left
    reformatter, place = VideoReformatter(), 0
    clip = np.empty((3, cut.length, rows, columns), np.uint8)
    for number, frame in reader.frames(numbers):
        planes = frame_to_planes(frame, cut.geometry.height, cut.geometry.width, reformatter)
        while place < len(numbers) and numbers[place] == number:
            for channel, plane in enumerate(planes):
                clip[channel, place % cut.length] = plane[top : top + rows, left : left + columns]
            place += 1
            if place % cut.length == 0:
                yield clip
                clip = np.empty_like(clip)


def _taken(waiting: tuple[Item, Queue[Message]]) -> tuple[Item, Iterator[UInt8s]]:
    return waiting[0], _arriving(waiting[1])


def _arriving(clips: Queue[Message]) -> Iterator[UInt8s]:
    while (message := clips.get()) is not None:
        if isinstance(message, BaseException):
            raise message
        yield message


# Opened inputs of a cache: videos, the embedder's encoder, the text encoder.


class Inputs(NamedTuple):
    """Inputs of a cache, and the identity that follows from them. `text` is None for a cache without text."""

    dataset: Dataset
    encoder: FrozenEncoder
    text: TextEncoder | None
    identity: dict[str, Any]


def open_inputs(config: PreencodeConfig) -> Inputs:
    """Open the inputs that a config names.

    Raises:
        DataError: the videos cannot be read, or none has a caption though text is asked for.
        CheckpointError: the embedder has no usable checkpoint.
        ConfigError: the given embedder is not an embedder; the text encoder cannot be loaded.
    """
    dataset = open_dataset(config.data, config.read.cache, limits_of(config.read))
    only_videos(dataset.manifest, dataset.store.url)
    if config.text is not None:
        _check_captions(dataset)
    encoder = FrozenEncoder.load(config.embedder, config.weights)
    text = None if config.text is None else TextEncoder.load(config.text, encoder.device)
    return Inputs(dataset, encoder, text, cache_identity(config, dataset, encoder, text))


def _check_captions(dataset: Dataset) -> None:
    """Check that captions exist. Single videos may have none: they get the embedding of the empty caption."""
    indices = [entry.index for entry in dataset.manifest.shards]
    if not any(any(read_index(data)[0]["caption"].to_pylist()) for _, data in read_all(dataset.store, indices)):
        raise DataError(
            f"{dataset.store.url}: no video has a caption; build the dataset with captions (`regen shards build "
            "--captions LIST`), or set text=null for a cache without text"
        )

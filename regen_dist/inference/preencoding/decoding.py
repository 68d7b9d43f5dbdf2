"""Clips of many videos, decoded ahead by several threads, in order and with bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Full, Queue
from threading import Event
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from av.video.reformatter import VideoReformatter

from regen_dist.data.reading.fetching import Bytes
from regen_dist.data.video.pixels import UInt8s, frame_to_planes
from regen_dist.data.video.reader import VideoReader, clip_frames
from regen_dist.errors import DataError
from regen_dist.inference.preencoding.cutting import Cut

_MOST_THREADS = 16
_CLIPS_AHEAD = 2  # of each video that is being decoded
_LOOK_S = 0.1  # how soon a thread that waits for room sees that it is to end

Item = TypeVar("Item")


class Job(NamedTuple, Generic[Item]):
    """A video to decode, and whatever belongs to it: its file, its index entry's number of frames, its clips."""

    item: Item
    found: Bytes
    frames: int
    cut: Cut


Message = UInt8s | BaseException | None  # a clip; what went wrong; the end


class Decoders:
    """Threads that decode (what they call lets others run)."""

    def __init__(self, count: int) -> None:
        self._count, self._stop = count, Event()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decode")

    def run(self, jobs: Iterable[Job[Item]]) -> Generator[tuple[Item, Iterator[UInt8s]]]:
        """For each video, in order, its clips: uint8 [3, T, H, W], which are to be taken before the next video.

        Taking them raises DataError where the video cannot be read or decoded.
        """
        waiting: deque[tuple[Item, Queue[Message]]] = deque()
        for job in jobs:
            # The first that waits is always being decoded: threads take videos in order, and all before it are done.
            waiting.append((job.item, self._start(job)))
            if len(waiting) > self._count:
                yield _taken(waiting.popleft())
        while waiting:
            yield _taken(waiting.popleft())

    def stop(self) -> None:
        """End the threads, whatever they are doing."""
        self._stop.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(self, job: Job[Item]) -> Queue[Message]:
        clips: Queue[Message] = Queue(_CLIPS_AHEAD)
        self._threads.submit(self._decode, job, clips)
        return clips

    def _decode(self, job: Job[Item], out: Queue[Message]) -> None:
        end: BaseException | None = None
        try:
            for clip in decode_clips(job.found, job.frames, job.cut):
                self._put(out, clip)
                if self._stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised where the clips are taken; else that waits for ever
            end = error
        self._put(out, end)

    def _put(self, out: Queue[Message], message: Message) -> None:
        while not self._stop.is_set():
            try:
                out.put(message, timeout=_LOOK_S)
            except Full:
                continue
            return


@contextmanager
def decoders(count: int | None = None) -> Iterator[Decoders]:
    """`count` threads, one a core by default."""
    made = Decoders(count or min(_MOST_THREADS, len(os.sched_getaffinity(0))))
    try:
        yield made
    finally:
        made.stop()


def decode_clips(found: Bytes, frames: int, cut: Cut) -> Iterator[UInt8s]:
    """The clips of a video, uint8 [3, T, H, W] each, in one pass.

    Args:
        found: its file.
        frames: how many the index says that it has.
        cut: which clips.

    Raises:
        DataError: it cannot be read or decoded, or has other frames than the index says.
    """
    if found.problem is not None:
        raise DataError(found.problem)
    with VideoReader(found.data) as reader:
        if len(reader.table.pts) != frames:
            raise DataError(f"it has {len(reader.table.pts)} frames, the index says {frames}")
        numbers = clip_frames(reader.table, 0, cut.stride, cut.frames)
        yield from _clips(reader, numbers, cut)


def _clips(reader: VideoReader, numbers: list[int], cut: Cut) -> Iterator[UInt8s]:
    """Cut the frames of these numbers, which may come again, into clips."""
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

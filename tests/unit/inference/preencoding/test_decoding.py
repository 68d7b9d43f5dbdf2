"""Clips decoded ahead by threads: the right frames, in order, within bounds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.format.index import Sample
from regen_dist.data.loading.fetch import Bytes
from regen_dist.data.video.reader import VideoReader, read_clip
from regen_dist.errors import DataError
from regen_dist.inference import preencode_clips
from regen_dist.inference.preencode_clips import ClipCut, DecodeJob, cut_video, decode_clips, decoders
from tests.helpers.video import frame_numbers, moving_square, numbered_frames, write_video


def _config(**changes: Any) -> PreencodeConfig:
    return PreencodeConfig.model_validate({"embedder": "e", "data": "d", "output": "o", "text": None} | changes)


def _sample(frames: int, height: int = 32, width: int = 32, number: int = 0) -> Sample:
    return Sample(f"v{number}", number, "s", "m", 0, 1, "", frames, height, width, 8.0, None, None, "x")


def _video(path: Path, frames: int, seed: int = 0) -> Bytes:
    return Bytes(write_video(path, moving_square(frames, 32, 32, seed=seed)).read_bytes())


def test_clips_hold_the_frames_that_they_should(tmp_path: Path) -> None:
    """Numbered frames: every third one, clip after clip, the same pixels as a clip that is read alone."""
    data = write_video(tmp_path / "v.mp4", numbered_frames(40), crf=8).read_bytes()
    cut = cut_video(_sample(40, 48, 64), _config(stride=3), 5)
    found = list(decode_clips(Bytes(data), 40, cut))
    assert [frame_numbers(clip) for clip in found] == [[0, 3, 6, 9, 12], [15, 18, 21, 24, 27]]
    with VideoReader(data) as reader:
        for first, clip in zip((0, 15), found, strict=True):
            assert np.array_equal(clip, read_clip(reader, range(first, first + 15, 3), cut.geometry))


def test_a_varying_rate_keeps_its_pace(tmp_path: Path) -> None:
    """A frame that is shown for long comes again."""
    ticks = [40 * number + (400 if number > 5 else 0) for number in range(20)]
    data = write_video(tmp_path / "v.mp4", numbered_frames(20), ticks=ticks, crf=8).read_bytes()
    cut = cut_video(_sample(20, 48, 64), _config(), 5)
    numbers = [number for clip in decode_clips(Bytes(data), 20, cut) for number in frame_numbers(clip)]
    assert len(numbers) == 20
    assert numbers == sorted(numbers)
    assert numbers.count(5) > 2


def test_threads_keep_the_order(tmp_path: Path) -> None:
    """Videos of different lengths, more than threads; one that is damaged raises in its own place."""
    lengths = [15, 5, 10, 5, 20, 5, 15]
    found = [_video(tmp_path / f"{n}.mp4", frames, n) for n, frames in enumerate(lengths)]
    found[3] = Bytes(b"", "the bytes differ")
    jobs = [
        DecodeJob(n, found[n], frames, cut_video(_sample(frames), _config(), 5)) for n, frames in enumerate(lengths)
    ]
    seen: list[tuple[int, Any]] = []
    with decoders(3) as threads:
        for number, clips in threads.run(jobs):
            try:
                seen.append((number, [clip.copy() for clip in clips]))
            except DataError as error:
                seen.append((number, str(error)))
    assert [number for number, _ in seen] == list(range(7))
    assert seen.pop(3)[1] == "the bytes differ"
    for number, clips in seen:
        expected = list(decode_clips(found[number], lengths[number], jobs[number].cut))
        assert len(clips) == lengths[number] // 5
        assert all(np.array_equal(*pair) for pair in zip(clips, expected, strict=True))


def test_what_is_decoded_ahead_is_bounded_and_threads_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the clips are never taken."""
    made = threading.Semaphore(0)
    clip = np.zeros((3, 5, 16, 16), np.uint8)

    def endless(found: Bytes, frames: int, cut: ClipCut) -> Iterator[np.ndarray]:
        while True:
            made.release()
            yield clip

    monkeypatch.setattr(preencode_clips, "decode_clips", endless)
    cut = cut_video(_sample(5), _config(), 5)
    before = threading.active_count()
    with decoders(2) as threads:
        run = threads.run(DecodeJob(n, Bytes(b""), 5, cut) for n in range(10))
        _, clips = next(run)
        next(clips)
        for _ in range(2 * 3 + 1):  # each of two threads: two that wait, one in hand; and the one that was taken
            assert made.acquire(timeout=60)
        assert not made.acquire(timeout=0.3)
    assert threading.active_count() <= before


def test_what_else_goes_wrong_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(found: Bytes, frames: int, cut: ClipCut) -> Iterator[np.ndarray]:
        raise ZeroDivisionError
        yield

    monkeypatch.setattr(preencode_clips, "decode_clips", broken)
    with decoders(1) as threads:
        _, clips = next(threads.run([DecodeJob(0, Bytes(b""), 5, cut_video(_sample(5), _config(), 5))]))
        with pytest.raises(ZeroDivisionError):
            list(clips)

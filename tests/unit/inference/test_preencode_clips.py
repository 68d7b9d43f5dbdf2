"""Clips of a shard's videos: cutting, decoding ahead by threads, and batches of one size."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.format.index import Sample
from regen_dist.data.loading.fetch import FetchResult
from regen_dist.data.video.reader import VideoReader, read_clip
from regen_dist.errors import DataError
from regen_dist.inference import preencode_clips
from regen_dist.inference.preencode_clips import Batches, ClipCut, DecodeJob, Decoders, Pending, cut_video, decode_clips
from regen_dist.models.encoder import Latents
from tests.helpers.video import frame_numbers, moving_square, numbered_frames, write_video


def _config(**changes: Any) -> PreencodeConfig:
    return PreencodeConfig.model_validate({"embedder": "e", "data": "d", "output": "o", "text": None} | changes)


def _sample(frames: int, height: int = 32, width: int = 32, number: int = 0) -> Sample:
    return Sample(f"v{number}", number, "s", "m", 0, 1, "", frames, height, width, 8.0, None, None, "x")


@pytest.mark.parametrize(
    ("frames", "changes", "clips", "length", "left_out"),
    [
        (5, {}, 1, 5, 0),
        (14, {}, 2, 5, 4),
        (4, {}, 0, 1, 3),
        (1, {}, 0, 1, 0),
        (9, {"stride": 2}, 1, 5, 0),  # frames 0, 2, 4, 6, 8
        (8, {"stride": 2}, 0, 1, 3),
        (20, {"max_clips": 3}, 3, 5, 5),
    ],
)
def test_a_cut(frames: int, changes: dict[str, Any], clips: int, length: int, left_out: int) -> None:
    cut = cut_video(_sample(frames), _config(**changes), 5)
    assert (cut.clips, cut.length, cut.left_out) == (clips, length, left_out)
    assert cut.frames == max(1, clips) * length


def test_the_middle_of_a_frame_is_kept() -> None:
    """Without buckets as much as fits; with buckets the frame is resized until the crop just fits."""
    cropped = cut_video(_sample(5, 50, 70), _config(), 5).geometry
    assert (cropped.crop, cropped.height, cropped.width, cropped.top, cropped.left) == ((48, 64), 50, 70, 1, 3)
    fitted = cut_video(_sample(5, 64, 96), _config(buckets=[[32, 32]]), 5).geometry
    assert (fitted.crop, fitted.height, fitted.width, fitted.top, fitted.left) == ((32, 32), 32, 48, 0, 8)
    with pytest.raises(DataError, match="15x64 is too small"):
        cut_video(_sample(5, 15, 64), _config(), 5)


# Clips decoded ahead by threads: the right frames, in order, within bounds.


def _video(path: Path, frames: int, seed: int = 0) -> FetchResult:
    return FetchResult(write_video(path, moving_square(frames, 32, 32, seed=seed)).read_bytes())


def test_clips_hold_the_frames_that_they_should(tmp_path: Path) -> None:
    """Numbered frames: every third one, clip after clip, the same pixels as a clip that is read alone."""
    data = write_video(tmp_path / "v.mp4", numbered_frames(40), crf=8).read_bytes()
    cut = cut_video(_sample(40, 48, 64), _config(stride=3), 5)
    found = list(decode_clips(FetchResult(data), 40, cut))
    assert [frame_numbers(clip) for clip in found] == [[0, 3, 6, 9, 12], [15, 18, 21, 24, 27]]
    with VideoReader(data) as reader:
        for first, clip in zip((0, 15), found, strict=True):
            assert np.array_equal(clip, read_clip(reader, range(first, first + 15, 3), cut.geometry))


def test_a_varying_rate_keeps_its_pace(tmp_path: Path) -> None:
    """A frame that is shown for long comes again."""
    ticks = [40 * number + (400 if number > 5 else 0) for number in range(20)]
    data = write_video(tmp_path / "v.mp4", numbered_frames(20), ticks=ticks, crf=8).read_bytes()
    cut = cut_video(_sample(20, 48, 64), _config(), 5)
    numbers = [number for clip in decode_clips(FetchResult(data), 20, cut) for number in frame_numbers(clip)]
    assert len(numbers) == 20
    assert numbers == sorted(numbers)
    assert numbers.count(5) > 2


def test_threads_keep_the_order(tmp_path: Path) -> None:
    """Videos of different lengths, more than threads; one that is damaged raises in its own place."""
    lengths = [15, 5, 10, 5, 20, 5, 15]
    found = [_video(tmp_path / f"{n}.mp4", frames, n) for n, frames in enumerate(lengths)]
    found[3] = FetchResult(b"", "the bytes differ")
    jobs = [
        DecodeJob(n, found[n], frames, cut_video(_sample(frames), _config(), 5)) for n, frames in enumerate(lengths)
    ]
    seen: list[tuple[int, Any]] = []
    with Decoders(3) as threads:
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

    def endless(found: FetchResult, frames: int, cut: ClipCut) -> Iterator[np.ndarray]:
        while True:
            made.release()
            yield clip

    monkeypatch.setattr(preencode_clips, "decode_clips", endless)
    cut = cut_video(_sample(5), _config(), 5)
    before = threading.active_count()
    with Decoders(2) as threads:
        run = threads.run(DecodeJob(n, FetchResult(b""), 5, cut) for n in range(10))
        _, clips = next(run)
        next(clips)
        for _ in range(2 * 3 + 1):  # each of two threads: two that wait, one in hand; and the one that was taken
            assert made.acquire(timeout=60)
        assert not made.acquire(timeout=0.3)
    assert threading.active_count() <= before


def test_what_else_goes_wrong_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(found: FetchResult, frames: int, cut: ClipCut) -> Iterator[np.ndarray]:
        raise ZeroDivisionError
        yield

    monkeypatch.setattr(preencode_clips, "decode_clips", broken)
    with Decoders(1) as threads:
        _, clips = next(threads.run([DecodeJob(0, FetchResult(b""), 5, cut_video(_sample(5), _config(), 5))]))
        with pytest.raises(ZeroDivisionError):
            list(clips)


# Clips of one size encoded together, in batches that follow from the order alone.


class CountingEncoder:
    """Latents are the mean of the pixels; remembers the sizes of its batches."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def encode(self, clips: torch.Tensor) -> Latents:
        self.batches.append(tuple(clips.shape))
        mean = clips.mean((1, 2, 3, 4))[:, None, None, None]
        return Latents(mean, -mean)


def _fill(encoder: Any, size: int, videos: list[Pending]) -> list[Pending]:
    batches, done, held = Batches(encoder, size, videos), list[Pending](), 0
    for number, video in enumerate(videos):
        rows, columns = video.cut.geometry.crop
        for place in range(video.cut.parts):
            batches.add(video, place, np.full((3, video.cut.length, rows, columns), 10 * number + place, np.uint8))
            held = max(held, sum(map(len, batches._waiting.values())))
        done += batches.complete()
    batches.finish()
    assert held < preencode_clips._BATCHES_HELD * size
    return [*done, *batches.complete()]


def test_batches_are_of_one_size_and_videos_come_back_in_order() -> None:
    """A video's clips may be in several batches; each gets its own latents."""
    encoder = CountingEncoder()
    shapes = [(17, 32), (3, 32), (11, 48), (6, 32), (1, 32), (5, 48)]
    videos = [Pending(s, cut_video(s, _config(), 5)) for s in (_sample(f, 32, w) for f, w in shapes)]
    assert _fill(encoder, 2, videos) == videos
    assert sorted(encoder.batches) == sorted(
        [(2, 3, 5, 32, 32), (2, 3, 5, 32, 32), (2, 3, 5, 32, 48), (1, 3, 5, 32, 48), (2, 3, 1, 32, 32)]
    )
    for number, video in enumerate(videos):
        latents = video.latents()
        expected = torch.tensor([(10 * number + place) / 127.5 - 1 for place in range(video.cut.parts)]).bfloat16()
        assert torch.equal(latents.content.flatten(), expected)
        assert torch.equal(latents.motion.flatten(), -expected[: video.cut.clips])


def test_many_sizes_do_not_fill_the_memory() -> None:
    """Every video has a size of its own: the fullest is encoded before more than four batches wait."""
    encoder = CountingEncoder()
    samples = [_sample(10, 32, 16 * (1 + n)) for n in range(12)]
    videos = [Pending(sample, cut_video(sample, _config(), 5)) for sample in samples]
    assert _fill(encoder, 4, videos) == videos
    assert sum(shape[0] for shape in encoder.batches) == 24


def test_a_bad_video_does_not_keep_the_others() -> None:
    videos = [Pending(s, cut_video(s, _config(), 5)) for s in (_sample(10), _sample(5))]
    encoder: Any = CountingEncoder()
    batches = Batches(encoder, 1, videos)
    clip = np.zeros((3, 5, 32, 32), np.uint8)
    batches.add(videos[0], 0, clip)
    assert list(batches.complete()) == []
    videos[0].problem = "damaged"
    assert list(batches.complete()) == [videos[0]]
    batches.add(videos[1], 0, clip)
    assert list(batches.complete()) == [videos[1]]


def test_pixels_are_mapped_as_in_training() -> None:
    """0 and 255 to -1 and 1; the encoder sees [B, 3, T, H, W]."""
    encoder: Any = CountingEncoder()
    clips = [np.full((3, 5, 16, 16), value, np.uint8) for value in (0, 255)]
    latents = preencode_clips.encode_pixels(encoder, clips)
    assert latents.content.flatten().tolist() == [-1, 1]
    assert latents.content.dtype == torch.bfloat16

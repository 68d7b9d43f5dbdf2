"""Clips of one size encoded together, in batches that follow from the order alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.format.index import Sample
from regen_dist.inference import preencode_clips
from regen_dist.inference.preencode_clips import Batches, Pending, cut_video
from regen_dist.models.encoder import Latents


def _config(**changes: Any) -> PreencodeConfig:
    return PreencodeConfig.model_validate({"embedder": "e", "data": "d", "output": "o", "text": None} | changes)


def _sample(frames: int, height: int = 32, width: int = 32, number: int = 0) -> Sample:
    return Sample(f"v{number}", number, "s", "m", 0, 1, "", frames, height, width, 8.0, None, None, "x")


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

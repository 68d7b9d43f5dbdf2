"""Mean and std of latents: right, whatever the way they were added up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from regen_dist.config.datasets import DataConfig
from regen_dist.errors import CheckpointError
from regen_dist.inference.latent_space import (
    ChannelStatistics,
    LatentSpread,
    LatentStatistics,
    measure_statistics,
    read_statistics,
)
from regen_dist.models.encoder import Latents
from tests.helpers.tiny import SIDE, tiny_dataset


def _latents(seed: int = 0) -> Tensor:
    """[6, 3, 4, 5] whose channels lie far from zero and apart, where naive sums of squares lose all digits."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.tensor([1e6, -3.0, 0.0])[:, None, None].double()
    return torch.randn(6, 3, 4, 5, generator=generator, dtype=torch.float64) * 0.01 + offset


def _added(parts: Sequence[Tensor]) -> ChannelStatistics:
    total = ChannelStatistics.nothing(3)
    for part in parts:
        total = total + ChannelStatistics.of(part)
    return total


def _expect(found: ChannelStatistics, values: Tensor) -> None:
    channels = values.transpose(0, 1).flatten(1).numpy()
    assert found.count == channels.shape[1]
    np.testing.assert_allclose(found.mean, channels.mean(1), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(found.std, channels.std(1), rtol=1e-8)


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [5, 1], [1, 0, 2, 3]])
def test_however_it_is_cut_it_adds_up_to_the_whole(sizes: list[int]) -> None:
    """Mean and std equal numpy's over all the values, whether they come at once, one by one, unevenly, or with empty
    parts; also where the mean is a hundred million times the std."""
    _expect(_added(_latents().split(sizes)), _latents())


def test_order_and_grouping_do_not_matter() -> None:
    """Many tasks may each take a part, and be added up in any order and in groups."""
    parts = [ChannelStatistics.of(part) for part in _latents().split([1, 3, 2])]
    one, other = (parts[0] + parts[1]) + parts[2], parts[2] + (parts[1] + parts[0])
    _expect(one, _latents())
    _expect(other, _latents())


def test_low_precision_latents_are_counted_in_float64() -> None:
    """bfloat16 latents are summed as the numbers that they are, not in bfloat16."""
    latents = torch.rand(4, 3, 16, 16).to(torch.bfloat16)
    _expect(ChannelStatistics.of(latents), latents.double())


def test_a_value_that_is_not_finite_is_an_error() -> None:
    """One NaN would make every mean NaN, silently."""
    latents = torch.zeros(2, 3, 2, 2)
    latents[1, 2, 0, 1] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        ChannelStatistics.of(latents)


def test_the_file_brings_back_every_bit(tmp_path: Path) -> None:
    """Written and read: the same numbers, so that what was merged later equals what would have been merged before."""
    clips = LatentSpread.of(Latents(_latents(1), _latents(2)))
    statistics = LatentStatistics(clips, LatentSpread.of(Latents(_latents(3), _latents(4)), images=True), {"seed": "3"})
    path = tmp_path / "statistics.json"
    path.write_text(statistics.to_text())
    found = read_statistics(path)
    assert found is not None
    assert found.clips is not None
    assert found.images is not None
    assert (found.clips.num_clips, found.images.motion, found.measured_on) == (6, None, {"seed": "3"})
    for name in ("content", "motion"):
        one, other = getattr(clips, name), getattr(found.clips, name)
        assert one.count == other.count
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.squares, other.squares)
    assert found.to_text() == statistics.to_text()


def test_no_file_is_none_and_a_bad_one_is_an_error(tmp_path: Path) -> None:
    """An export without statistics has none; one whose file is of another kind says so."""
    path = tmp_path / "statistics.json"
    assert read_statistics(path) is None
    for text in ("[]", "{", '{"format": 9}', '{"format": 1, "clips": {"num_clips": 1}, "images": null}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="holds no latent statistics"):
            read_statistics(path)


class MeanCodec:
    """Content: the first frame's mean colour at each 8 x 8 cell. Motion: the last frame's."""

    num_frames = 5

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def encode(self, clips: Tensor) -> Latents:
        self.shapes.append(tuple(clips.shape))
        first, last = (torch.nn.functional.avg_pool2d(clips[:, :, at], 8) for at in (0, -1))
        return Latents(first, last)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("statistics"))


def test_clips_and_images_are_measured_apart(shards: Path) -> None:
    """So many of each, of the run's own crop; the same seed gives the same numbers, bit for bit, another seed others.
    Images have no motion."""
    data = DataConfig(url=str(shards), size=(SIDE, SIDE), image_fraction=0.25, workers=0)
    codec, told = MeanCodec(), []
    found = measure_statistics(
        codec, data, num_clips=3, seed=5, progress=lambda done, total: told.append((done, total))
    )
    assert codec.shapes == [(1, 3, 5, SIDE, SIDE)] * 3 + [(1, 3, 1, SIDE, SIDE)] * 3
    assert told == [(n, 6) for n in range(1, 7)]
    assert found.clips is not None
    assert found.images is not None
    assert (found.clips.num_clips, found.images.num_clips, found.images.motion) == (3, 3, None)
    assert found.clips.content.count == found.images.content.count == 3 * (SIDE // 8) ** 2
    assert bool((found.clips.content.std > 0).all())
    assert found.measured_on["data.image_fraction"] == "0.25"
    again, other = (measure_statistics(MeanCodec(), data, num_clips=3, seed=seed).to_text() for seed in (5, 6))
    assert again == found.to_text() != other


def test_without_images_there_are_clips_alone(shards: Path) -> None:
    """A run that was trained on clips has no statistics of images."""
    data = DataConfig(url=str(shards), size=(SIDE, SIDE), workers=0)
    found = measure_statistics(MeanCodec(), data, num_clips=2, seed=0)
    assert found.images is None
    assert found.clips is not None
    assert found.clips.motion is not None

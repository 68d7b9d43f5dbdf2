"""The latent space: normalisation, its inverse, refusals, and statistics that do not depend on the order of sums."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from regen_dist.config.datasets import DataConfig
from regen_dist.data.format.latents import pack_null_text
from regen_dist.errors import CheckpointError, DataError
from regen_dist.inference.codec import Window
from regen_dist.inference.latent_space import (
    ChannelStatistics,
    LatentScale,
    LatentSpread,
    LatentStatistics,
    NormalisedLatents,
    measure_statistics,
    read_space,
    read_statistics,
)
from regen_dist.models.encoder import Latents
from tests.helpers.checkpoints import saved_run
from tests.helpers.t2v import CHANNELS, CPU, latent_space, latent_statistics
from tests.helpers.tiny import SIDE


def _latents(clips: int = 3, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    content, motion = torch.randn(2, batch, clips, CHANNELS, 4, 6, generator=generator)
    return content, motion


def test_frames_are_in_order_and_normalised_apart() -> None:
    """content 0, motion 0, content 1, …, each with the mean and std of its own channel and kind."""
    content, motion = _latents()
    statistics = latent_statistics()
    frames = LatentScale(statistics).normalise(content, motion).frames
    assert frames.shape == (2, CHANNELS, 6, 4, 6)
    assert frames.dtype == torch.float32
    for kind, latents, of in ((0, content, "content"), (1, motion, "motion")):
        spread: ChannelStatistics = getattr(statistics.clips, of)
        mean, std = (each.float()[:, None, None] for each in (spread.mean, spread.std))
        for clip in range(3):
            expected = (latents[:, clip] - mean) / std
            torch.testing.assert_close(frames[:, :, 2 * clip + kind], expected)


def test_statistics_of_what_was_measured_are_taken_out() -> None:
    """Latents normalised by their own statistics have mean 0 and std 1 in every channel."""
    content, motion = (part * 3 + torch.arange(CHANNELS)[:, None, None] for part in _latents(1, 16))
    spread = LatentSpread.of(Latents(content[:, 0], motion[:, 0]))
    frames = LatentScale(LatentStatistics(spread, None, {})).normalise(content, motion).frames
    for kind in (0, 1):
        values = frames[:, :, kind].transpose(0, 1).flatten(1)
        torch.testing.assert_close(values.mean(1), torch.zeros(CHANNELS), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.std(1, correction=0), torch.ones(CHANNELS), atol=1e-5, rtol=0)


def test_without_whitening_channels_keep_their_proportions() -> None:
    """And the mean square over all of them is one, as with it; between lies what is between."""
    content, motion = (part * (1 + torch.arange(CHANNELS)[:, None, None]) for part in _latents(1, 16))
    statistics = LatentStatistics(LatentSpread.of(Latents(content[:, 0], motion[:, 0])), None, {})
    frames = {share: LatentScale(statistics, share).normalise(content, motion).frames for share in (0.0, 0.5, 1.0)}
    std = {share: each.transpose(0, 1).flatten(1).std(1) for share, each in frames.items()}
    own = content.flatten(0, 1).transpose(0, 1).flatten(1).std(1)
    for share, of in std.items():
        torch.testing.assert_close(of / of[0], (own / own[0]) ** (1 - share), rtol=0.05, atol=0)
        torch.testing.assert_close(of.square().mean(), torch.tensor(1.0), rtol=0.05, atol=0)
    for share, each in frames.items():
        back = LatentScale(statistics, share).restore(NormalisedLatents(each))
        torch.testing.assert_close(back[0].motion, motion[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_undoes_it(dtype: torch.dtype) -> None:
    """Clip by clip the latents that came in, from what a cache stores, too."""
    content, motion = (part.to(dtype) for part in _latents())
    scale = LatentScale(latent_statistics())
    row = scale.restore(scale.normalise(content, motion))
    assert len(row) == 3
    for clip, latents in enumerate(row):
        torch.testing.assert_close(latents.content, content[:, clip].float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(latents.motion, motion[:, clip].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("measured", [True, False])
def test_images(measured: bool) -> None:
    """One frame, by the statistics of images where there are some, else by those of clips' content; restored, an image
    has no motion."""
    content, motion = _latents(1)
    statistics = latent_statistics(images=measured)
    scale = LatentScale(statistics)
    normalised = scale.normalise(content, motion[:, :0])
    assert normalised.is_image
    of = (statistics.images or statistics.clips).content  # type: ignore[union-attr]
    mean, std = (each.float()[:, None, None] for each in (of.mean, of.std))
    torch.testing.assert_close(normalised.frames[:, :, 0], (content[:, 0] - mean) / std)
    (row,) = scale.restore(normalised)
    torch.testing.assert_close(row.content, content[:, 0], atol=1e-5, rtol=1e-5)
    assert not row.motion.any()


def test_images_alone() -> None:
    """Caches without clips; and of nothing at all."""
    images = latent_statistics().images
    scale = LatentScale(LatentStatistics(None, images, {}))
    content, motion = _latents(1)
    assert scale.normalise(content, motion[:, :0]).is_image
    with pytest.raises(CheckpointError, match="statistics are of nothing"):
        LatentScale(LatentStatistics(None, None, {}))


def test_a_channel_that_never_changes() -> None:
    """It is centred, and not blown up by a spread of zero."""
    content = torch.full((4, 1, CHANNELS, 4, 4), 0.7)
    spread = LatentSpread.of(Latents(content[:, 0], content[:, 0]))
    scale = LatentScale(LatentStatistics(spread, None, {}))
    assert float(scale.normalise(content + 0.1, content).frames.abs().max()) == pytest.approx(0.1, abs=1e-6)


def test_content_and_motion_of_different_rows() -> None:
    content, motion = _latents()
    with pytest.raises(DataError, match="are not of the same clips"):
        LatentScale(latent_statistics()).normalise(content, motion[:, :2])


def test_normalised_latents_cannot_be_decoded(tmp_path: Path) -> None:
    """Neither as clips nor as windows of a video: the error names what makes latents of them."""
    from regen_dist.inference.codec import Codec

    codec = Codec.load(saved_run(tmp_path).folder, device=CPU)
    content, motion = _latents(1)
    scale = LatentScale(latent_statistics())
    normalised = scale.normalise(content, motion)
    message = r"found NormalisedLatents; .* LatentScale\.restore makes them"
    with pytest.raises(DataError, match=message):
        codec.decode(normalised, torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        Window(normalised, 0.0, 5)  # type: ignore[arg-type]
    assert codec.decode(scale.restore(normalised)[0], torch.zeros(1)).shape == (2, 3, 1, 32, 48)


class TestFiles:
    """What a run folder and an export keep of it."""

    def test_they_are_read_back(self, tmp_path: Path) -> None:
        """The same statistics, bit for bit, facts, and embedding of the empty caption."""
        space = latent_space()
        space.write(tmp_path)
        found = read_space(tmp_path)
        assert found.facts == space.facts
        assert found.statistics.to_text() == space.statistics.to_text()
        assert torch.equal(found.null_text.text, space.null_text.text.bfloat16().float())
        content, motion = _latents()
        before, after = (each.scale.normalise(content, motion).frames for each in (space, found))
        assert torch.equal(before, after)

    def test_they_cannot_be_missing_or_damaged(self, tmp_path: Path) -> None:
        """Nothing, one file alone, and files that hold something else are told."""
        with pytest.raises(CheckpointError, match=r"is not there or not whole .* run `regen train` again"):
            read_space(tmp_path)
        latent_space().write(tmp_path)
        facts, null = (tmp_path / "latent_space" / name for name in ("facts.json", "null_text.safetensors"))
        null.write_bytes(b"nothing")
        with pytest.raises(CheckpointError, match="is damaged"):
            read_space(tmp_path)
        null.write_bytes(pack_null_text(torch.zeros(1, 4)))
        values = json.loads(facts.read_text())
        del values["statistics"]
        facts.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=r"is damaged .*statistics"):
            read_space(tmp_path)

    def test_a_missing_file_is_written_again(self, tmp_path: Path) -> None:
        """The error promises it of `regen train`; the facts are the same."""
        space = latent_space()
        space.write(tmp_path)
        for name in ("null_text.safetensors", "facts.json"):
            (tmp_path / "latent_space" / name).unlink()
            with pytest.raises(CheckpointError, match="run `regen train` again, which writes it"):
                read_space(tmp_path)
            space.write(tmp_path)
            assert torch.equal(read_space(tmp_path).null_text.text, space.null_text.text)

    def test_another_space_takes_its_place(self, tmp_path: Path) -> None:
        latent_space().write(tmp_path)
        latent_space(images=False).write(tmp_path)
        assert read_space(tmp_path).statistics.images is None


def test_frames_of_rows(tmp_path: Path) -> None:
    """The type says how many frames there are, and no more: an image is one."""
    assert NormalisedLatents(torch.zeros(1, CHANNELS, 1, 2, 2)).is_image
    assert not NormalisedLatents(torch.zeros(1, CHANNELS, 2, 2, 2)).is_image


# Mean and std of latents: right, whatever the way they were added up.


def _offset_latents(seed: int = 0) -> Tensor:
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
    _expect(_added(_offset_latents().split(sizes)), _offset_latents())


def test_order_and_grouping_do_not_matter() -> None:
    """Many tasks may each take a part, and be added up in any order and in groups."""
    parts = [ChannelStatistics.of(part) for part in _offset_latents().split([1, 3, 2])]
    one, other = (parts[0] + parts[1]) + parts[2], parts[2] + (parts[1] + parts[0])
    _expect(one, _offset_latents())
    _expect(other, _offset_latents())


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
    clips = LatentSpread.of(Latents(_offset_latents(1), _offset_latents(2)))
    statistics = LatentStatistics(
        clips, LatentSpread.of(Latents(_offset_latents(3), _offset_latents(4)), images=True), {"seed": "3"}
    )
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
def shards(tiny_shards: Path) -> Path:
    return tiny_shards


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

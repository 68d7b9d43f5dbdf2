"""Normalising latents, undoing it, and that nobody decodes the one for the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from regen_dist.data.format.latents import pack_null_text
from regen_dist.errors import CheckpointError, DataError
from regen_dist.inference.codec import Window
from regen_dist.inference.latent_space import (
    ChannelStatistics,
    LatentScale,
    LatentSpread,
    LatentStatistics,
    NormalisedLatents,
    read_space,
)
from regen_dist.models.encoder import Latents
from tests.helpers.saved import saved_run
from tests.helpers.t2v import CHANNELS, CPU, latent_space, latent_statistics


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

    def test_another_space_takes_its_place(self, tmp_path: Path) -> None:
        latent_space().write(tmp_path)
        latent_space(images=False).write(tmp_path)
        assert read_space(tmp_path).statistics.images is None


def test_frames_of_rows(tmp_path: Path) -> None:
    """The type says how many frames there are, and no more: an image is one."""
    assert NormalisedLatents(torch.zeros(1, CHANNELS, 1, 2, 2)).is_image
    assert not NormalisedLatents(torch.zeros(1, CHANNELS, 2, 2, 2)).is_image

"""Tiles of a frame give what the whole frame gives; where they cannot, they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regen_dist.errors import ConfigError, DataError
from regen_dist.inference import codec as codec_module
from regen_dist.inference.codec import Codec, Window, axis_cuts
from regen_dist.models.decoder import ReceptiveField
from regen_dist.models.embedder import build_model
from tests.helpers.tiny import clips, tiny_run, wake

TOLERANCE = 1e-5  # in float32: convolutions of another size may add in another order
HEIGHT, WIDTH = 80, 168
WINDOWED: dict[str, Any] = {"model__decoder__attention": {"pattern": "window", "window": [5, 2, 3]}}


def _codec(**changes: Any) -> Codec:
    config = tiny_run(**changes)
    torch.manual_seed(0)
    model = build_model(config.model)
    wake(model)
    for name, parameter in model.named_parameters():
        if parameter.shape[0] == 3 * 64:  # estimates stay inside [-1, 1], where nothing is clamped
            parameter.data.mul_(0.02 if name.startswith("linear") else 0.1)
    return Codec(model, config, torch.device("cpu"))


@pytest.mark.parametrize("tile", [64, 100])
def test_latents_of_tiles_are_those_of_whole_frames(tile: int) -> None:
    """Of clips and of images, of batches; also where tiles do not divide the sides."""
    for video in (clips(2, 5, HEIGHT, WIDTH), clips(1, 1, HEIGHT, WIDTH)):
        codec = _codec(**WINDOWED)
        whole = codec.encode(video)
        codec.use_tiles(tile)
        for part, other in zip(codec.encode(video), whole, strict=True):
            torch.testing.assert_close(part, other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("blocks", "steps"), [(1, 1), (2, 3), (4, 1)])
def test_frames_of_tiles_are_those_of_whole_frames(blocks: int, steps: int) -> None:
    """From windows that overlap, at several steps: the noise and the estimates are the whole frame's."""
    codec = _codec(model__decoder__blocks=blocks, **WINDOWED)
    latents = codec.encode(clips(2, 5, HEIGHT, WIDTH))
    windows = [Window(type(latents)(*(part[i, None] for part in latents)), 4.0 * i, 5) for i in range(2)]
    whole = codec.decode_windows(windows, torch.arange(9.0), steps=steps, seed=3)
    codec.use_tiles(64)
    tiled = codec.decode_windows(windows, torch.arange(9.0), steps=steps, seed=3)
    assert whole.abs().max() < 1
    torch.testing.assert_close(tiled, whole, rtol=0, atol=TOLERANCE)


def test_the_baselines_tiles() -> None:
    codec = _codec(model__kind="magvit2")
    latents, times = codec.encode(clips(1, 5, HEIGHT, WIDTH)), torch.arange(5.0)
    whole = codec.decode(latents, times)
    codec.use_tiles(64)
    torch.testing.assert_close(codec.decode(latents, times), whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
def test_without_what_is_around_them_tiles_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the two tests above see a difference where there is one."""
    codec = _codec(model__kind=kind, **WINDOWED)
    video = clips(1, 5, HEIGHT, WIDTH)
    latents = codec.encode(video)
    whole = codec.decode(latents, torch.arange(5.0))
    codec.use_tiles(64)
    for name, step in (("encoder_receptive_field", (1, 1)), ("decoder_receptive_field", (2, 3))):
        monkeypatch.setattr(codec_module, name, lambda config, step=step: ReceptiveField((0, 0), step))
    assert (codec.encode(video).motion - latents.motion).abs().max() > 1e-3
    assert (codec.decode(latents, torch.arange(5.0)) - whole).abs().max() > 1e-3


def test_whole_frames_again() -> None:
    codec = _codec(**WINDOWED)
    video = clips(1, 5, 64, 64)
    whole = codec.encode(video)
    codec.use_tiles(64)
    codec.use_tiles(None)
    assert torch.equal(codec.encode(video).motion, whole.motion)


def test_full_attention_is_refused() -> None:
    """It sees the whole frame: a tile cannot give what the whole frame gives."""
    with pytest.raises(ConfigError, match=r"attends over whole frames .*pattern=full.* leave the tiles out"):
        _codec().use_tiles(256)


def test_a_tile_too_small() -> None:
    with pytest.raises(ConfigError, match="a tile of 8 pixels; it must have at least 64 a side"):
        _codec(**WINDOWED).use_tiles(8)


def test_clips_that_do_not_fit_are_refused_before_they_are_cut() -> None:
    codec = _codec(**WINDOWED)
    codec.use_tiles(64)
    with pytest.raises(DataError, match="multiples of 8, found 130x264"):
        codec.encode(torch.zeros(1, 3, 5, 130, 264))


@pytest.mark.parametrize(
    ("length", "tile", "reach", "step"), [(33, 8, 5, 1), (33, 8, 5, 3), (5, 8, 9, 4), (16, 1, 0, 8)]
)
def test_cuts_keep_every_cell_once_and_read_what_it_depends_on(length: int, tile: int, reach: int, step: int) -> None:
    every = list(axis_cuts(length, tile, reach, step))
    assert [cell for cut in every for cell in range(cut.start, cut.stop)] == list(range(length))
    for cut in every:
        assert cut.first % step == 0
        assert cut.first <= max(cut.start - reach, 0)
        assert cut.last >= min(cut.stop + reach, length)
        assert cut.last in (length, cut.last // step * step)
